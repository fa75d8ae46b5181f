"""Cost model: operations and memory of a model with a constant prefix and trained blocks above it.

Operations: one multiply-add counts as two. Linear layers, their applied LoRA pairs and the two products of attention are
counted. Normalization, activations and softmax are not; they are a few percent of a transformer.

Memory: the activations that a model stores for its backward pass depend on all its operators, so they are traced rather
than derived from the layers. The work runs once with one sample and once with two, while `PeakMemory` follows its tensors.
The peak is an affine function of the number of samples, so two small traces predict every batch size.
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
    """The sizes that determine the operations of a block for one token.

    Attributes:
        linear: Number of weights in the Linear layers.
        lora: Number of weights in the applied LoRA pairs.
        attention: Width of the attention, heads times the size of a head.
    """

    linear: int
    lora: int
    attention: int

    def forward(self, tokens: int, length: int) -> int:
        """Return the operations of a forward pass over `tokens` tokens, including padding, in sequences of `length` tokens."""
        return tokens * (2 * self.linear + 2 * self.lora + 4 * length * self.attention)

    def backward(self, tokens: int, length: int) -> int:
        """Return the operations of a backward pass: one product for each Linear layer, whose frozen weight needs no
        gradient, and two for each product of LoRA and of attention."""
        return tokens * (2 * self.linear + 4 * self.lora + 8 * length * self.attention)


def rank_of_a_row(layer: ExpertLinear) -> int:
    """Return the total rank that a layer applies to a row; the mean over the rows, rounded up, if rows are in segments."""
    if layer.segments is None:
        return sum(layer.experts[e].rank for e in layer.applied)
    applied = zip(layer.segments, layer.experts.items())
    total = sum(rows * lora.rank for rows, (e, lora) in applied if e in layer.applied)
    return -(-total // max(sum(layer.segments), 1))


def block_costs(model: nn.Module) -> list[BlockCost]:
    """Return the cost of each block with the pairs that are applied at present."""
    costs = []
    for block in blocks_of(model):
        linears = [m for m in block.modules() if is_linear(m)]
        lora = sum(rank_of_a_row(layer) * (layer.in_features + layer.out_features)
                   for layer in linears if isinstance(layer, ExpertLinear))
        sizes = [widths(layer) for layer in linears]
        costs.append(BlockCost(linear=sum(inputs * outputs for inputs, outputs in sizes), lora=lora, attention=sizes[0][0]))
    return costs


def forward_flops(model: nn.Module, samples: int, length: int, *, first: int = 0, last: int | None = None) -> int:
    """Return the operations of blocks first..last-1 (0-based; all by default) for `samples` sequences of `length` tokens."""
    return sum(cost.forward(samples * length, length) for cost in block_costs(model)[first:last])


def backward_flops(model: nn.Module, samples: int, length: int) -> int:
    """Return the operations of a backward pass, which ends above the constant prefix."""
    return sum(cost.backward(samples * length, length) for cost in block_costs(model)[prefix_depth(model):])


def trained_parameters(model: nn.Module) -> int:
    """Return the number of values in parameters that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, buffers and quantized weights, including experts.

    Tensors that several modules share count once. The transpose of a quantized weight counts as soon as a backward pass has
    made it.
    """
    quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    inside = {id(t) for weight in quantized for t in weight.buffers()}
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in inside}
    return sum(held.values()) + sum(weight.nbytes for weight in quantized)


class PeakMemory(TorchDispatchMode):
    """A context that measures the peak memory of the tensors created in it.

    It counts the storages that PyTorch's operators return. Memory that an operator allocates and frees internally, and
    overhead of the allocator, are not counted.

    Attributes:
        peak: Largest number of bytes held at once.
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
    """Peak memory in bytes as a function of the batch size: `fixed + samples * per_sample`."""

    fixed: int
    per_sample: int

    def of(self, samples: int) -> int:
        """Return the peak memory in bytes for a batch of `samples` samples."""
        return self.fixed + samples * self.per_sample


def memory_of(work: Callable[[int], object]) -> Memory:
    """Measure the memory that `work(samples)` allocates, by tracing it with 1 and 2 samples.

    `work` runs twice with each size, and only the second run is measured, so that tensors which are made once and kept (the
    transpose of a quantized weight) do not count.
    """
    peaks = []
    for samples in (1, 2):
        work(samples)
        with PeakMemory() as memory:
            work(samples)
        peaks.append(memory.peak)
    return Memory(fixed=2 * peaks[0] - peaks[1], per_sample=peaks[1] - peaks[0])
