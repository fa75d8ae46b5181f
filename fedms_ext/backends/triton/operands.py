"""Prepare the operands of the Triton kernels: concatenated experts, the frozen matrix, blocks of rows, small tables.

All of this runs at every call of a layer, and with small layers the GPU waits for it. So what follows from ranks, segments and shapes
alone is computed once and kept, and no unnecessary view is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import LEVELS
from ..base import Scales, made_once, scale_on
from .tiles import rank_block


class Dropout(NamedTuple):
    """Dropout with the probability p.

    Attributes:
        p: The probability that a value is dropped.
        seed: A number, or an int64 tensor with one element on the device, which a kernel reads when it runs.
    """

    p: float
    seed: int | Tensor


class Experts(NamedTuple):
    """The applied experts, concatenated.

    With segments every row has only the ranks of its own expert. The experts then lie `pitch` ranks apart, so that a step over the ranks
    never reaches into the next expert, and R is E * pitch.

    Attributes:
        a: (R, K).
        b: (N, R).
        scale: (E,).
        expert: (R,) int32, the expert of each rank.
        ranks: The rank of each expert.
        segments: The number of rows of each expert, or None.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    expert: Tensor
    ranks: tuple[int, ...]
    segments: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """The number of columns of S, by which a GEMM's reduction is continued."""
        return _columns(self.ranks, self.segments is not None)[0]

    @property
    def pitch(self) -> int:
        """The distance in ranks from one expert to the next with segments; 0 without."""
        return _columns(self.ranks, self.segments is not None)[1]

    @property
    def starts(self) -> list[int]:
        """The first column of S of each expert."""
        return _columns(self.ranks, self.segments is not None)[2]


@lru_cache(maxsize=256)
def _columns(ranks: tuple[int, ...], segmented: bool) -> tuple[int, int, list[int]]:
    """Return `rank`, `pitch` and `starts` of `Experts`."""
    if not segmented:
        return sum(ranks), 0, [sum(ranks[:e]) for e in range(len(ranks))]
    step = rank_block(max(ranks))
    return max(ranks), ceil_div(max(ranks), step) * step, [0] * len(ranks)


@made_once(256)
def _owners(ranks: tuple[int, ...], pitch: int, device: torch.device) -> Tensor:
    """Return the expert of each rank, (R,) int32. With segments every expert has `pitch` ranks."""
    owners = [e for e, rank in enumerate(ranks) for _ in range(pitch or rank)]
    return torch.tensor(owners, dtype=torch.int32, device=device)


class FrozenMatrix(NamedTuple):
    """The frozen operand w (K, N) of a GEMM, in any format.

    Attributes:
        data: w itself if it is floating or int8; for 4 bits the bytes (rows, ceil(columns / 2)) of a `QuantizedWeight`.
        transposed: Whether N is the side with stride 1, as in the gradient of x. For 4 bits: whether the rows are K.
        scale: None for a floating w; (N,) for int8; (rows, ceil(columns / group)) for 4 bits.
        kind: "dense", "int8", or a 4-bit format.
        group: The number of values that share a scale, for 4 bits.
    """

    data: Tensor
    transposed: bool
    scale: Tensor | None = None
    kind: str = "dense"
    group: int = 0

    @property
    def is_4bit(self) -> bool:
        return self.kind in LEVELS


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv` returns the same, but takes a noticeable part of a launch's time in Python."""
    return -(-a // b)


def _aligned(columns: int, like: Tensor) -> int:
    """Return the number of columns rounded up so that a row ends at a multiple of 16 bytes, as tensor descriptors require."""
    unit = 16 // like.element_size()
    return -(-columns // unit) * unit


def new_rows(like: Tensor, columns: int) -> Tensor:
    """Return an empty (M, columns) whose rows are aligned for tensor descriptors. Kernels also fill the gap after each row."""
    width = _aligned(columns, like)
    rows = like.new_empty(like.shape[0], width)
    return rows if width == columns else rows[:, :columns]


@made_once(64)
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype, device=device)


def concatenate(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Scales | Tensor, segments: Sequence[int] | None,
    dtype: torch.dtype,
) -> Experts:  # fmt: skip
    """Return the experts side by side, in the dtype of the product.

    The tensors of a single expert are used as they are if they are dense, aligned and of that dtype.
    """
    ranks = tuple([a.shape[0] for a in lora_a])
    device = lora_a[0].device
    scale = scale_on(scale, device)
    if lora_a[0].dtype != dtype:
        lora_a, lora_b = [a.to(dtype) for a in lora_a], [b.to(dtype) for b in lora_b]
    if segments is not None:
        pitch, (n, k) = _columns(ranks, True)[1], (lora_b[0].shape[0], lora_a[0].shape[1])
        gaps = [pitch - rank for rank in ranks]
        a = torch.cat([t for a, gap in zip(lora_a, gaps) for t in (a, _zeros(gap, k, dtype, device))])
        b = torch.cat([t for b, gap in zip(lora_b, gaps) for t in (b, _zeros(n, gap, dtype, device))], dim=1)
        return Experts(a, b, scale, _owners(ranks, pitch, device), ranks, tuple(segments))
    if len(ranks) == 1 and lora_a[0].is_contiguous():
        a = lora_a[0]
    else:
        a = torch.cat(list(lora_a))
    if len(ranks) == 1 and lora_b[0].is_contiguous() and ranks[0] * a.element_size() % 16 == 0:
        b = lora_b[0]
    else:
        rank, n = sum(ranks), lora_b[0].shape[0]
        b = torch.cat([*lora_b, _zeros(n, _aligned(rank, a) - rank, dtype, device)], dim=1)[:, :rank]
    return Experts(a, b, scale, _owners(ranks, 0, device), ranks)


@dataclass(frozen=True)
class Blocks:
    """The rows of a matrix, divided into blocks.

    Attributes:
        count: The number of blocks.
        table: With segments (count, 4) int32; see `row_block` in lora.py.
        counts: With segments, the number of blocks of each expert.
    """

    count: int
    table: Tensor | None = None
    counts: tuple[int, ...] = ()


def blocks(experts: Experts, m: int, size: int, wanted: Sequence[bool] | None = None, full: bool = False) -> Blocks:
    """Divide rows into blocks of at most `size` rows. With segments no block lies in two of them.

    Args:
        experts: The experts, whose segments are used.
        m: The number of rows.
        size: The largest number of rows of a block.
        wanted: With segments, the experts that get blocks; None means all.
        full: Whether all blocks have exactly `size` rows. Then no segment may have fewer, and the last block of a segment reaches back
            into the one before.
    """
    if experts.segments is None:
        return Blocks(ceil_div(m, size))
    wanted = tuple(wanted or [True] * len(experts.ranks))
    return _blocks(experts.segments, experts.ranks, size, wanted, full, experts.a.device)


@made_once(256)
def _blocks(
    segments: tuple[int, ...], ranks: tuple[int, ...], size: int, wanted: tuple[bool, ...], full: bool,
    device: torch.device,
) -> Blocks:  # fmt: skip
    table, counts, end = [], [], 0
    for owner, (rows, rank) in enumerate(zip(segments, ranks)):
        start, end = end, end + rows
        firsts = range(start, end if wanted[owner] else start, size)
        table += [(min(row, end - size) if full else row, min(row + size, end), owner, rank) for row in firsts]
        counts.append(len(firsts))
    return Blocks(len(table), torch.tensor(table, dtype=torch.int32, device=device).view(-1, 4), tuple(counts))


@made_once(8)
def levels(kind: str, device: torch.device) -> Tensor:
    """Return the 16 levels of a 4-bit format, float32."""
    return torch.tensor(LEVELS[kind], device=device)
