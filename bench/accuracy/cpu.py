"""What each format of the frozen weights costs in accuracy and gains in memory, on MiniLM's own activations.

    python -m bench.accuracy.cpu

512 sentences of the built-in sentiment data. Errors are relative (Frobenius norm), of every Linear layer of the blocks
fed with the input that it has in fp32: its output, and the gradient of its input from that of a cross-entropy on the
pooled features. The cosine is that of the sentences' embeddings with those of the fp32 model, all layers quantized; where
attention rounds its operands to bfloat16 (`fedms_ext.use_attention`), a line says what it is with PyTorch's attention.
Memory is what a fresh process holds, by the system's count, before and after `fedms_ext.quantize`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedms import data, models
from fedms.config import load_config
from fedms.training.memory import hand_back_large_blocks, reset_peak_memory, resident_memory
from fedms_ext import FrozenLinear, QuantizedWeight, build_info, quantize
from fedms_ext.quantization.formats import KINDS

SENTENCES, BATCH = 512, 64
CONFIG = load_config("sentiment", [])


class Case:
    """MiniLM in fp32 and batches of real sentences with their classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.foundation = models.load(CONFIG.model)
        dataset = data.load(CONFIG.data, self.foundation)
        rows = torch.randperm(len(dataset))[:SENTENCES]
        self.batches = [(dataset.inputs.batch(part), dataset.labels[part]) for part in rows.split(BATCH)]
        self.head = nn.Linear(self.foundation.feature_dim, len(dataset.classes))
        self.layers = {
            name: module for name, module in self.foundation.module.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(self.foundation.blocks)
        }  # fmt: skip

    def embeddings(self, foundation: models.FoundationModel) -> Tensor:
        with torch.no_grad():
            return torch.cat([foundation.features(inputs) for inputs, _ in self.batches])

    def record(self) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
        """Each layer with its input and the gradient of its output, of the first batch."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, x: Tensor, y: Tensor) -> None:
            y.register_hook(lambda dy: seen.__setitem__(name, (x.detach(), dy)))

        hooks = [
            layer.register_forward_hook(lambda _, inputs, y, name=name: keep(name, inputs[0], y))
            for name, layer in self.layers.items()
        ]
        biases = [layer.bias.requires_grad_() for layer in self.layers.values()]  # so that every output has a gradient
        inputs, labels = self.batches[0]
        nn.functional.cross_entropy(self.head(self.foundation.features(inputs)), labels).backward()
        for bias in biases:
            bias.requires_grad_(False).grad = None
        for hook in hooks:
            hook.remove()
        return ((self.layers[name], x, dy) for name, (x, dy) in seen.items())


def error(got: Tensor, want: Tensor) -> float:
    return 100 * ((got - want).norm() / want.norm()).item()


def errors(layer: nn.Linear, x: Tensor, dy: Tensor, kind: str) -> tuple[float, float]:
    """Of the output and of dx, in percent."""
    x = x.clone().requires_grad_()
    y = FrozenLinear(QuantizedWeight(layer.weight, kind), layer.bias)(x)
    y.backward(dy)
    return error(y.detach(), layer(x).detach()), error(x.grad, dy @ layer.weight)


def memory_shares(kind: str) -> tuple[float, float]:
    """What the process holds of MiniLM's Linear weights, in percent of their size in fp32: as quantized, and once dx has
    been asked for in every layer."""
    hand_back_large_blocks()
    module = models.load(CONFIG.model).module
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()  # as loaded they are mapped from the file
    QuantizedWeight(torch.randn(1536, 1536), kind).for_dx()  # loads the code, which would count as the weights' memory
    reset_peak_memory()  # which hands freed memory back
    before = resident_memory()
    quantize(module, kind)
    weights = [m for m in module.modules() if isinstance(m, QuantizedWeight)]
    full = sum(4 * n * k for n, k in (weight.shape for weight in weights))

    def share() -> float:
        reset_peak_memory()
        return 100 * (1 - (before - resident_memory()) / full)

    quantized = share()
    for weight in weights:
        weight.for_dx()
    return quantized, share()


def main() -> None:
    case = Case()
    recorded, want = list(case.record()), case.embeddings(case.foundation)
    print(f"MiniLM, {SENTENCES} sentences, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| format | error of the output, %: mean, worst layer | error of dx, % | cosine of embeddings: mean, worst "
          "| memory, % of fp32 | with dx in every layer |")
    print("| --- | --- | --- | --- | --- | --- |")
    context, attention = multiprocessing.get_context("spawn"), []
    for kind in KINDS:
        layers = list(zip(*(errors(*layer, kind) for layer in recorded)))
        quantized = models.load(CONFIG.model)
        quantize(quantized.module, kind)
        cosine = nn.functional.cosine_similarity(case.embeddings(quantized), want)
        quantized.module.set_attn_implementation("sdpa")
        unrounded = nn.functional.cosine_similarity(case.embeddings(quantized), want)
        with context.Pool(1) as fresh:
            held = fresh.apply(memory_shares, (kind,))
        print(f"| `{kind}` | " + " | ".join(f"{sum(e) / len(e):.3g}, {max(e):.3g}" for e in layers)
              + f" | {cosine.mean():.5f}, {cosine.min():.5f} | {held[0]:.1f} | {held[1]:.1f} |", flush=True)
        attention.append(f"| `{kind}` | {unrounded.mean():.5f}, {unrounded.min():.5f} |")
    if build_info()["bf16_products"]:
        print("\n| format | cosine with PyTorch's attention, in float32 |\n| --- | --- |", *attention, sep="\n")


if __name__ == "__main__":
    main()
