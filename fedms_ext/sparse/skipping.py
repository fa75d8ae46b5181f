"""`skipping`: let a thread run a model without its first blocks. `entering`: let it change what blocks are given."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedms_ext.sparse.unread import Maker, Unread


@contextmanager
def skipping(blocks: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Let the model's forward pass skip blocks, within the context and in the calling thread.

    The module in front of them whose output is the first block's input, such as the embeddings, is skipped too, unless something else
    reads that output. The first pass finds the module.

    Args:
        blocks: The first blocks of a model, in the order in which it calls them; see `ConstantPrefix` for what they must be like.
        hidden: What the last of them is to return, (B, T, D).
    """
    _replace_forward(blocks)
    replay, outer = _Replay(blocks, hidden), _HERE.replays
    _HERE.replays = {**outer, **{block: replay for block in replay.modules()}}
    try:
        yield
    finally:
        _HERE.replays = outer
        replay.end()


@contextmanager
def entering(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let functions change the hidden state (B, T, D) that blocks are given, within the context and in the calling thread.

    A forward pre-hook does the same for all threads, but torch.compile cannot trace how one is registered.

    Args:
        changes: What returns the hidden state that a block gets instead of its argument, by block. A block that is skipped calls none.
    """
    _replace_forward(changes)
    outer = _HERE.changes
    _HERE.changes = {**outer, **changes}
    try:
        yield
    finally:
        _HERE.changes = outer


def _replace_forward(blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        if not isinstance(vars(block).get("forward"), _Skippable):
            block.forward = _Skippable(block)


def restore_forward(model: nn.Module) -> None:
    """Give every module that was skipped or entered once its own forward method again."""
    for block in model.modules():
        skippable = vars(block).get("forward")
        if isinstance(skippable, _Replaced):
            del block.forward
            if skippable.replaced is not None:
                block.forward = skippable.replaced


def hidden_of(out: Any) -> Tensor:
    """Return the hidden state (B, T, D) in what a block returns."""
    return out[0] if isinstance(out, tuple) else out


class _Replaced:
    """A module's forward method, which a thread can skip or change.

    It stays until `detach`: to put it in place and to take it away in each pass would need a lock, since other threads may run the
    model, and torch.compile could not trace it.

    Attributes:
        replaced: The forward method that the module itself had before, or None if it had that of its class.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self.replaced = block, vars(block).get("forward")

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return type(self.block).forward.__get__(self.block) if self.replaced is None else self.replaced


class _Skippable(_Replaced):
    """The forward method of a block.

    Attributes:
        maker: The module that makes the input of this block if it is the first one; None: there is none; "unknown": no pass was watched.
    """

    maker: nn.Module | None | str = "unknown"

    def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        replay = _HERE.replays.get(self.block)
        if replay is None:
            change = _HERE.changes.get(self.block)
            return self.__wrapped__(hidden if change is None else change(hidden), *args, **kwargs)
        flags = tuple(sorted((name, value) for name, value in kwargs.items() if isinstance(value, bool)))
        return replay.output(self.block, flags, hidden, lambda: self.__wrapped__(hidden, *args, **kwargs))


class _PutOff(_Replaced):
    """The forward method of the module that makes the first block's input. It runs when that is read."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        replay = _HERE.replays.get(self.block)
        # torch.compile removes what nobody reads by itself. Dropout would leave the random numbers of later layers in another place.
        if replay is None or torch.compiler.is_compiling() or self.block.training or not replay.takes_input():
            return self.__wrapped__(*args, **kwargs)
        return Unread.of(replay.hidden, lambda: self.__wrapped__(*args, **kwargs))


class _Replay:
    """The outputs of skipped blocks in one replay, in the form in which the blocks return them.

    The form (a tensor or a tuple, and what follows the hidden state) is found by running a block of each class once. If the
    tuple holds anything but None after the hidden state, the first block is run in every replay, and the other blocks are
    taken to return the same values; running the second block once verifies that.
    """

    rests: dict[object, tuple[None, ...] | str | None] = {}   # by class and flags; None: a tensor, no tuple
    checked: set[object] = set()

    def __init__(self, blocks: Sequence[nn.Module], hidden: Tensor) -> None:
        self.blocks, self.hidden, self.rest = blocks, hidden, ()
        self.has_input = False
        self.first: _Skippable | None = vars(blocks[0])["forward"] if blocks else None
        unknown = self.first is not None and self.first.maker == "unknown" and not torch.compiler.is_compiling()
        self.watch = Maker() if unknown else None

    def modules(self) -> list[nn.Module]:
        """Return what is skipped: the blocks, and the module that makes their input if it is known."""
        maker = None if self.first is None else self.first.maker
        return [*self.blocks, maker] if isinstance(maker, nn.Module) else list(self.blocks)

    def takes_input(self) -> bool:
        """Return whether no input was made for the blocks yet. A second one may be for another part of the model."""
        before, self.has_input = self.has_input, True
        return not before

    def end(self) -> None:
        """Stop watching for the module that makes the input."""
        if self.watch is not None:
            self.watch.end()
            self.watch = None

    def _found_input(self, hidden: Tensor) -> None:
        """Learn which module makes the first block's input; `hidden` is that input."""
        watch, first = self.watch, self.first
        if watch is None or first is None or torch.compiler.is_compiling():
            return
        alike = all(getattr(hidden, name) == getattr(self.hidden, name) for name in ("shape", "dtype", "device"))
        first.maker = watch.find(hidden) if alike else None
        if isinstance(first.maker, nn.Module):
            first.maker.forward = _PutOff(first.maker)
        self.end()

    def output(self, block: nn.Module, flags: object, hidden: Tensor, run: Callable[[], object]) -> object:
        """Return what a skipped block returns in place of `run()`, which runs it on its input `hidden` (B, T, D)."""
        if block is self.blocks[0]:
            self._found_input(hidden)
        form = (type(block), flags)
        known = self.rests.get(form, "unknown")
        if isinstance(known, str) and (block is self.blocks[0] or form not in self.checked):
            with torch.no_grad():
                out = run()
            self._learn(form, block, out)
            known, hidden = self.rests[form], hidden_of(out)   # so that the second block is checked on its own input
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


class _Here(threading.local):
    """What the calling thread replays and changes, by block.

    torch.compile traces the attributes of a `threading.local`, but no `ContextVar`.
    """

    def __init__(self) -> None:     # in each thread
        self.replays: Mapping[nn.Module, _Replay] = {}
        self.changes: Mapping[nn.Module, Callable[[Tensor], Tensor]] = {}


_HERE = _Here()
