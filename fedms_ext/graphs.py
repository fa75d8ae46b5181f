"""CUDA graphs, with gradients, of a computation whose shapes repeat.

In eager mode the CPU launches each kernel of a pass separately, which takes longer than the kernels of a small layer. A CUDA graph
is launched as a whole. It always reads and writes the memory with which it was captured, so inputs are copied to that memory
before a replay, and outputs from it after the replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .backends import device as devices
from .nn.seeds import seeds_on_device
from .operators.dispatch import is_transformed

Step = Callable[..., Tensor]
Key = tuple[object, ...]


def graphed(step: Step, parameters: Iterable[Tensor] = (), *, most: int = 8) -> Graphed:
    """Let a step replay a CUDA graph if its inputs are on a GPU and their shapes have occurred before::

        loss_of = fedms_ext.graphed(lambda x, y: F.cross_entropy(model(x), y), model.parameters())
        for x, y in batches:
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()

    The first call with a shape runs the step. The second call captures the forward pass and, if gradients are needed, the backward
    pass; this call and all later ones replay the graph. The results are bit for bit those of the step: everything that is chosen by
    measurement is chosen before the capture, and a replay uses the random numbers that the step would have drawn at that time. The
    layers of this package draw their dropout seeds on the GPU, even in calls that run the step. On a CPU, inside `torch.compile`, in
    a transform of `torch.func` and during the capture of another graph, a call always runs the step.

    A replay repeats kernels, not Python code. The step must run the same kernels for all values of its inputs, must not wait for the
    GPU (`.item()`, `.cpu()`), and must read everything that changes between calls from its arguments or from tensors that keep their
    memory, such as parameters that an optimizer updates.

    Args:
        step: A function of positional arguments that returns one tensor. Each argument is a tensor, None, or a tuple, list or
            dictionary of these.
        parameters: Other tensors that get gradients. If one of them moves to other memory, or `requires_grad` of one changes, the
            step is captured again.
        most: Largest number of graphs that are kept. The least recently used graph is dropped first. Each graph has its own memory
            for the tensors that its passes create.

    Returns:
        A callable with the arguments and the result of `step`.

    Raises:
        ValueError: If `most` is less than 1.
    """
    return Graphed(step, parameters, most)


class CaptureError(RuntimeError):
    """A step does what a CUDA graph cannot hold."""


class Graphed:
    """A step that replays CUDA graphs; see `graphed`.

    Attributes:
        captures: The graphs by shape, the most recently used one last.
    """

    def __init__(self, step: Step, parameters: Iterable[Tensor], most: int) -> None:
        if most < 1:
            raise ValueError(f"most is {most}, expected at least 1 graph")
        self.step, self.parameters, self.most = step, tuple(parameters), most
        self.captures: OrderedDict[Key, _Capture] = OrderedDict()
        self._met: set[Key] = set()

    def __call__(self, *arguments: Any) -> Tensor:
        """Run the step, or replay its graph.

        Raises:
            CaptureError: If the step does what cannot be captured.
            RuntimeError: In the backward pass, if the same graph was replayed after the forward pass, so that the tensors that the
                backward pass needs were overwritten.
        """
        inputs, form = tree_flatten(arguments)
        if not _fits(inputs):
            return self.step(*arguments)
        wanted = [p for p in self.parameters if p.requires_grad] if torch.is_grad_enabled() else []
        key = (torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), form, *map(_shape, inputs), *[p.data_ptr() for p in wanted])
        if key not in self._met:
            self._met.add(key)
            with seeds_on_device():
                return self.step(*arguments)
        if key not in self.captures:
            while len(self.captures) >= self.most:
                self.captures.popitem(last=False)
            self.captures[key] = _Capture(self.step, inputs, form, wanted)
        self.captures.move_to_end(key)
        return _Replay.apply(self.captures[key], len(inputs), *inputs, *wanted)


def _shape(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


def _fits(inputs: Sequence[Tensor | None]) -> bool:
    """Return whether a graph can be used: all inputs are on one GPU, and no graph is being captured there."""
    found = {t.device for t in inputs if t is not None}
    if torch.compiler.is_compiling() or len(found) != 1 or is_transformed():
        return False
    (device,) = found
    return devices.is_real(device) and not devices.is_capturing(device)


class _Capture:
    """The graphs of a forward pass and its backward pass, and the memory that they read and write.

    Attributes:
        turn: Number of replays of the forward pass.
    """

    def __init__(self, step: Step, inputs: Sequence[Tensor | None], form: TreeSpec, parameters: Sequence[Tensor]) -> None:
        self.inputs = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        self.wanted = [t for t in (*self.inputs, *parameters) if t is not None and t.requires_grad]
        self.turn = 0
        (device,) = {t.device for t in inputs if t is not None}
        # The warm-up and the capture must not advance the random number generators.
        arguments = tree_unflatten(self.inputs, form)
        with devices.guard(device), seeds_on_device(), torch.random.fork_rng([device]):
            self._warm_up(step, arguments, device)
            try:
                self._capture(step, arguments)
            except RuntimeError as error:
                raise CaptureError(f"this step cannot be captured as a CUDA graph: {error}; a step must not wait for the GPU, nor copy "
                                   "from the CPU's memory") from error

    def _capture(self, step: Step, arguments: Sequence[Any]) -> None:
        pool = torch.cuda.graph_pool_handle()
        self.forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool):
            out = step(*arguments)
        self.out = out.detach()
        self.differentiable = out.requires_grad
        if self.differentiable:
            self.dy = torch.empty_like(self.out)
            self.backward = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.backward, pool=pool):
                self.gradients = _Gradients(self._gradients(out, self.dy))

    def _warm_up(self, step: Step, arguments: Sequence[Any], device: torch.device) -> None:
        """Run both passes once on another stream, as PyTorch requires, to initialize libraries, fill caches and measure choices."""
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = step(*arguments)
            if out.requires_grad:
                self._gradients(out, torch.zeros_like(out))
        current.wait_stream(stream)

    def _gradients(self, out: Tensor, dy: Tensor) -> list[Tensor | None]:
        return [None if g is None else g.detach() for g in torch.autograd.grad(out, self.wanted, dy, allow_unused=True)]

    def fill(self, inputs: Sequence[Tensor | None]) -> None:
        """Copy inputs to the memory that the graph reads."""
        with torch.no_grad():
            torch._foreach_copy_([t for t in self.inputs if t is not None], [t for t in inputs if t is not None])


class _Gradients:
    """The gradients that a graph computes, one behind the other in memory, so that one copy takes all of them.

    Args:
        gradients: Of each tensor, or None.
    """

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self.shapes = [None if g is None else g.shape for g in gradients]
        self.places: dict[torch.dtype, list[int]] = {}
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                self.places.setdefault(gradient.dtype, []).append(place)
        self.flat = {dtype: torch.cat([gradients[place].flatten() for place in places]) for dtype, places in self.places.items()}

    def copies(self) -> list[Tensor | None]:
        """Return copies, which the next replay leaves alone."""
        found: list[Tensor | None] = [None] * len(self.shapes)
        for dtype, places in self.places.items():
            shapes = [self.shapes[place] for place in places]
            parts = self.flat[dtype].clone().split([shape.numel() for shape in shapes])
            for place, part, shape in zip(places, parts, shapes):
                found[place] = part.view(shape)
        return found


class _Replay(torch.autograd.Function):
    """Replays the graphs of a capture."""

    @staticmethod
    def forward(ctx: Any, capture: _Capture, count: int, *tensors: Tensor | None) -> Tensor:
        capture.fill(tensors[:count])
        capture.forward.replay()
        capture.turn += 1
        ctx.capture, ctx.turn = capture, capture.turn
        ctx.asks = [t is not None and t.requires_grad for t in tensors]
        out = capture.out.clone()
        if not capture.differentiable:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        capture: _Capture = ctx.capture
        if ctx.turn != capture.turn:
            raise RuntimeError("the graph of this step was replayed again before this backward pass, which overwrote what it needs; "
                               "run the backward pass of a step before the next call of it")
        capture.dy.copy_(dy)
        capture.backward.replay()
        found = iter(capture.gradients.copies())
        return None, None, *[next(found) if asks else None for asks in ctx.asks]
