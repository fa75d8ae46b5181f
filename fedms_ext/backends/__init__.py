"""Ways of running the operators, and the choice between them.

A backend is a module with the functions `forward` and `backward` of `eager.py`, `supports(x)`, which says whether
it can run on a tensor, and `unavailable()`, which returns None or the reason why it cannot run here at all.
The first one that is available and supports the tensor is used; the environment variable FEDMS_BACKEND or
`use_backend` name one instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from . import cpu, cuda, eager, fastest, triton
from .base import Lora

# In the order of preference. `cuda` stands last, behind the one that takes everything: only by name, or through
# `measured`, which is available once a GPU has passed its tests.
_BACKENDS: dict[str, ModuleType] = {
    "measured": fastest, "triton": triton, "cpu": cpu, "eager": eager, "cuda": cuda,
}  # fmt: skip


def _named(name: str) -> ModuleType:
    if reason := explain(name):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return _BACKENDS[name]


def known() -> tuple[str, ...]:
    """The names of all backends, in the order of preference."""
    return tuple(_BACKENDS)


def available() -> tuple[str, ...]:
    """The names of the backends that can run here, in the order of preference."""
    return tuple(name for name in known() if explain(name) is None)


def explain(name: str) -> str | None:
    """Why the backend cannot run here and what to do, or None if it can. Unknown names are a ValueError."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are: {', '.join(known())}")
    return _BACKENDS[name].unavailable()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, every operator runs on the backend of that name, in all threads; of several, the last one entered counts.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot run here.
    """
    choice = (_named(name),)  # a tuple of its own: threads may leave in another order than they entered
    _forced.append(choice)
    try:
        yield
    finally:
        _forced[:] = [other for other in _forced if other is not choice]


def choose(x: Tensor) -> ModuleType:
    """The backend for an operator whose input is `x`."""
    if _forced:
        (forced,) = _forced[-1]
        if not forced.supports(x):
            name = forced.__name__.rpartition(".")[2]
            raise RuntimeError(
                f"backend {name!r} was asked for by name, but it does not take {x.dtype} on {x.device}; "
                "use another one, or none, so that one is chosen for the tensor"
            )
        return forced
    for backend in _usable:
        if backend.supports(x):
            return backend
    raise AssertionError("the eager backend supports every tensor")


def cpu_is_chosen() -> bool:
    """Whether `choose` gives the CPU backend for a float32 tensor on the CPU, which no other of the usable ones takes."""
    return not _forced or _forced[-1][0] is cpu


def serving(x: Tensor, lora: Lora, kind: str | None, backward: bool) -> str:
    """The name of the backend that `choose` gives, or eager where the CPU backend hands the call on. `kind`: of the frozen
    weight, None for a floating one."""
    chosen = choose(x)
    if chosen is cpu and not cpu.serves(x, lora, kind, backward):
        chosen = eager
    return next(name for name, backend in _BACKENDS.items() if backend is chosen)


_usable = [_BACKENDS[name] for name in available()]
_forced: list[tuple[ModuleType]] = [(_named(os.environ["FEDMS_BACKEND"]),)] if os.environ.get("FEDMS_BACKEND") else []
