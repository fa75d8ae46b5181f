"""Sparsely Activated LoRA: which blocks are active, and the constant prefix below them.

The blocks of a model are numbered 1..L from the input. The *constant prefix* consists of the blocks below the first block
with a trained pair. Its weights do not change, so it needs no backward pass and no stored activations, and its output for
a sample is always the same and can be cached.
"""
from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext.nn.expert_linear import HERE, ExpertLinear, Route
from fedms_ext.nn.lora import PairState
from fedms_ext.sparse.skipping import hidden_of, skipping
from fedms_ext.sparse.surgery import layers_of, block_list, expert_layers

ORDERS = ("top_down", "bottom_up", "interleaved")


def blocks_of(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """Return the list of transformer blocks of a model with experts.

    Raises:
        ValueError: If no experts are attached.
    """
    blocks = getattr(model, "fedms_blocks", None)
    if blocks is None:
        raise ValueError("no experts are attached to this model; call fedms_ext.attach first")
    return block_list(model, blocks)


def activation_order(count: int, order: str | Sequence[int]) -> list[int]:
    """Return the block numbers 1..count in the order in which the blocks are activated.

    Args:
        count: Number of blocks, L.
        order: `top_down` (L, L-1, ..., 1), `bottom_up` (1, 2, ..., L), `interleaved` (every second block from the top, then
            the blocks between them), or a list of distinct block numbers. Blocks that the list omits are never active.

    Raises:
        ValueError: If the name is unknown, or the list holds a number twice or outside 1..count.
    """
    if order == "top_down":
        return list(range(count, 0, -1))
    if order == "bottom_up":
        return list(range(1, count + 1))
    if order == "interleaved":
        return list(range(count, 0, -2)) + list(range(count - 1, 0, -2))
    if isinstance(order, str):
        raise ValueError(f"order must be one of {', '.join(ORDERS)} or a list of block numbers, got {order!r}")
    if len(set(order)) != len(order) or not all(1 <= b <= count for b in order):
        raise ValueError(f"order must hold distinct block numbers from 1 to {count}, got {list(order)}")
    return list(order)


def activate(model: nn.Module, expert: str, *, depth: int, order: str | Sequence[int] = "top_down",
             applied_depth: int | None = None) -> list[int]:
    """Set the states of all pairs of an expert.

    The first `depth` blocks of the order are trained, the next ones up to `applied_depth` are frozen, and the others are
    off.

    Args:
        model: A model with experts.
        expert: Name of the expert.
        depth: Number of trained blocks.
        order: See `activation_order`.
        applied_depth: Number of trained and frozen blocks; the default is `depth`.

    Returns:
        The numbers of the trained blocks, in ascending order.

    Raises:
        KeyError: If no layer has the expert.
        TypeError: If a depth is no integer.
        ValueError: If 0 <= depth <= applied_depth <= number of blocks in the order does not hold.
        RuntimeError: If the expert is merged into a weight of these blocks; no state has changed then.
    """
    ranked = activation_order(len(blocks_of(model)), order)
    applied_depth = depth if applied_depth is None else applied_depth
    for name, value in (("depth", depth), ("applied_depth", applied_depth)):
        if not isinstance(value, Integral):
            raise TypeError(f"{name} is a number of blocks, got {value!r}")
    if not 0 <= depth <= applied_depth <= len(ranked):
        raise ValueError(f"need 0 <= depth <= applied_depth <= {len(ranked)} blocks, got depth {depth}, "
                         f"applied_depth {applied_depth}")
    trained, applied = set(ranked[:depth]), set(ranked[:applied_depth])
    merged = [name for name, layer in layers_of(model, expert).items()
              if layer.merged is not None and layer.merged[0] == expert and layer.block in applied]
    if merged:
        raise RuntimeError(f"expert {expert!r} is merged into the weight of {merged[0]!r}; unmerge it before it is applied")
    for layer in layers_of(model, expert).values():
        layer.set_state(expert, PairState.TRAINED if layer.block in trained
                        else PairState.FROZEN if layer.block in applied else PairState.OFF)
    return sorted(trained)


def deactivate(model: nn.Module, expert: str) -> None:
    """Turn all pairs of an expert off."""
    activate(model, expert, depth=0)


def prefix_depth(model: nn.Module) -> int:
    """Return the number of blocks in the constant prefix, 0..L: those below the first block that has a trained pair or a
    gate."""
    live = [layer.block for layer in expert_layers(model).values()
            if layer.gate is not None or PairState.TRAINED in layer.states.values()]
    return min(live) - 1 if live else len(blocks_of(model))


def prefix_hash(model: nn.Module, depth: int) -> str:
    """Return the SHA-256 of the applied and merged pairs in the first `depth` blocks.

    Together with fingerprints of the model and the data it identifies the output of the prefix. Names of experts do not
    enter.
    """
    digest = hashlib.sha256()
    for name, layer in expert_layers(model).items():
        if layer.block <= depth:
            merged = [] if layer.merged is None else [layer.merged[0]]
            for kind, experts in (("applied", layer.applied), ("merged", merged)):
                for expert in experts:
                    lora = layer.experts[expert]
                    digest.update(f"{name}/{kind}/{lora.scale!r}/{lora.rank}".encode())
                    for pair in (layer.lora_a[expert], layer.lora_b[expert]):
                        digest.update(pair.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def gated(layers: Mapping[str, ExpertLinear] | Sequence[ExpertLinear], gate: Tensor) -> Iterator[None]:
    """Weight the experts of the given layers by sample, within the context and in the calling thread.

    Args:
        layers: The layers, as a list or as `expert_layers` returns them.
        gate: (B, E) weights, one row for each sample and one column for each expert of a layer, in the order of the experts.
            Gradients flow to it. (B, T, E) gives each token its own weights.
    """
    with _routed(layers, gate=gate):
        yield


@contextmanager
def segmented(layers: Mapping[str, ExpertLinear] | Sequence[ExpertLinear], segments: Sequence[int]) -> Iterator[None]:
    """Let each sample use only one expert of the given layers, within the context and in the calling thread.

    The first segments[0] samples of a batch use the first expert, the next segments[1] samples the second one, and so on.
    This computes the streams of a mixture as one batch, with one frozen product.

    Args:
        layers: The layers, as a list or as `expert_layers` returns them.
        segments: E numbers of samples, in the order of the experts.
    """
    with _routed(layers, segments=segments):
        yield


@contextmanager
def _routed(layers: Mapping[str, ExpertLinear] | Sequence[ExpertLinear], **change: Any) -> Iterator[None]:
    chosen = list(layers.values()) if isinstance(layers, Mapping) else list(layers)
    outer = HERE.routes
    changed: dict[nn.Module, Route] = {layer: replace(outer.get(layer, Route()), **change) for layer in chosen}
    HERE.routes = inner = {**outer, **changed}
    _exchange(outer, inner)
    try:
        yield
    finally:
        HERE.routes = outer
        _exchange(inner, outer)


def _exchange(old: Mapping[Any, Route], new: Mapping[Any, Route]) -> None:
    """Replace this thread's old routes by the new ones in each layer's list of routes."""
    for layer in {*old, *new}:
        if old.get(layer) is not new.get(layer):
            layer.routes = [route for route in layer.routes if route is not old.get(layer)]
            layer.routes += [new[layer]] if layer in new else []


class ConstantPrefix:
    """Runs the first `depth` blocks of a model separately from the rest.

    `capture` runs a forward pass without autograd up to the end of the prefix and returns the input of the next block; it
    shows the states between blocks on the way there, for prefixes that will be shorter.
    `replay` lets a forward pass skip the prefix and continue from such a tensor. What comes before the blocks still runs in
    `replay`, because later blocks need the masks; but a frozen module in evaluation mode whose output is the first block's input, as
    the embeddings' is, runs only if something else reads that output. The first replay runs it, to find it.

    The model has to call its blocks one after the other, with the hidden state as the first positional argument, and has
    to take the next hidden state from the output of a block: the tensor itself or the first element of a tuple. The
    encoders, decoders and vision models of Hugging Face do so.

    Args:
        model: A model with experts.
        depth: Number of blocks in the prefix, 0..L. The default is the model's present constant prefix.

    Raises:
        ValueError: If the depth is out of range, or the model has no experts.
    """

    def __init__(self, model: nn.Module, depth: int | None = None) -> None:
        self.blocks = blocks_of(model)
        self.depth = prefix_depth(model) if depth is None else depth
        if not 0 <= self.depth <= len(self.blocks):
            raise ValueError(f"depth must lie in 0..{len(self.blocks)}, got {self.depth}")

    @torch.no_grad()
    def capture(self, forward: Callable[[], object],
                on_the_way: Mapping[int, Callable[[Tensor], object]] = MappingProxyType({})) -> Tensor:
        """Run `forward()` to the end of the prefix and return the hidden state there, (B, T, D).

        Args:
            forward: Runs the model.
            on_the_way: Functions by number of blocks, each less than `depth`. Each is called with the hidden state
                (B, T, D) behind so many blocks as the pass goes by; it has to copy what it keeps.

        Raises:
            ValueError: If a number of blocks in `on_the_way` does not lie in 0..depth - 1.
            RuntimeError: If the forward pass does not reach the end of the prefix, or if a block does not take or return
                the hidden state as described above.
        """
        if on_the_way and not 0 <= min(on_the_way) <= max(on_the_way) < self.depth:
            raise ValueError(f"on_the_way must hold numbers of blocks below the depth {self.depth}, got {sorted(on_the_way)}")
        here = threading.get_ident()     # other threads may run the model at the same time

        def after(_: nn.Module, args: tuple[object, ...], out: object) -> None:
            if threading.get_ident() == here:
                raise _PrefixEnd(_tensor(hidden_of(out)))

        def before(_: nn.Module, args: tuple[object, ...]) -> None:
            if threading.get_ident() == here:
                raise _PrefixEnd(_tensor(*args[:1]))

        def passing(see: Callable[[Tensor], object], _: nn.Module, args: tuple[object, ...]) -> None:
            if threading.get_ident() == here:
                see(_tensor(*args[:1]))

        with ExitStack() as hooks:
            for number, see in on_the_way.items():
                hooks.callback(self.blocks[number].register_forward_pre_hook(partial(passing, see)).remove)
            last = (self.blocks[-1].register_forward_hook(after) if self.depth == len(self.blocks)
                    else self.blocks[self.depth].register_forward_pre_hook(before))
            hooks.callback(last.remove)
            try:
                forward()
            except _PrefixEnd as end:
                return end.hidden
        raise RuntimeError(f"the forward pass never reached block {self.depth + 1}; are the blocks called in order, "
                           "with the hidden state as first positional argument?")

    @contextmanager
    def replay(self, hidden: Tensor) -> Iterator[None]:
        """Let the model's forward pass skip the prefix and continue from `hidden` (B, T, D), in the calling thread.

        If blocks return more than the hidden state, as T5's blocks return position biases, it has to be the same for all
        blocks: the first block is run to get it. Otherwise the forward pass raises a RuntimeError.

        The first replay of a class of blocks runs one or two of them, to learn what they return. torch.compile traces a replay without
        a graph break. If the first replay is itself compiled, the next call is traced once more; with blocks that return more than the
        hidden state, the first one must not be compiled.
        """
        with skipping(list(self.blocks)[:self.depth], hidden):
            yield


class _PrefixEnd(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__("prefix captured")
        self.hidden = hidden


def _tensor(hidden: object = None) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise RuntimeError(f"a block's hidden state is {type(hidden).__name__}, expected a tensor; it must be the first "
                           "positional argument and the first thing that the block returns")
    return hidden
