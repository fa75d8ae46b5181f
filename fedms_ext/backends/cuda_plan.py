"""Plans: the forward and backward pass of a layer on the CUDA kernels, one C++ call each, prepared once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import device as devices
from .autotune import Choices
from .base import Lora, Weight, made_once

_kernels: Any = devices.cuda_kernels()

# The error of a pass for a tensor that the kernels cannot read in place. It is a ValueError.
Declined: type[ValueError] = _kernels.Declined if _kernels is not None else ValueError

# Smallest number of output columns for which the shrink overlaps the GEMM, if nothing was measured, and from which it is never
# inside the GEMM.
_WIDE = 2048


class Shape(NamedTuple):
    """The properties of a call that a plan depends on. The module `base` explains the names of sizes.

    Attributes:
        device: Device of all tensors.
        dtype: Dtype of x, y and dy: bf16 or fp16.
        fp32_experts: Whether A and B are float32; otherwise they have `dtype`.
        int8: Whether the weight is int8.
        has_dropout: Whether the LoRA branch has dropout.
        m, n, k: Number of rows, output features and input features.
        ranks: Rank of each expert.
        segments: Number of rows of each expert, or None if every row uses all experts.
    """

    device: torch.device
    dtype: torch.dtype
    fp32_experts: bool
    int8: bool
    has_dropout: bool
    m: int
    n: int
    k: int
    ranks: tuple[int, ...]
    segments: tuple[int, ...] | None


def shape_of(x: Tensor, weight: Weight, lora: Lora) -> Shape:
    """Return the shape of a call. `x` is its input: x (..., K) of a forward pass, dy (..., N) of a backward pass."""
    segments = None if lora.segments is None else tuple(lora.segments)
    return Shape(
        x.device, x.dtype, lora.a[0].dtype == torch.float32, weight.scale is not None, lora.dropout_p > 0,
        x.shape[:-1].numel(), weight.n, weight.k, tuple(lora.ranks), segments,
    )  # fmt: skip


class Plan:
    """The forward and backward pass for all calls of one shape: workspace sizes, tensor maps and configurations of the two GEMMs.

    The configurations are chosen by measurement at the first call on a GPU. The tensor maps of a plan that belongs to one layer
    are reused from call to call. A plan that several layers share makes them again when their addresses change, which takes
    microseconds.

    Attributes:
        shape: The shape of all calls.
        rank: Number of columns of S.
        room_size: Size of the buffer `room`, in values of the dtype of x: T, the experts side by side, and S. The forward pass
            fills it. A backward pass that is given the filled buffer does not compute them again. A pass that is given none uses
            one that lasts as long as the call.
        s_at: Index of the first value of S in the room, where a forward pass writes S if it is given no tensor for it.
        reads_expert_in_place: Whether the kernels read the only expert without a copy, so that its rows have to begin at multiples
            of 16 bytes.
        forward: Writes y and S, and fills the room. Takes the arguments of `_C.cuda.Plan.forward`, in order; x is (M, K), or
            (..., K) if dense. Raises `Declined` if the kernels cannot read a tensor in place.
        backward: Writes the gradients. Takes the arguments of `_C.cuda.Plan.backward`, in order; dy is (M, N), or (..., N) if
            dense. The last four are the gradients of x, of the gate, of every A and of every B, None for those that are not
            needed. Raises `Declined` if the kernels cannot read a tensor in place.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        owner = [e for e, rank in enumerate(shape.ranks) for _ in range(rank)]
        self._kernels = _kernels.Plan(
            bf16=shape.dtype == torch.bfloat16, fp32_experts=shape.fp32_experts, int8=shape.int8, m=shape.m, n=shape.n, k=shape.k,
            ranks=list(shape.ranks), rows=list(shape.segments or ()), chip=chip_of(shape.device),
            owner=torch.tensor(owner, dtype=torch.int32, device=shape.device),
        )  # fmt: skip
        self.rank: int = self._kernels.rank
        self.room_size: int = self._kernels.room_size
        self.s_at: int = self._kernels.s_at
        self.reads_expert_in_place: bool = self._kernels.reads_expert_in_place
        self.forward: Callable[..., None] = self._first_forward
        self.backward: Callable[..., None] = self._first_backward

    def _first_forward(self, *args: Any) -> None:
        """Choose how the GEMM runs. When that is final, `forward` is the C++ function itself."""
        y, s, room = args[-3:]
        written = [y, room[self.s_at :] if s is None and room is not None else s]
        if self._choose_forward(lambda: self._kernels.forward(*args), written):
            self.forward = self._kernels.forward
        self._kernels.forward(*args)

    def _first_backward(self, *args: Any) -> None:
        """Choose how a pass with dx runs. When that is final, `backward` is the C++ function itself."""
        if args[-4] is not None and self._choose_dx(lambda: self._kernels.backward(*args), *args[-4:]):
            self.backward = self._kernels.backward
        self._kernels.backward(*args)

    def _choose_forward(self, run: Callable[[], None], written: list[Tensor | None]) -> bool:
        # In a forward pass dropout affects only S.
        return self._choose(
            "forward", self.shape.n, self.shape.k, False, True, run, written,
            lambda config: self._kernels.choose_forward(config.tile, config.shrink),
        )  # fmt: skip

    def _choose_dx(
        self, run: Callable[[], None], dx: Tensor, dgate: Tensor | None, da: list[Tensor | None], db: list[Tensor | None]
    ) -> bool:
        shape = self.shape
        # The GEMM that computes dS computes parts of dA and dB too.
        asked = all(any(each is not None for each in gradients) for gradients in (da, db))
        fits = _kernels.narrow_backward_parts(chip_of(shape.device), shape.m, shape.n, shape.k, self.rank) > 0
        return self._choose(
            "dx", shape.k, shape.n, shape.has_dropout, asked and fits and shape.segments is None, run, [dx, dgate, *da, *db],
            lambda config: self._kernels.choose_dx(config.tile, config.shrink),
        )  # fmt: skip

    def _choose(
        self, name: str, n: int, k: int, has_dropout: bool, may_be_inside: bool, run: Callable[[], None],
        written: list[Tensor | None], take: Callable[[GemmConfig], None],
    ) -> bool:  # fmt: skip
        """Set the fastest configuration of a GEMM (M, N) with the reduction K, and return whether it is final.

        `may_be_inside` tells whether the GEMM can compute S, or dS, itself. `run` computes the pass and writes the tensors
        `written`. A configuration whose results differ from those of the first one,
        which the cost model expects to be the fastest, is not taken.

        Numbers of rows are rounded up to a power of two. A shape that first occurs while a CUDA graph is captured is measured at
        its next call.
        """
        shape = self.shape
        m = 1 << (shape.m - 1).bit_length()
        full_tiles = all(rows == 0 or rows >= 128 for rows in shape.segments or ())
        # A shrink that overlaps the GEMM, or is in it, supports neither dropout nor an int8 W.
        plain = not (shape.has_dropout or shape.int8)
        may_be_inside = may_be_inside and plain and n < _WIDE
        key = (name, str(shape.dtype), m, n, k, self.rank, shape.int8, has_dropout, plain, may_be_inside, shape.fp32_experts,
               shape.segments is not None, full_tiles)  # fmt: skip

        def ways() -> dict[str, GemmConfig]:
            chip = chip_of(shape.device)
            configs = gemm_configs(chip, m, n, k, self.rank, shape.int8, has_dropout, full_tiles, plain, may_be_inside)
            return {str(config): config for config in configs}

        def run_with(config: GemmConfig) -> None:
            take(config)
            run()

        def result_with(config: GemmConfig) -> list[Tensor]:
            tensors = [tensor.fill_(float("nan")) for tensor in written if tensor is not None]
            run_with(config)
            return tensors

        take(choices(devices.properties(shape.device).capability).choose(shape.device, key, ways, run_with, result_with))
        return not devices.is_capturing(shape.device)


@made_once(1024)
def shared_plan(shape: Shape) -> Plan:
    """Return the plan for calls of a shape that do not come from a layer with its own plans."""
    return Plan(shape)


@lru_cache(maxsize=None)
def chip_of(device: torch.device) -> Any:
    """Return the C++ object that describes a GPU."""
    properties = devices.properties(device)
    major, minor = properties.capability
    return _kernels.DeviceProperties(10 * major + minor, properties.multiprocessors, properties.shared_memory)


@lru_cache(maxsize=None)
def choices(capability: tuple[int, int]) -> Choices[GemmConfig]:
    """Return the file that stores the fastest configurations for GPUs of a compute capability."""
    major, minor = capability
    return Choices(f"cuda-gemm-sm{major}{minor}-{devices.build_id()[:16]}.json")


class GemmConfig(NamedTuple):
    """A configuration of the GEMM.

    Attributes:
        tile: Number of the tile.
        shrink: Where S, or dS in a backward pass, is computed. "apart": by a kernel before the GEMM. "overlapped": by a kernel that
            runs on some multiprocessors while the GEMM starts on the others (programmatic dependent launch). "inside": by the GEMM
            itself, tile by tile.
    """

    tile: int
    shrink: str

    def __str__(self) -> str:
        return _kernels.gemm_tile_name(self.tile) + ("" if self.shrink == "apart" else f", shrink {self.shrink}")


def gemm_configs(
    chip: object, m: int, n: int, k: int, rank: int, int8: bool, has_dropout: bool, full_tiles: bool, may_overlap: bool,
    may_be_inside: bool,
) -> list[GemmConfig]:  # fmt: skip
    """Return the valid configurations of a GEMM. The first one is the fastest according to the cost model.

    Args:
        chip: The C++ object that describes the GPU.
        m, n, k: Number of rows, output columns and terms of each sum.
        rank: Total rank.
        int8: Whether the weight is int8.
        has_dropout: Whether the output is masked.
        full_tiles: Whether every segment has at least as many rows as a tile of wgmma, or none.
        may_overlap: Whether a shrink may overlap the GEMM.
        may_be_inside: Whether the GEMM may compute S, or dS, itself. Every tile in a row of tiles repeats these products, which
            only pays in narrow layers.
    """
    tiles = _kernels.gemm_tiles(chip, m, n, k, rank, int8, has_dropout, full_tiles)
    apart = [GemmConfig(tile, "apart") for tile in tiles]
    overlapped = [GemmConfig(tile, "overlapped") for tile in tiles if may_overlap and _kernels.overlaps_shrink(tile, rank)]
    inside = [GemmConfig(tile, "inside") for tile in tiles if may_be_inside and _kernels.has_shrink_inside(tile, rank)]
    return (overlapped + apart if n >= _WIDE else apart + overlapped) + inside
