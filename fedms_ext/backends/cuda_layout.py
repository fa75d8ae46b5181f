"""How the CUDA kernels see a call: concatenated experts, padding, segments, and the legal configurations of a GEMM."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import device as devices
from .base import Lora, dense_rows, made_once

_kernels: Any = devices.cuda_kernels()

# Output columns from which on the shrink is fused into the GEMM where nothing was measured.
_WIDE = 2048


class Layout(NamedTuple):
    """Where experts of some ranks lie side by side.

    Attributes:
        gaps: ranks of zeros behind each expert.
        starts: the column of S where each expert begins.
        owner: (R,) int32, the number of each rank's expert.
        segments: the C++ object that tells the kernels of the segments.
    """

    gaps: list[int]
    starts: list[int]
    owner: Tensor
    segments: object


@made_once(256)
def layout_of(ranks: tuple[int, ...], segments: tuple[int, ...] | None, device: torch.device) -> Layout:
    """Return the layout of experts of these ranks. With segments each one begins at a multiple of 16 ranks."""
    gaps = [-rank % (1 if segments is None else 16) for rank in ranks]
    firsts = [sum(ranks[:e]) + sum(gaps[:e]) for e in range(len(ranks))]
    owner = torch.tensor([e for e, r in enumerate(ranks) for _ in range(r)], dtype=torch.int32, device=device)
    if segments is None:
        return Layout(gaps, firsts, owner, _kernels.Segments([], [], []))
    rows = _kernels.Segments(list(accumulate(segments)), ranks, firsts)
    return Layout(gaps, [0] * len(ranks), owner, rows)


def concatenated(lora: Lora, gaps: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the experts as A (R, K) and B (N, R) in the dtype of the product, their rows at multiples of 16 bytes."""
    if len(lora.a) == 1 and gaps == [0]:
        a, b = lora.a[0], lora.b[0]
    else:
        a = torch.cat([F.pad(a, (0, 0, 0, gap)) if gap else a for a, gap in zip(lora.a, gaps)])
        b = torch.cat([F.pad(b, (0, gap)) if gap else b for b, gap in zip(lora.b, gaps)], dim=1)
    a, b = a.to(dtype), b.to(dtype)
    rank = b.shape[1]
    return aligned_rows(a), aligned_rows(b) if rank % 8 == 0 else F.pad(b, (0, -rank % 8))[:, :rank]


def aligned_rows(x: Tensor) -> Tensor:
    """Return x (..., K) as (M, K) with rows that start at multiples of 16 bytes."""
    return dense_rows(x, 16)


def padded(rank: int) -> int:
    """Return the width of a matrix of that many columns whose rows start at multiples of 16 bytes."""
    return -(-rank // 8) * 8


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
