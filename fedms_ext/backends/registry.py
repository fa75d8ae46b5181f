"""The backends in the order of preference, and the choice between them: who is chosen computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import cpu, cuda, eager, triton
from .base import Backend, Call

_backends: dict[str, Backend] = {backend.name: backend for backend in (cuda, triton, cpu, eager)}
_usable: list[Backend] = []
_forced: list[tuple[Backend]] = []
_preference: tuple[Backend | None, int] = (None, len(_backends))    # see `preference`


def register_backend(backend: Backend, *, before: str = "eager") -> None:
    """Add a backend to the list. A call is computed by the first backend in the list that supports and prefers it.

    Args:
        backend: A module or an object with the functions of `fedms_ext.Backend`. Its name must be new.
        before: Name of the backend before which it is placed.

    Raises:
        ValueError: If the name exists already, or `before` is unknown.
        TypeError: If one of the functions is missing.
    """
    missing = [name for name in ("name", "unavailable", "supports", "prefers", "forward", "backward")
               if getattr(backend, name, None) is None]
    if missing:
        raise TypeError(f"{backend!r} is no backend: it has no {', '.join(missing)}; see fedms_ext.Backend")
    if backend.name in _backends:
        raise ValueError(f"there is a backend {backend.name!r} already; choose another name")
    _check_known(before)
    ordered: dict[str, Backend] = {}
    for name, other in _backends.items():
        if name == before:
            ordered[backend.name] = backend
        ordered[name] = other
    _backends.clear()
    _backends.update(ordered)
    _find_usable()


def known() -> tuple[str, ...]:
    """Return the names of all backends, in the order of preference."""
    return tuple(_backends)


def available() -> tuple[str, ...]:
    """Return the names of the backends that can run here, in the order of preference."""
    return tuple(name for name in known() if explain(name) is None)


def explain(name: str) -> str | None:
    """Return why a backend cannot run here and what to do about it, or None if it can.

    Raises:
        ValueError: If the name is unknown.
    """
    _check_known(name)
    return _backends[name].unavailable()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let the backend with this name compute every call within the context, in all threads.

    Of nested contexts the innermost one counts. A call that the backend does not support raises a RuntimeError.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend cannot run here.
    """
    choice = (_named(name),)  # a tuple of its own: threads may leave in another order than they entered
    _forced.append(choice)
    _note_preference()
    try:
        yield
    finally:
        _forced[:] = [other for other in _forced if other is not choice]
        _note_preference()


def choose(call: Call) -> Backend:
    """Return the backend that computes a call.

    Raises:
        RuntimeError: If a backend was requested by name that does not support the call.
    """
    if _forced:
        (forced,) = _forced[-1]
        if reason := forced.supports(call):
            raise RuntimeError(f"backend {forced.name!r} was asked for by name, but it cannot compute this call: {reason}; use "
                               "another one, or none, so that one is chosen for each call")
        return forced
    for backend in _usable:
        if backend.supports(call) is None and backend.prefers(call):
            return backend
    raise AssertionError("the eager backend supports and prefers every call")


def preference() -> tuple[Backend | None, int]:
    """Return what the choice of a backend depends on besides the call.

    Returns:
        The backend that was requested by name, or None, and the number of registered backends.
    """
    return _preference


def _note_preference() -> None:
    global _preference
    _preference = _forced[-1][0] if _forced else None, len(_backends)


def cpu_is_chosen() -> bool:
    """Return whether a float32 call on the CPU that the CPU backend supports and prefers is its own: no other backend was asked
    for by name, and none that was registered stands before it."""
    if _forced:
        return _forced[-1][0] is cpu
    for backend in _usable:
        if backend is cpu:
            return True
        if backend is not cuda and backend is not triton:
            return False
    return False


def _check_known(name: str) -> None:
    if name not in _backends:
        raise ValueError(f"unknown backend {name!r}; known are: {', '.join(known())}")


def _named(name: str) -> Backend:
    if reason := explain(name):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return _backends[name]


def _find_usable() -> None:
    _usable[:] = [_backends[name] for name in available()]
    _note_preference()


_find_usable()
if os.environ.get("FEDMS_BACKEND"):
    _forced.append((_named(os.environ["FEDMS_BACKEND"]),))
    _note_preference()
