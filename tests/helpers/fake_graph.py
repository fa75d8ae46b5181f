"""CUDA graphs on the GPU that is not there: `FakeGraphs`, within `fake_device.FakeCuda`.

A capture keeps every operator with the very tensors that it read and made, and then fills what it made with NaN: on a GPU a
capture computes nothing. A replay runs the operators again and writes their results into those tensors. So it reads and writes
the memory that it was captured with, as a CUDA graph does, and no Python is run. What waits for the GPU is an error in a capture.
"""
from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class FakeGraphs:
    """Within the context `torch.cuda` captures and replays.

    Attributes:
        captured: Number of graphs.
        replays: Number of their replays.
    """

    def __init__(self) -> None:
        self.captured = self.replays = 0
        self.capturing: _Graph | None = None
        self._stack = ExitStack()

    def __enter__(self) -> FakeGraphs:
        self._stack.enter_context(mock.patch.multiple(
            torch.cuda, create=True, CUDAGraph=type("CUDAGraph", (_Graph,), {"graphs": self}), graph=self._capture,
            graph_pool_handle=lambda: (0, 1), Stream=_Stream, current_stream=_Stream, stream=lambda stream: nullcontext(),
            is_current_stream_capturing=lambda: self.capturing is not None, device=lambda index: nullcontext()))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def _capture(self, graph: _Graph, pool: Any = None):
        assert self.capturing is None
        self.captured += 1
        self.capturing = graph
        try:
            with _Recorder(graph):
                yield
        finally:
            self.capturing = None
        graph.poison()


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        """All is done already."""


class _Graph:
    graphs: FakeGraphs

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []    # operator, arguments, and the new tensors that it made

    @torch.no_grad()
    def poison(self) -> None:
        for *_, made in self.calls:
            for tensor in made:
                tensor.data.fill_(float("nan") if tensor.is_floating_point() else 1)

    @torch.no_grad()
    def replay(self) -> None:
        assert self.graphs.capturing is None
        self.graphs.replays += 1
        for func, args, kwargs, made in self.calls:
            for old, new in zip(made, _made(func(*args, **kwargs), args, kwargs), strict=True):
                old.data.copy_(new)       # `data`: a graph is not seen by autograd


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, _made(out, args, kwargs)))
        return out


def _made(out: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors of a result that are no views of an argument."""
    read = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in read]
