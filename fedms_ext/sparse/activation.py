"""Sparsely Activated LoRA: which blocks are active, and the constant prefix below them.

The blocks of a model are numbered 1..L from the input. The *constant prefix* is the run of blocks below the first
one that holds a trained pair. Nothing in it can change, so it needs no autograd, keeps nothing for the backward
pass, and gives the same output for the same sample every time: that output can be cached.
"""
from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedms_ext.nn.expert_linear import ROUTES, ExpertLinear, PairState, Route
from fedms_ext.sparse.surgery import layers_of, block_list, expert_layers

ORDERS = ("top_down", "bottom_up", "interleaved")


def blocks_of(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The blocks of a model that experts are attached to.

    Raises:
        ValueError: if no experts are attached.
    """
    blocks = getattr(model, "fedms_blocks", None)
    if blocks is None:
        raise ValueError("no experts are attached to this model; call fedms_ext.attach first")
    return block_list(model, blocks)


def activation_order(count: int, order: str | Sequence[int]) -> list[int]:
    """The order in which blocks 1..count are activated, as block numbers.

    `top_down`: L, L-1, ..., 1. `bottom_up`: 1, 2, ..., L. `interleaved`: every second block from the top, then the
    ones between. A list of distinct block numbers is taken as it is (blocks that it leaves out are never active).

    Raises:
        ValueError: for an unknown name, or a list with a number outside 1..count or twice the same.
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
    """Sets the state of all of an expert's pairs: the first `depth` blocks of the order are trained, the following
    ones up to `applied_depth` (default `depth`) are applied but frozen, all others are off.

    Returns:
        The numbers of the trained blocks, ascending.

    Raises:
        ValueError: if not 0 <= depth <= applied_depth <= number of blocks in the order.
        RuntimeError: if the expert is merged into a weight of these blocks. No state has changed then.
    """
    ranked = activation_order(len(blocks_of(model)), order)
    applied_depth = depth if applied_depth is None else applied_depth
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
    """Turns all of an expert's pairs off."""
    activate(model, expert, depth=0)


def prefix_depth(model: nn.Module) -> int:
    """Number of blocks in the constant prefix: those below the first one with a trained pair, or with a pair that
    a gate weighs (0: none; L: all)."""
    live = [layer.block for layer in expert_layers(model).values()
            if layer.gate is not None or PairState.TRAINED in layer.states.values()]
    return min(live) - 1 if live else len(blocks_of(model))


def prefix_hash(model: nn.Module, depth: int) -> str:
    """SHA-256 over the applied and the merged pairs inside the first `depth` blocks, whatever their experts' names:
    with the model's and the data's fingerprints it names what the prefix computes."""
    digest = hashlib.sha256()
    for name, layer in expert_layers(model).items():
        if layer.block <= depth:
            merged = [] if layer.merged is None else [layer.merged[0]]
            for way, experts in (("applied", layer.applied), ("merged", merged)):
                for expert in experts:
                    lora = layer.experts[expert]
                    digest.update(f"{name}/{way}/{lora.scale!r}/{lora.rank}".encode())
                    for pair in (layer.lora_a[expert], layer.lora_b[expert]):
                        digest.update(pair.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def gated(layers: Mapping[str, ExpertLinear] | Sequence[ExpertLinear], gate: Tensor) -> Iterator[None]:
    """Within the context each sample of a batch, in this thread, weighs the experts of the given layers by its row of `gate`
    (B, E), E counting all experts of a layer in their order. Differentiable with respect to `gate`."""
    with _routed(layers, gate=gate):
        yield


@contextmanager
def segmented(layers: Mapping[str, ExpertLinear] | Sequence[ExpertLinear], segments: Sequence[int]) -> Iterator[None]:
    """Within the context the samples of a batch, in this thread, take one expert each in the given layers: the first segments[0] of them
    a layer's first expert, the next segments[1] its second, and so on, E numbers in the order of its experts. So the
    streams of a mixture run as one batch through one frozen product."""
    with _routed(layers, segments=segments):
        yield


@contextmanager
def _routed(layers: Mapping[str, ExpertLinear] | Sequence[ExpertLinear], **change: Any) -> Iterator[None]:
    chosen = list(layers.values()) if isinstance(layers, Mapping) else list(layers)
    outer = ROUTES.get()
    changed: dict[nn.Module, Route] = {layer: replace(outer.get(layer, Route()), **change) for layer in chosen}
    inner = {**outer, **changed}
    token = ROUTES.set(inner)
    _exchange(outer, inner)
    try:
        yield
    finally:
        ROUTES.reset(token)
        _exchange(inner, outer)


def _exchange(old: Mapping[Any, Route], new: Mapping[Any, Route]) -> None:
    """Puts the layers' new routes in the place of the old ones of this thread; a layer in one of the two alone gains or
    loses one."""
    for layer in {*old, *new}:
        if old.get(layer) is not new.get(layer):
            layer.routes = [route for route in layer.routes if route is not old.get(layer)]
            layer.routes += [new[layer]] if layer in new else []


class ConstantPrefix:
    """The first `depth` blocks of a model, run apart from the rest.

    `capture` runs a forward pass up to the prefix's end without autograd and returns what enters the next block;
    `replay` lets a forward pass start from such a tensor, skipping the prefix. Works for any model whose forward
    calls its blocks one after the other with the hidden state as first positional argument and takes the hidden
    state from what they return (the tensor itself, or the first element of a tuple), as Hugging Face's encoders,
    decoders and vision models do. What comes before the blocks (embeddings, masks) still runs in `replay`, since
    the later blocks need its masks.

    Args:
        model: a model that experts are attached to.
        depth: number of leading blocks, 0..L; default: the model's constant prefix now.
    """

    def __init__(self, model: nn.Module, depth: int | None = None) -> None:
        self.blocks = blocks_of(model)
        self.depth = prefix_depth(model) if depth is None else depth
        if not 0 <= self.depth <= len(self.blocks):
            raise ValueError(f"depth must lie in 0..{len(self.blocks)}, got {self.depth}")

    @torch.no_grad()
    def capture(self, forward: Callable[[], object]) -> Tensor:
        """Runs `forward()` until the prefix ends; returns the hidden state there, (B, T, D).

        Raises:
            RuntimeError: if the forward pass ends without reaching the end of the prefix, or the hidden state is not
                where it should be.
        """
        here = threading.get_ident()     # other threads run the model on

        def after(_: nn.Module, args: tuple[object, ...], out: object) -> None:
            if threading.get_ident() == here:
                _stop(_hidden(out))

        def before(_: nn.Module, args: tuple[object, ...]) -> None:
            if threading.get_ident() == here:
                _stop(*args[:1])

        if self.depth == len(self.blocks):
            handle = self.blocks[-1].register_forward_hook(after)
        else:
            handle = self.blocks[self.depth].register_forward_pre_hook(before)
        try:
            forward()
        except _PrefixEnd as end:
            return end.hidden
        finally:
            handle.remove()
        raise RuntimeError(f"the forward pass never reached block {self.depth + 1}; are the blocks called in order, "
                           "with the hidden state as first positional argument?")

    @contextmanager
    def replay(self, hidden: Tensor) -> Iterator[None]:
        """Within the context the model's forward, in this thread, skips the prefix and goes on from `hidden` (B, T, D).

        What blocks return besides the hidden state has to be the same for all of them, as T5's position biases are: the
        first block is run for it. RuntimeError in the forward pass if it is not.
        """
        skipped = list(self.blocks)[:self.depth]
        replay = _Replay(skipped, hidden)
        token = _REPLAYS.set({**_REPLAYS.get(), **{block: replay for block in skipped}})
        for block in skipped:
            _Skip.enter(block)
        try:
            yield
        finally:
            _REPLAYS.reset(token)
            for block in skipped:
                _Skip.leave(block)


class _PrefixEnd(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__("prefix captured")
        self.hidden = hidden


def _stop(hidden: object = None) -> None:
    if not isinstance(hidden, Tensor):
        raise RuntimeError(f"a block's hidden state is {type(hidden).__name__}, expected a tensor; it must be the first "
                           "positional argument and the first thing that the block returns")
    raise _PrefixEnd(hidden)


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class _Skip:
    """Stands in for a block's forward while threads replay a prefix; in the others the block runs as it is."""

    lock = threading.Lock()

    def __init__(self, block: nn.Module) -> None:
        self.block, self.replaced, self.users = block, vars(block).get("forward"), 0

    @classmethod
    def enter(cls, block: nn.Module) -> None:
        with cls.lock:
            skip = vars(block).get("forward")
            if not isinstance(skip, cls):
                block.forward = skip = cls(block)
            skip.users += 1

    @classmethod
    def leave(cls, block: nn.Module) -> None:
        with cls.lock:
            skip: Any = block.forward
            skip.users -= 1
            if skip.users == 0:
                del block.forward
                if skip.replaced is not None:
                    block.forward = skip.replaced

    def run(self, *args: object, **kwargs: object) -> object:
        return type(self.block).forward(self.block, *args, **kwargs) if self.replaced is None else self.replaced(*args, **kwargs)

    def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        replay = _REPLAYS.get().get(self.block)
        if replay is None:
            return self.run(hidden, *args, **kwargs)
        flags = tuple(sorted((name, value) for name, value in kwargs.items() if isinstance(value, bool)))
        return replay.output(self.block, flags, hidden, lambda: self.run(hidden, *args, **kwargs))


class _Replay:
    """One thread's replay: what the skipped blocks return, in their own form.

    Whether blocks of a class return a tuple, and what comes after the hidden state, is learned by running one. Where there
    is more than None, the first block is run at every replay, and its rest is what the others return too; that they would
    is checked once, by running the second one.
    """

    rests: dict[object, tuple[None, ...] | str | None] = {}   # by class and flags; None: a tensor, no tuple
    checked: set[object] = set()

    def __init__(self, blocks: Sequence[nn.Module], hidden: Tensor) -> None:
        self.blocks, self.hidden, self.rest = blocks, hidden, ()

    @torch.no_grad()
    def output(self, block: nn.Module, flags: object, hidden: Tensor, run: Callable[[], object]) -> object:
        form = (type(block), flags)
        known = self.rests.get(form, "unknown")
        if isinstance(known, str) and (block is self.blocks[0] or form not in self.checked):
            out = run()
            self._learn(form, block, out)
            known, hidden = self.rests[form], _hidden(out)     # so that the second block is checked on its own input
        hidden = self.hidden if block is self.blocks[-1] else hidden
        return hidden if known is None else (hidden, *(self.rest if isinstance(known, str) else known))

    def _learn(self, form: tuple[type, object], block: nn.Module, out: object) -> None:
        rest = out[1:] if isinstance(out, tuple) else None
        if rest is None or all(value is None for value in rest):
            self.rests[form] = rest
            return
        self.rests[form] = "carried"
        if block is self.blocks[0]:
            self.rest = rest
            return
        mine, other = tree_leaves(rest), tree_leaves(self.rest)
        if len(mine) != len(other) or not all(_same(a, b) for a, b in zip(mine, other)):
            raise RuntimeError(f"{form[0].__name__} returns values of its own besides the hidden state (attention weights, a "
                               "cache), which a skipped block cannot; turn these outputs off, or replay no prefix (depth=0)")
        self.checked.add(form)


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


_REPLAYS: ContextVar[Mapping[nn.Module, _Replay]] = ContextVar("fedms_replays", default={})
