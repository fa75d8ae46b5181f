"""What int8 costs a language model in perplexity, and where: `python -m bench.accuracy.language`.

SmolLM2-135M, before any training, on answers of the built-in dictionaries. The first two rows are the kernels'; the others are
emulated in fp32: both operands of a layer are rounded as the kernels do it, or otherwise, and multiplied by `F.linear`. The
divergence, sum over tokens of p log(p / q) with p in fp32, says how far predictions moved: a hundred tokens show it. The
perplexity of a few thousand tokens moves by more than the rounding is worth.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedms_ext
from bench.accuracy.rounding import rotated, rounded_groups, rounded_rows, rounded_weight
from fedms.data import dictionaries
from fedms.data.conversations import encode
from fedms.models.smollm2 import SmolLM2

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 16


@dataclass(frozen=True)
class Way:
    """What is rounded.

    inputs, weights: kinds of layers whose inputs or weights are; "head" is one.
    steps:  of an input.
    group:  values of a row that share a scale; 0: all.
    smooth: alpha of SmoothQuant (Xiao et al. 2023), or None.
    rotate: columns of a block that are multiplied by a Hadamard matrix before both are rounded (QuaRot, Ashkboos et al. 2024);
        1: none.
    """
    inputs: tuple[str, ...] = (*KINDS, "head")
    weights: tuple[str, ...] = (*KINDS, "head")
    steps: int = 255
    group: int = 0
    smooth: float | None = None
    rotate: int = 1


BLOCKS = Way(KINDS, KINDS)
WAYS: dict[str, Way] = {
    "blocks": BLOCKS,
    "head": Way(("head",), ("head",)),
    "weights of blocks": Way((), KINDS),
    "inputs of blocks": Way(KINDS, ()),
    "inputs of q, k and v": Way(("q_proj", "k_proj", "v_proj"), ()),
    "inputs of o": Way(("o_proj",), ()),
    "inputs of gate and up": Way(("gate_proj", "up_proj"), ()),
    "inputs of down": Way(("down_proj",), ()),
    "blocks, inputs in 4095 steps": replace(BLOCKS, steps=4095),
    "blocks, inputs in groups of 64": replace(BLOCKS, group=64),
    "blocks, smoothed by activations seen, alpha 0.5": replace(BLOCKS, smooth=0.5),
    "blocks, rotated by 16": replace(BLOCKS, rotate=16),
    "blocks, rotated by 64": replace(BLOCKS, rotate=64),
    "inputs of blocks, rotated by 64": Way(KINDS, (), rotate=64),
    "weights of blocks, rotated by 64": Way((), KINDS, rotate=64),
}


class Samples:
    """Questions and answers as batches of tokens, of similar length."""

    def __init__(self, model: SmolLM2, each: int, seed: int) -> None:
        exchanges, _ = dictionaries.read(None, each * len(dictionaries.FILES), seed)
        self.encoded = encode(exchanges, model.tokenizer, max_tokens=128, stop_tokens=model.stop_tokens)
        self.order = self.encoded.inputs.lengths.argsort()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (B, T), and which positions precede a token of an answer (B, T - 1)."""
        inputs = self.encoded.inputs
        for rows in self.order.split(BATCH):
            ids = inputs.batch(rows)["input_ids"]
            places, starts = torch.arange(ids.shape[1] - 1), self.encoded.starts[rows]
            yield ids, (places >= starts[:, None] - 1) & (places < inputs.lengths[rows, None] - 1)


@torch.no_grad()
def hidden_states(model: SmolLM2, samples: Samples) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Run the blocks over every batch.

    Returns:
        The hidden states (n_i, D) at every position that predicts a token of an answer, for each batch; those tokens (n_i,); and for
        each token of all batches the answer that it belongs to, (n,).
    """
    found, tokens, answers = [], [], []
    for ids, asked in samples.batches():
        found.append(model.hidden({"input_ids": ids})[:, :-1][asked])
        tokens.append(ids[:, 1:][asked])
        answers.append(asked.nonzero()[:, 0] + BATCH * len(answers))
    return found, tokens, torch.cat(answers)


@dataclass(frozen=True)
class Change:
    """How far predictions moved: the divergence in nats, and the change of the loss of each token (n,)."""
    divergence: float
    loss: Tensor

    def error(self, answers: Tensor) -> float:
        """Return the standard error of the mean change of the loss. Tokens of an answer are not independent, answers (n,) are."""
        sums = torch.zeros(int(answers.max()) + 1, dtype=torch.float64)
        sums.index_add_(0, answers, (self.loss - self.loss.mean()).double())
        count = len(sums)
        return float(sums.square().sum().mul(count / (count - 1)).sqrt() / len(self.loss))


@torch.no_grad()
def change(model: SmolLM2, samples: Samples, exact: list[Tensor], weight: Tensor) -> Change:
    """Compare the model's predictions with those of the hidden states `exact` under the head's float32 weight (V, D)."""
    moved, total, count = [], 0.0, 0
    for hidden, tokens, before in zip(*hidden_states(model, samples)[:2], exact):
        p, q = F.linear(before, weight).log_softmax(-1), model.head(hidden).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        count += len(tokens)
        moved.append((p - q).gather(1, tokens[:, None]).squeeze(1))
    return Change(total / count, torch.cat(moved))


def linear_layers(model: SmolLM2) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]


@torch.no_grad()
def largest_inputs(model: SmolLM2, samples: Samples) -> dict[str, Tensor]:
    """The largest magnitude of every channel of every layer's input."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple) -> None:
            largest = args[0].abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest
        return hook
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model).items()]
    hidden_states(model, samples)
    for handle in handles:
        handle.remove()
    return found


@contextmanager
def rounded(model: SmolLM2, way: Way, seen: dict[str, Tensor]) -> Iterator[None]:
    handles, originals = [], {}
    for name, layer in linear_layers(model).items():
        kind, factor = kind_of(name), None
        originals[name] = layer.weight.data
        if way.smooth is not None:
            of_w = layer.weight.abs().amax(0).clamp_min(1e-5)
            factor = seen[name].clamp_min(1e-5) ** way.smooth / of_w ** (1 - way.smooth)
        if kind in way.weights:
            scaled = rotated(layer.weight.data if factor is None else layer.weight.data * factor, way.rotate)
            scaled = rotated(rounded_weight(scaled), way.rotate)
            layer.weight.data = scaled if factor is None else scaled / factor
        if kind in way.inputs:
            handles.append(layer.register_forward_pre_hook(_rounding(way, factor)))
    hidden, head = model.hidden, model.head.weight.data
    if "head" in way.inputs:
        model.hidden = lambda inputs: rounded_rows(hidden(inputs))      # type: ignore[method-assign]
    old = model.head
    if "head" in way.weights:
        model.head = type(old)(rounded_weight(head), old.bias, scale=old.scale, cap=old.cap)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in linear_layers(model).items():
            layer.weight.data = originals[name]
        model.hidden, model.head = hidden, old      # type: ignore[method-assign]


def _rounding(way: Way, factor: Tensor | None) -> Callable:
    def hook(_: nn.Module, args: tuple) -> tuple:
        x = args[0] if factor is None else args[0] / factor
        x = rotated(x, way.rotate)
        x = rounded_rows(x, way.steps) if way.group == 0 else rounded_groups(x, way.group)
        x = rotated(x, way.rotate)
        return (x if factor is None else x * factor,)
    return hook


@contextmanager
def quantized(model: SmolLM2, kind: str, full_precision: tuple[str, ...]) -> Iterator[None]:
    """As a run computes it with the blocks and the head in this format, but for the layers of `model.full_precision`."""
    originals = {f"{name}.weight": layer.weight.detach() for name, layer in linear_layers(model).items()}
    fedms_ext.quantize(model.module, kind, exclude=full_precision or None)
    model.quantize_head(kind)
    try:
        yield
    finally:
        fedms_ext.dequantize(model.module, originals)
        model.quantize_head("fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=10, help="answers of each dictionary")
    parser.add_argument("--seed", type=int, default=0, help="seed of their draw")
    parser.add_argument("--ways", default="", help="only those whose name contains this")
    parser.add_argument("--full-precision", default="", help="endings of names of layers that stay in fp32, with commas between")
    asked = parser.parse_args()
    full = tuple(filter(None, asked.full_precision.split(",")))
    model = SmolLM2()
    samples, before = Samples(model, asked.each, asked.seed), Samples(model, 2, asked.seed + 1)
    ways = {name: way for name, way in WAYS.items() if asked.ways in name}
    seen = largest_inputs(model, before) if any(way.smooth is not None for way in ways.values()) else {}
    exact, tokens, answers = hidden_states(model, samples)
    weight = model.head.weight
    loss = [F.cross_entropy(F.linear(x, weight), wanted, reduction="none") for x, wanted in zip(exact, tokens)]
    print(f"{len(answers)} tokens in {int(answers.max()) + 1} answers, perplexity in fp32 {torch.cat(loss).mean().exp():.2f}\n"
          "| rounded | divergence, nats a token | perplexity, % more | its standard error |\n| --- | ---: | ---: | ---: |",
          flush=True)
    contexts = {f"as a run computes it, {kind}": partial(quantized, model, kind, full) for kind in ("int8", "int8_rotated")}
    contexts = {name: context for name, context in contexts.items() if asked.ways in name}
    for name, context in {**contexts, **{name: partial(rounded, model, way, seen) for name, way in ways.items()}}.items():
        with context():
            found = change(model, samples, exact, weight)
        print(f"| {name} | {found.divergence:.4f} | {100 * math.expm1(found.loss.mean()):+.2f} | "
              f"{100 * found.error(answers):.2f} |", flush=True)


if __name__ == "__main__":
    main()
