"""What a call of the operator gives to a backend, and what a backend must answer.

Names of shapes in this folder: x is (..., K) and dy (..., N); M is the number of their rows; W is (N, K); expert e of E has the
rank r_e, A_e is (r_e, K) and B_e (N, r_e).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..quantization import formats


class Scales(tuple[float, ...]):
    """The scales of the applied experts as numbers; on the way through PyTorch's dispatcher they are a tensor (E,)."""

    __slots__ = ()


class Weight(NamedTuple):
    """The frozen weight (n, k) of a call.

    Attributes:
        data: a floating weight itself, (n, k), or the `data` of a `QuantizedWeight`. In a backward pass: what the gradient of x
            is computed from, which for int8 is the transposed weight (k, n), quantized apart; None where that gradient is not
            needed.
        scale: the scale of a quantized weight; None for a floating one.
        kind: `FLOATING`, or the format of a quantized weight.
        group: values that share a scale in the 4-bit formats.
        n: output features.
        k: input features.
    """

    data: Tensor | None
    scale: Tensor | None
    kind: str
    group: int
    n: int
    k: int

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of a forward pass as (n, k) in a floating dtype."""
        if self.kind == FLOATING:
            return self.data
        return formats.dequantize(self.data, self.scale, self.kind, self.group, self.k).to(dtype)

    def expanded_for_dx(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of a backward pass as (n, k) in a floating dtype."""
        if self.kind in formats.EIGHT_BITS:     # quantized apart, and not rotated
            return formats.dequantize(self.data, self.scale, "int8", self.group, self.n).t().to(dtype)
        return self.expanded(dtype)


FLOATING = "float"


def spans(segments: Sequence[int]) -> list[slice]:
    """Return the rows of each segment."""
    return [slice(end - count, end) for count, end in zip(segments, accumulate(segments))]


class Lora(NamedTuple):
    """The LoRA branch of a call: only the experts that are applied.

    Attributes:
        a: E tensors A_e, one floating dtype for all A and B.
        b: E tensors B_e.
        scale: E numbers, or a tensor (E,).
        gate: x.shape[:-1] + (E,), or x.shape[:-1] + (1,) with segments; None means 1.
        segments: E numbers of rows that add up to M: the rows of a segment take its expert alone. An expert of rank 0 is one
            that has rows and is not applied. None: every row takes all experts.
        dropout_p: probability that a value of x is dropped in the branch.
        seed: of the dropout mask; a number, or an int64 tensor with one element on x's device, whose value may differ each time
            that a CUDA graph is replayed.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scale: Scales | Tensor
    gate: Tensor | None
    segments: Sequence[int] | None
    dropout_p: float
    seed: int | Tensor

    @property
    def ranks(self) -> list[int]:
        """The rank r_e of each expert."""
        return [a.shape[0] for a in self.a]

    @property
    def scale_numbers(self) -> Sequence[float]:
        """The scales as numbers."""
        return numbers_of(self.scale)

    @property
    def rank(self) -> int:
        """The columns of S: all ranks side by side, or with segments the largest one."""
        return sum(self.ranks) if self.segments is None else max(self.ranks)

    def spans(self) -> list[slice | None]:
        """Return the rows that take each expert: all of them (None), or one segment after the other."""
        return [None] * len(self.a) if self.segments is None else [*spans(self.segments)]

    def gate_rows(self) -> Tensor | None:
        """Return the gate as (M, E); with segments all columns are the one there is."""
        if self.gate is None:
            return None
        experts = len(self.a)
        return self.gate.reshape(-1, experts) if self.segments is None else self.gate.reshape(-1, 1).expand(-1, experts)


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for: of x, the gate, every A and every B."""

    dx: bool
    dgate: bool
    da: Sequence[bool]
    db: Sequence[bool]


class ForwardCall(NamedTuple):
    """A forward pass: y = x W^T + bias + the LoRA branch.

    Attributes:
        x: (..., K), floating.
        weight: W; a floating one has x's dtype.
        bias: (N,) or None; next to a floating weight it has x's dtype.
        lora: the branch. Next to a quantized weight it may have no expert at all.
    """

    x: Tensor
    weight: Weight
    bias: Tensor | None
    lora: Lora

    @property
    def input(self) -> Tensor:
        """What the pass reads row by row."""
        return self.x


class BackwardCall(NamedTuple):
    """A backward pass: the gradients of `ForwardCall`.

    Attributes:
        dy: (..., N), the gradient of y.
        x: (..., K), or None where no dA is needed.
        weight: W as the gradient of x needs it; see `Weight`.
        lora: the branch.
        s: what `Backend.forward` returned, or None where neither the gate's gradient nor any dB is needed.
        needs: which gradients are asked for.
    """

    dy: Tensor
    x: Tensor | None
    weight: Weight
    lora: Lora
    s: Tensor | None
    needs: Needs

    @property
    def input(self) -> Tensor:
        """What the pass reads row by row."""
        return self.dy


Call = ForwardCall | BackwardCall

# dx, dgate, [dA_e], [dB_e], with None for what is not needed; each has the dtype of what it is the gradient of.
Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]


class Backend(Protocol):
    """A way to compute the operator. A module with these names is one, and so is an object of a class.

    S is drop(x) A^T of all experts side by side, (M, sum of r_e), without scale and gate; with segments it is (M, largest r_e)
    and holds for each row what its own expert makes of it. It is kept for the backward pass, in the dtype of `s_dtype`.
    """

    name: str

    def unavailable(self) -> str | None:
        """Return why the backend cannot run on this machine and what to do about it, or None if it can."""

    def supports(self, call: Call) -> str | None:
        """Return why the backend cannot compute a call, or None if it can. Asked at every call, so only shapes, dtypes and
        devices are looked at."""

    def prefers(self, call: Call) -> bool:
        """Return whether to choose the backend for a call that it supports when nobody asked for one by name."""

    def forward(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        """Return y, (..., N) in x's dtype, and S."""

    def backward(self, call: BackwardCall) -> Gradients:
        """Return the gradients that `call.needs` asks for."""


def s_dtype(x: Tensor, lora_a: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of S: x's where x has 16 bits, and otherwise that of the experts."""
    return x.dtype if not lora_a or x.dtype in (torch.bfloat16, torch.float16) else lora_a[0].dtype


def empty_gradients(lora: Lora, needs: Needs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return where a kernel writes every dA and dB that is asked for, each like its A or B but dense."""

    def like(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        dense = torch.contiguous_format
        return [torch.empty_like(t, memory_format=dense) if n else None for t, n in zip(tensors, needed)]

    return like(lora.a, needs.da), like(lora.b, needs.db)


def dense_rows(x: Tensor, alignment: int = 1) -> Tensor:
    """Return x (..., K) as (M, K) with stride 1 along K, rows that do not overlap, and all at multiples of `alignment` bytes."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    pitch, step = rows.stride()
    dense = step == 1 and pitch >= rows.shape[1]
    aligned = alignment == 1 or (pitch * rows.element_size() % alignment == 0 and rows.data_ptr() % alignment == 0)
    return rows if dense and aligned else rows.clone(memory_format=torch.contiguous_format)


_Made = TypeVar("_Made")
_Args = ParamSpec("_Args")


def made_once(most: int) -> Callable[[Callable[_Args, _Made]], Callable[_Args, _Made]]:
    """Return a decorator that keeps what a function of hashable arguments made, at most so many results.

    It is for constants in tensors on a GPU, which nobody writes to, and is the only cache of the process that may hold tensors.
    What is made in a mode belongs to it: a tensor of inference mode cannot be saved for a backward pass, the memory of one made
    while a CUDA graph is captured is the graph's own, and below a mode of the dispatcher it may be fake. So all are made outside
    of inference mode, and none is kept that was made in one of the others.
    """

    def decorate(make: Callable[_Args, _Made]) -> Callable[_Args, _Made]:
        cache: dict[tuple[object, ...], _Made] = {}

        @wraps(make)
        def made(*args: _Args.args, **kwargs: _Args.kwargs) -> _Made:
            key = (*args, *kwargs.items())
            if key in cache:
                return cache[key]
            with torch.inference_mode(False):
                value = make(*args, **kwargs)
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if not capturing and torch._C._len_torch_dispatch_stack() == 0:
                if len(cache) >= most:
                    cache.pop(next(iter(cache)), None)
                cache[key] = value
            return value

        return made

    return decorate


@made_once(256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def numbers_of(scale: Scales | Tensor) -> Sequence[float]:
    """Return scales as numbers."""
    return scale.tolist() if isinstance(scale, Tensor) else scale


def scale_on(scale: Scales | Tensor, device: torch.device) -> Tensor:
    """Return the scales as a tensor (E,) on a device: the tensor that is there, or float32. Nobody may write to it."""
    if isinstance(scale, Tensor) and scale.device == device:
        return scale
    return _constant(tuple(numbers_of(scale)), torch.float32, device)
