"""List the tiles that the GEMM kernels may use on a chip, in the order in which a cost model expects them to be fast.

Nothing here depends on the name of a chip. A tile is legal if it fits into the shared memory that the device reports, and
descriptors require compute capability 9.0.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from ..device import DeviceProperties


class Gemm(NamedTuple):
    """The sizes of a product: (m, k) times (k, n), with the reduction continued by `rank` more steps."""

    m: int
    n: int
    k: int
    rank: int


class Tile(NamedTuple):
    """How a GEMM kernel runs. `kind` is "pointer", "descriptor" or "inline"; see gemm.py."""

    kind: str
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.kind} {self.bm}x{self.bn}x{self.bk} w{self.warps} s{self.stages}"

    @property
    def halves(self) -> bool:
        """Whether a descriptor kernel writes the tile in two halves, which leaves shared memory for the rest."""
        return self.bm * self.bn > 128 * 128

    def shared_memory(self, chip: DeviceProperties, rank: int, drop: bool = False) -> int:
        """Return the bytes of shared memory that the tile needs. The compiler was seen to use the same, within 256 bytes."""
        columns = self.bn + (rank_block(rank) if self.kind == "inline" else 0)
        # Before Hopper the values of the step at hand are in registers.
        stages = self.stages if chip.capability >= (9, 0) else self.stages - 1
        pipeline = stages * (self.bm + columns) * self.bk * 2
        tail = (self.bm + self.bn) * rank_block(rank) * 2
        if self.kind == "descriptor":
            # One loop over tiles and steps, so nothing shares its place, and every step of the ranks has its own. The
            # compiler also makes a loop without steps of K, which pipelines those of the ranks instead.
            ranks = -(-rank // rank_block(rank)) * tail
            out = self.bm * self.bn * 2 // (2 if self.halves else 1)
            mask = self.bm * self.bn if drop else 0  # on its way to the threads that hold the accumulator
            return max(pipeline + ranks, stages * ranks) + out + mask
        return max(pipeline, tail)

    @lru_cache(maxsize=256)  # noqa: B019  (asked for at every launch; a tile is only its numbers)
    def resident(self, chip: DeviceProperties, rank: int) -> int:
        """Return how many programs fit on a multiprocessor at a time, given 64 Ki registers and its shared memory."""
        registers = 32 * self.warps * (self.bm * self.bn // (32 * self.warps) + 64)
        # A multiprocessor has 1 KiB more than a program may ask for, and keeps 1 KiB for each.
        shared = self.shared_memory(chip, rank) + 1024
        return max(1, min(65536 // registers, (chip.shared_memory + 1024) // shared))


def rank_block(rank: int, largest: int = 32) -> int:
    """Return the number of ranks in one step after the main loop: at least 16, which a matrix instruction requires, and otherwise as
    small as possible, because the remaining ranks are zeros.
    """
    return min(max(16, 1 << (rank - 1).bit_length()), largest)


# Shapes that no target spills with. Before Hopper the operands of a step are in registers too, so the widest tile
# takes shorter steps.
_ANY = [
    Tile("pointer", 128, 128, 64, 8, 3),
    Tile("pointer", 64, 128, 64, 4, 3),
    Tile("inline", 128, 128, 64, 8, 3),
    Tile("inline", 64, 128, 64, 4, 3),
]
_BEFORE_HOPPER = [
    Tile("pointer", 128, 256, 32, 8, 4),
]
_HOPPER = [
    Tile("pointer", 128, 256, 64, 8, 3),
    Tile("inline", 128, 256, 64, 8, 3),
]
DESCRIPTOR_ROWS = 128
_DESCRIPTOR = [
    Tile("descriptor", DESCRIPTOR_ROWS, 256, 64, 8, 3),
    Tile("descriptor", DESCRIPTOR_ROWS, 128, 64, 8, 4),
    Tile("descriptor", DESCRIPTOR_ROWS, 128, 64, 8, 2),  # two of them fit on a multiprocessor: one computes while one writes
]


def band(tile: Tile, chip: DeviceProperties) -> int:
    """Return how many row blocks a band has. The tiles of a band run at the same time, so that they share W in the L2 cache.

    Of 8 and 16 it is the one for which the tiles in flight, one for each multiprocessor, read fewer rows of x and W (the rule of
    DeepGEMM's get_num_1d_blocks_per_group, github.com/deepseek-ai/DeepGEMM).
    """
    return min((8, 16), key=lambda blocks: blocks * tile.bm + math.ceil(chip.multiprocessors / blocks) * tile.bn)


def cost(tile: Tile, gemm: Gemm, chip: DeviceProperties) -> float:
    """Return a relative time: the number of waves of tiles, times the work of a tile, divided by how well its shape feeds the cores.

    In each step a tile of bm x bn loads bm + bn values for bm * bn products, and 128 x 256 is taken to be sufficient. This estimate orders
    the tiles where nothing can be measured; `autotune.py` measures.
    """
    tiles = math.ceil(gemm.m / tile.bm) * math.ceil(gemm.n / tile.bn)
    waves = math.ceil(tiles / (chip.multiprocessors * tile.resident(chip, gemm.rank)))
    feeding = min(1.0, tile.bm * tile.bn / (tile.bm + tile.bn) / 85)
    steps: float = gemm.k + gemm.rank
    if tile.kind == "inline":
        steps += gemm.k * gemm.rank / tile.bn  # S again in every column of tiles
    work = tile.bm * tile.bn * steps * tile.resident(chip, gemm.rank)
    return waves * work / feeding * (1.0 if tile.kind == "descriptor" else 1.1)


def legal_tiles(
    gemm: Gemm, chip: DeviceProperties, *, aligned: bool, inline: bool, drop: bool, is_4bit: bool = False
) -> list[Tile]:
    """Return the tiles that can run, the fastest one by `cost` first.

    Args:
        gemm: The sizes of the product.
        chip: The GPU.
        aligned: Whether all rows start at multiples of 16 bytes, as descriptors require.
        inline: Whether the rows of S may be computed inside the GEMM.
        drop: Whether dropout masks the accumulator. The mask takes half as many registers as the accumulator.
        is_4bit: Whether W has 4 bits. Converting it takes as many registers as the accumulator.
    """
    tiles = _ANY + (_HOPPER if chip.capability >= (9, 0) else _BEFORE_HOPPER)
    if aligned and chip.capability == (9, 0):
        tiles = tiles + _DESCRIPTOR
    legal = [
        tile
        for tile in tiles
        if tile.shared_memory(chip, gemm.rank, drop) <= chip.shared_memory
        and not (tile.kind == "inline" and not (inline and gemm.n <= 1024 and gemm.rank <= 32))
        and not ((drop or is_4bit) and tile.bm * tile.bn > 128 * 128)
    ]
    return sorted(legal, key=lambda tile: cost(tile, gemm, chip))
