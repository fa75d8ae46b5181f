"""Cost model: operations and memory of a model whose blocks are partly trained, partly a constant prefix.

Operations: one multiply-add counts as two. Counted are the Linear layers, their applied LoRA pairs, and the two
products of attention; normalization, activations and softmax are left out (a few percent of a transformer).

Memory: what a model keeps for its backward pass depends on every operator in it, so it is not worked out from the
layers but traced: a piece of work runs on one sample and on two, and `PeakMemory` follows its tensors. The peak is
affine in the number of samples, so two small traces foretell any batch.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.linear import is_linear, widths
from fedms_ext.nn.quantized_weight import QuantizedWeight
from fedms_ext.sparse.activation import blocks_of, prefix_depth


@dataclass(frozen=True)
class BlockCost:
    """Per token: weights of the Linear layers, weights of the applied LoRA pairs, width of attention."""

    linear: int
    lora: int
    attention: int

    def forward(self, tokens: int, length: int) -> int:
        """Operations of a forward pass over `tokens` tokens in sequences of `length`, padding included."""
        return tokens * (2 * self.linear + 2 * self.lora + 4 * length * self.attention)

    def backward(self, tokens: int, length: int) -> int:
        """Operations of a backward pass: dx of every Linear layer (the frozen weight has no gradient), two products
        for each of attention's and LoRA's."""
        return tokens * (2 * self.linear + 4 * self.lora + 8 * length * self.attention)


def rank_of_a_row(layer: ExpertLinear) -> int:
    """The ranks that a layer applies to a row, in the mean where rows are in segments; rounded up."""
    if layer.segments is None:
        return sum(layer.experts[e].rank for e in layer.applied)
    applied = zip(layer.segments, layer.experts.items())
    total = sum(rows * lora.rank for rows, (e, lora) in applied if e in layer.applied)
    return -(-total // max(sum(layer.segments), 1))


def block_costs(model: nn.Module) -> list[BlockCost]:
    """The cost of each block with the pairs that are applied now."""
    costs = []
    for block in blocks_of(model):
        linears = [m for m in block.modules() if is_linear(m)]
        lora = sum(rank_of_a_row(layer) * (layer.in_features + layer.out_features)
                   for layer in linears if isinstance(layer, ExpertLinear))
        sizes = [widths(layer) for layer in linears]
        costs.append(BlockCost(linear=sum(inputs * outputs for inputs, outputs in sizes), lora=lora, attention=sizes[0][0]))
    return costs


def forward_flops(model: nn.Module, samples: int, length: int, *, first: int = 0, last: int | None = None) -> int:
    """Operations of running blocks first..last-1 (0-based; default all) on `samples` sequences of `length`."""
    return sum(cost.forward(samples * length, length) for cost in block_costs(model)[first:last])


def backward_flops(model: nn.Module, samples: int, length: int) -> int:
    """Operations of the backward pass down to the end of the constant prefix."""
    return sum(cost.backward(samples * length, length) for cost in block_costs(model)[prefix_depth(model):])


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters that ask for a gradient now."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantized weights, experts included. What several modules share counts
    once. A quantized weight's transpose counts once a backward pass has asked for it."""
    quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    inside = {id(t) for weight in quantized for t in weight.buffers()}
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in inside}
    return sum(held.values()) + sum(weight.nbytes for weight in quantized)


class PeakMemory(TorchDispatchMode):
    """Within the context: `peak`, the most bytes that tensors made in it held at once.

    Counted are storages as torch's operators return them. What one operator allocates and frees inside itself, and
    the allocator's own losses, are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a piece of work on a batch: `fixed + samples * per_sample`."""

    fixed: int
    per_sample: int

    def of(self, samples: int) -> int:
        """Peak bytes for a batch of `samples`."""
        return self.fixed + samples * self.per_sample


def memory_of(work: Callable[[int], object]) -> Memory:
    """The memory that `work(samples)` needs above what is held when it is called, traced with 1 and 2 samples.

    Each size runs twice, and the second run counts: what is made once and kept (a quantized weight's transpose) is
    no part of it.
    """
    peaks = []
    for samples in (1, 2):
        work(samples)
        with PeakMemory() as memory:
            work(samples)
        peaks.append(memory.peak)
    return Memory(fixed=2 * peaks[0] - peaks[1], per_sample=peaks[1] - peaks[0])
