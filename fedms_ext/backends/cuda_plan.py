"""A layer's passes on the CUDA kernels: one call from Python to C++ each, by a plan that is made once for a shape."""

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

# What a pass raises for a tensor that the kernels cannot read where it is; a ValueError.
Declined: type[ValueError] = _kernels.Declined if _kernels is not None else ValueError

# Output columns from which on the shrink is fused into the GEMM where nothing was measured.
_WIDE = 2048


class Shape(NamedTuple):
    """What a plan is made for. Names of shapes are those of `base`.

    Attributes:
        device: where all tensors are.
        dtype: of x, y and dy, bf16 or fp16.
        fp32_experts: whether A and B are float32 rather than of `dtype`.
        int8: whether the weight is int8.
        has_dropout: whether the LoRA branch has dropout.
        m, n, k: rows, output features and input features.
        ranks: of each expert.
        segments: rows of each expert, or None: every row takes all experts.
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
    """Return the shape of a call with this input, (..., K) or (..., N)."""
    segments = None if lora.segments is None else tuple(lora.segments)
    return Shape(
        x.device, x.dtype, lora.a[0].dtype == torch.float32, weight.scale is not None, lora.dropout_p > 0,
        x.shape[:-1].numel(), weight.n, weight.k, tuple(lora.ranks), segments,
    )  # fmt: skip


class Plan:
    """The passes of a layer for all calls of one shape: workspace sizes, tensor maps, and how its two GEMMs run.

    The GEMMs are measured at the first call on a GPU. A plan that is used by one layer alone keeps its tensor maps from call to
    call; otherwise they are made again, which costs microseconds.

    Attributes:
        rank: columns of S.
        room_size: values of the input's dtype that T and the experts side by side take. The forward pass writes them, and a
            backward pass that gets them need not compute them again.
        reads_expert_in_place: whether the only expert is not copied, so that its rows must begin at multiples of 16 bytes.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape  # of all calls
        owner = [e for e, rank in enumerate(shape.ranks) for _ in range(rank)]
        self._kernels = _kernels.Plan(
            bf16=shape.dtype == torch.bfloat16, fp32_experts=shape.fp32_experts, int8=shape.int8, m=shape.m, n=shape.n, k=shape.k,
            ranks=list(shape.ranks), rows=list(shape.segments or ()), chip=chip_of(shape.device),
            owner=torch.tensor(owner, dtype=torch.int32, device=shape.device),
        )  # fmt: skip
        self.rank: int = self._kernels.rank
        self.room_size: int = self._kernels.room_size
        self.reads_expert_in_place: bool = self._kernels.reads_expert_in_place
        self._forward_is_chosen = self._dx_is_chosen = False
        self._workspace_sizes: dict[tuple[bool, ...], int] = {}

    def forward(self, x: Tensor, *args: Any) -> None:
        """Write y, S, and what belongs into the room.

        Args:
            x: (M, K), or (..., K) if dense.
            args: the others of `_C.cuda.Plan.forward`, in their order.

        Raises:
            Declined: for a tensor that the kernels cannot read where it is.
        """
        if not self._forward_is_chosen:
            self._choose_forward(lambda: self._kernels.forward(x, *args))
        self._kernels.forward(x, *args)

    def backward(self, dy: Tensor, needs: tuple[bool, bool, bool, bool], *args: Any) -> None:
        """Write the gradients.

        Args:
            dy: (M, N), or (..., N) if dense.
            needs: whether the gradient of x, of the gate, of any A and of any B is needed.
            args: the others of `_C.cuda.Plan.backward` but for the workspace, in their order.

        Raises:
            Declined: for a tensor that the kernels cannot read where it is.
        """
        size = self._workspace_sizes.get(needs)
        if size is None:
            size = self._workspace_sizes[needs] = self._kernels.workspace_size(*needs)
        workspace = dy.new_empty(size)
        if needs[0] and not self._dx_is_chosen:
            nothing = [None] * len(self.shape.ranks)
            self._choose_dx(lambda: self._kernels.backward(dy, *args[:-3], None, nothing, nothing, workspace))
        self._kernels.backward(dy, *args, workspace)

    def _choose_forward(self, run: Callable[[], None]) -> None:
        # The tiles that can compute S take neither dropout nor an int8 W. In a forward pass dropout concerns S alone.
        may_fuse = not (self.shape.has_dropout or self.shape.int8)
        self._forward_is_chosen = self._choose(
            "forward", self.shape.n, self.shape.k, False, may_fuse, run,
            lambda config: self._kernels.choose_forward(config.tile, config.fuses_shrink),
        )  # fmt: skip

    def _choose_dx(self, run: Callable[[], None]) -> None:
        self._dx_is_chosen = self._choose(
            "dx", self.shape.k, self.shape.n, self.shape.has_dropout, False, run,
            lambda config: self._kernels.choose_dx(config.tile),
        )  # fmt: skip

    def _choose(
        self, name: str, n: int, k: int, has_dropout: bool, may_fuse: bool, run: Callable[[], None],
        take: Callable[[GemmConfig], None],
    ) -> bool:  # fmt: skip
        """Take the fastest configuration of a GEMM (M, N) with the reduction K; return whether it is final.

        Rows count up to a power of two. A shape that is first met while a CUDA graph is captured is measured after it.
        """
        shape = self.shape
        m = 1 << (shape.m - 1).bit_length()
        full_tiles = all(rows == 0 or rows >= 128 for rows in shape.segments or ())
        key = (name, str(shape.dtype), m, n, k, self.rank, shape.int8, has_dropout, may_fuse, shape.fp32_experts,
               shape.segments is not None, full_tiles)  # fmt: skip

        def ways() -> dict[str, GemmConfig]:
            configs = gemm_configs(chip_of(shape.device), m, n, k, self.rank, shape.int8, has_dropout, full_tiles, may_fuse)
            return {str(config): config for config in configs}

        def run_with(config: GemmConfig) -> None:
            take(config)
            run()

        take(choices(devices.properties(shape.device).capability).choose(shape.device, key, ways, run_with))
        return not devices.is_capturing(shape.device)


@made_once(1024)
def shared_plan(shape: Shape) -> Plan:
    """Return the plan of all calls of a shape whose layer has none of its own."""
    return Plan(shape)


@lru_cache(maxsize=None)
def chip_of(device: torch.device) -> Any:
    """Return the C++ object that describes a GPU."""
    properties = devices.properties(device)
    major, minor = properties.capability
    return _kernels.DeviceProperties(10 * major + minor, properties.multiprocessors, properties.shared_memory)


@lru_cache(maxsize=None)
def choices(capability: tuple[int, int]) -> Choices[GemmConfig]:
    """Return the file of the fastest configurations on GPUs of a compute capability."""
    major, minor = capability
    return Choices(f"cuda-gemm-sm{major}{minor}-{devices.build_id()[:16]}.json")


class GemmConfig(NamedTuple):
    """A configuration of the GEMM.

    Attributes:
        tile: the number of its tile.
        fuses_shrink: whether the tiles of the first columns compute S on the way.
    """

    tile: int
    fuses_shrink: bool

    def __str__(self) -> str:
        return _kernels.gemm_tile_name(self.tile) + (", fused shrink" if self.fuses_shrink else "")


def gemm_configs(
    chip: object, m: int, n: int, k: int, rank: int, int8: bool, has_dropout: bool, full_tiles: bool, may_fuse: bool
) -> list[GemmConfig]:
    """Return the legal configurations of a GEMM, first the one that the cost model expects to be the fastest.

    Args:
        chip: the C++ object that describes the GPU.
        m, n, k: rows, output columns and reduction.
        rank: total rank.
        int8: whether the weight is int8.
        has_dropout: whether the output is masked.
        full_tiles: whether no segment is shorter than a tile of wgmma.
        may_fuse: whether S may be computed on the way.
    """
    tiles = _kernels.gemm_tiles(chip, m, n, k, rank, int8, has_dropout, full_tiles)
    apart = [GemmConfig(tile, False) for tile in tiles]
    # The tiles that compute S take longer, so there must be many others.
    fused = [GemmConfig(tile, True) for tile in tiles if may_fuse and _kernels.shrinks_inside(tile, rank)]
    return fused + apart if n >= _WIDE else apart + fused
