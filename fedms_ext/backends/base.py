"""What a call of an operator gives to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor


def spans(segments: Sequence[int]) -> list[slice]:
    """The rows of each segment."""
    return [slice(end - count, end) for count, end in zip(segments, accumulate(segments))]


class Scales(tuple[float, ...]):
    """The scales of the applied experts as numbers; on the way through PyTorch's dispatcher they are a tensor (E,)."""

    __slots__ = ()


def plain_numbers(scale: Scales | Tensor) -> Sequence[float]:
    return scale.tolist() if isinstance(scale, Tensor) else scale


class Lora(NamedTuple):
    """The LoRA branch of a layer (N, K) with x of (..., K) and M rows in all; only the experts that are applied.

    a[e] is (r_e, K), b[e] (N, r_e), scale (E,), gate x.shape[:-1] + (E,) or None. `dropout_p` and `seed`: of the mask on x.

    With `segments`, E numbers of rows that add up to M, the rows of a segment take its expert alone, and the gate is
    x.shape[:-1] + (1,). An expert of rank 0 is one that is not applied, where it has rows.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scale: Scales | Tensor
    gate: Tensor | None
    segments: Sequence[int] | None
    dropout_p: float
    seed: int

    @property
    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.a]

    @property
    def factors(self) -> Sequence[float]:
        """The scales as numbers."""
        return plain_numbers(self.scale)

    @property
    def rank(self) -> int:
        """The columns of s: all ranks side by side, or in segments the largest."""
        return sum(self.ranks) if self.segments is None else max(self.ranks)

    def spans(self) -> list[slice | None]:
        """The rows that take each expert: all of them (None), or one segment after the other."""
        return [None] * len(self.a) if self.segments is None else [*spans(self.segments)]

    def gate_rows(self) -> Tensor | None:
        """The gate as (M, E); in segments all columns are the one there is."""
        if self.gate is None:
            return None
        experts = len(self.a)
        return self.gate.reshape(-1, experts) if self.segments is None else self.gate.reshape(-1, 1).expand(-1, experts)


class Frozen(NamedTuple):
    """The data and the scale of a QuantizedWeight that stands for (n, k); in a backward pass what its `for_dx` gave,
    None where dx is not needed."""

    data: Tensor | None
    scale: Tensor | None
    kind: str
    group: int
    n: int
    k: int


class Needs(NamedTuple):
    """Which gradients are asked for: of x, the gate, every A and every B."""

    dx: bool
    dgate: bool
    da: Sequence[bool]
    db: Sequence[bool]


# dx, dgate, [dA_e], [dB_e], with None for what is not needed.
Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]


def empty_gradients(lora: Lora, needs: Needs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Where a kernel writes every dA and dB that is asked for."""

    def like(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        dense = torch.contiguous_format
        return [torch.empty_like(t, memory_format=dense) if n else None for t, n in zip(tensors, needed)]

    return like(lora.a, needs.da), like(lora.b, needs.db)


def dense_rows(x: Tensor, alignment: int = 1) -> Tensor:
    """x (..., K) as (M, K) with stride 1 along K, rows that do not overlap, and all at multiples of `alignment` bytes."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    pitch, step = rows.stride()
    dense = step == 1 and pitch >= rows.shape[1]
    aligned = alignment == 1 or (pitch * rows.element_size() % alignment == 0 and rows.data_ptr() % alignment == 0)
    return rows if dense and aligned else rows.clone(memory_format=torch.contiguous_format)


_Made = TypeVar("_Made")
_Args = ParamSpec("_Args")


def made_once(most: int) -> Callable[[Callable[_Args, _Made]], Callable[_Args, _Made]]:
    """A decorator that keeps what a function of hashable arguments made: constants in tensors on a GPU, which nobody writes
    to. The only cache of the process that may hold tensors.

    What is born in a mode belongs to it: a tensor of inference mode cannot be saved for a backward pass, the memory of one
    made while a CUDA graph is captured is the graph's own, and below a mode of the dispatcher it may be fake. So all are
    made outside of inference mode, and none is kept that was made in one of the others.
    """

    def decorate(make: Callable[_Args, _Made]) -> Callable[_Args, _Made]:
        kept: dict[tuple[object, ...], _Made] = {}

        @wraps(make)
        def made(*args: _Args.args, **kwargs: _Args.kwargs) -> _Made:
            key = (*args, *kwargs.items())
            if key in kept:
                return kept[key]
            with torch.inference_mode(False):
                value = make(*args, **kwargs)
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if not capturing and torch._C._len_torch_dispatch_stack() == 0:
                if len(kept) >= most:
                    kept.pop(next(iter(kept)), None)
                kept[key] = value
            return value

        return made

    return decorate


@made_once(256)
def numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that nobody writes to."""
    return torch.tensor(values, dtype=dtype, device=device)


def scale_on(scale: Scales | Tensor, device: torch.device) -> Tensor:
    """The scales (E,) on a device: the tensor that is there, or float32."""
    if isinstance(scale, Tensor) and scale.device == device:
        return scale
    return numbers(tuple(plain_numbers(scale)), torch.float32, device)
