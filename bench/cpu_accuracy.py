"""What each format of the frozen weights costs in accuracy and gains in memory, on MiniLM's own activations.

    python bench/cpu_accuracy.py

512 sentences of the built-in sentiment data. Errors are relative (Frobenius norm), of every Linear layer of the blocks
fed with the input that it has in fp32: its output, and the gradient of its input from the gradient of a cross-entropy
on the pooled features. Memory is what the process holds, by the system's count, before and after.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedms import data, models
from fedms.config import load_config
from fedms.meter import reset_peak_memory, resident_memory
from fedms_ext import FrozenLinear, QuantisedWeight, quantize
from fedms_ext.formats import KINDS

SENTENCES, BATCH = 512, 64


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


class Case:
    """MiniLM in fp32 and batches of real sentences with their classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = load_config("sentiment", [])
        self.foundation = models.load(config.model)
        self.dataset = data.load(config.data, self.foundation)
        self.rows = torch.randperm(len(self.dataset.labels))[:SENTENCES]
        self.layers = {
            name: m for name, m in self.foundation.module.named_modules()
            if isinstance(m, nn.Linear) and "encoder.layer" in name
        }  # fmt: skip
        self.head = nn.Linear(self.foundation.feature_dim, len(self.dataset.classes))

    def batches(self) -> Iterator[tuple[object, Tensor]]:
        for rows in self.rows.split(BATCH):
            yield self.dataset.inputs.batch(rows), self.dataset.labels[rows]

    def features(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.foundation.features(batch) for batch, _ in self.batches()])

    def record(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and gradient of the output of each layer, of the first batch."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = []
        for name, layer in self.layers.items():
            def keep(layer, inputs, output, name=name):
                x = inputs[0].detach()
                output.register_hook(lambda dy: seen.__setitem__(name, (x, dy.detach())))
            hooks.append(layer.register_forward_hook(keep))
            layer.weight.requires_grad_()
        batch, labels = next(self.batches())
        nn.functional.cross_entropy(self.head(self.foundation.features(batch)), labels).backward()
        for hook in hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.weight.requires_grad_(False).grad = None
        return seen


def errors(case: Case, seen: dict[str, tuple[Tensor, Tensor]], kind: str) -> tuple[list[float], list[float]]:
    forward, backward = [], []
    for name, layer in case.layers.items():
        x, dy = seen[name]
        x = x.clone().requires_grad_()
        y = FrozenLinear(QuantisedWeight(layer.weight, kind), layer.bias)(x)
        forward.append(error(y.detach(), nn.functional.linear(x, layer.weight, layer.bias).detach()))
        y.backward(dy)
        backward.append(error(x.grad, dy @ layer.weight))
    return forward, backward


def memory_share(kind: str, with_dx: bool) -> float:
    """Bytes of the process that hold MiniLM's Linear weights, over those in fp32."""
    module = models.load(load_config("sentiment", []).model).module
    for weight in module.parameters():
        weight.data = weight.data.clone()   # as loaded they are mapped from the file
    reset_peak_memory()                     # hands freed memory back
    before = resident_memory()
    quantize(module, kind)
    weights = [m for m in module.modules() if isinstance(m, QuantisedWeight)]
    if with_dx:
        for weight in weights:
            weight.for_dx()
    reset_peak_memory()
    full = sum(4 * n * k for n, k in (weight.shape for weight in weights))
    return 1 - (before - resident_memory()) / full


def main() -> None:
    case = Case()
    seen, want = case.record(), case.features()
    print(f"MiniLM, {SENTENCES} sentences, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| format | output: mean, worst layer % | dx: mean, worst layer % | cosine of features: mean, worst | "
          "memory % of fp32 | with dx in every layer |")
    print("| --- | --- | --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    for kind in KINDS:
        forward, backward = errors(case, seen, kind)
        quantised = Case()
        quantize(quantised.foundation.module, kind)
        cosine = nn.functional.cosine_similarity(quantised.features(), want)
        with context.Pool(1, maxtasksperchild=1) as pool:
            held = pool.starmap(memory_share, [(kind, False), (kind, True)], chunksize=1)
        figures = [f"{100 * sum(e) / len(e):.3g}, {100 * max(e):.3g}" for e in (forward, backward)]
        print(f"| `{kind}` | {figures[0]} | {figures[1]} | {cosine.mean():.5f}, {cosine.min():.5f} | "
              f"{100 * held[0]:.1f} | {100 * held[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
