"""Every launcher with every tile, compiled for three targets on a machine without a GPU. Run by test_processes.py.

The machine code must not spill, must use the matrix instructions of its target, and must fit into shared memory. Without FEDMS_FULL
each target gets another third of the launches, and all of those that only one of the targets has.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from ahead_of_time import compiled_for, facts
from sampled import FULL

from fedms_ext.backends.triton import launch
from fedms_ext.backends.device import DeviceProperties
from fedms_ext.backends.triton.operands import Dropout, Experts, FrozenMatrix
from fedms_ext.backends.triton.tiles import Gemm, legal_tiles

CHIPS = {
    80: DeviceProperties((8, 0), 108, 166912),
    89: DeviceProperties((8, 9), 128, 101376),
    90: DeviceProperties((9, 0), 132, 232448),
}
M, N, K = 8192, 4096, 4096


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(chip):
    """(name, total rank, function) of every launch to compile: all tiles, and all ways to run a kernel that change its
    code. Blocks of ranks grow up to a total rank of 128. A function is to be called before the next one is made."""
    for ranks in [(16, 16), (64, 64)]:
        few = ranks == (16, 16)
        for name, launch_it in chain(gemms(chip, ranks), narrow_parts(chip, ranks)):
            if few or "pointer" not in name:  # the pointer tiles' code is the same for any rank above 16
                yield name, sum(ranks), launch_it
    for name, launch_it in segmented(chip):
        yield name, 32, launch_it


def experts_of(ranks, n=N, segments=None):
    rows = sum(ranks) if segments is None else 2 * max(ranks)
    scale, expert = empty(2, dtype=torch.float32), empty(rows, dtype=torch.int32)
    return Experts(empty(rows, K), empty(n, rows), scale, expert, ranks, segments)


def gemms(chip, ranks):
    rank, experts = sum(ranks), experts_of(ranks)
    x, dy, bias, t = empty(M, K), empty(M, N), empty(N), empty(M, rank)
    f, dropout, gemm = experts.b.t(), Dropout(0.1, 3), Gemm(M, N, K, rank)
    dense, transposed = FrozenMatrix(empty(N, K).t(), False), FrozenMatrix(empty(N, K), True)
    tiles = legal_tiles(gemm, chip, aligned=True, inline=False, drop=False)
    for tile in tiles:
        yield f"forward {tile}", lambda: launch.gemm(x, dense, bias, t, f, experts, tile, chip)
        yield f"dx {tile}", lambda: launch.gemm(dy, transposed, None, t, experts.a, experts, tile, chip)
    for tile in legal_tiles(gemm, chip, aligned=True, inline=False, drop=True):
        yield f"dx, dropout {tile}", lambda: launch.gemm(dy, transposed, None, t, experts.a, experts, tile, chip, dropout)
    int8 = FrozenMatrix(empty(N, K, dtype=torch.int8).t(), False, empty(N, dtype=torch.float32), "int8")
    for tile in tiles:
        if tile.kind == "pointer":
            yield f"int8 {tile}", lambda: launch.gemm(x, int8, bias, t, f, experts, tile, chip)
    for tile in legal_tiles(gemm, chip, aligned=False, inline=False, drop=True):
        yield f"dx, int8, dropout {tile}", lambda: launch.gemm(dy, int8, None, t, experts.a, experts, tile, chip, dropout)
    q = empty(N, K // 2, dtype=torch.uint8)
    # nf4 and int4 differ in the values of a table; groups of 64 and of 32 in how many scales a tile loads.
    for group in (32, 64):
        nf4 = [FrozenMatrix(q, transposed, empty(N, K // group, dtype=torch.float32), "nf4", group) for transposed in (False, True)]
        for tile in legal_tiles(gemm, chip, aligned=False, inline=False, drop=False, is_4bit=True):
            name = f"nf4, group {group} {tile}"
            yield f"forward, {name}", lambda: launch.gemm(x, nf4[0], bias, t, f, experts, tile, chip)
            yield f"dx, {name}", lambda: launch.gemm(dy, nf4[1], None, t, experts.a, experts, tile, chip)
            if group == 64:
                yield (f"dx, dropout, {name}",
                       lambda: launch.gemm(dy, nf4[1], None, t, experts.a, experts, tile, chip, dropout))
    narrow = Gemm(12608, 768, 768, rank)
    for tile in legal_tiles(narrow, chip, aligned=True, inline=True, drop=False):
        if tile.kind == "inline":
            yield str(tile), lambda: inline(tile, ranks, chip)


def inline(tile, ranks, chip, segments=None):
    few = experts_of(ranks, 768, segments)
    few = Experts(empty(*few.a.shape[:1], 768), few.b, few.scale, few.expert, ranks, segments)
    gate = empty(12608, 2 if segments is None else 1, dtype=torch.float32)
    return launch.gemm_inline(empty(12608, 768), empty(768, 768), empty(768), few, gate, tile, chip)


def narrow_parts(chip, ranks, segments=None):
    experts, dropout = experts_of(ranks, segments=segments), Dropout(0.1, 3)
    rank, narrow = experts.rank, experts_of(ranks, 768, segments)
    x, dy, t = empty(M, K), empty(M, N), empty(M, rank)
    gate = empty(M, 2 if segments is None else 1, dtype=torch.float32)
    yield "shrink", lambda: launch.shrink(x, experts.a.t(), experts, gate, None)
    yield "shrink, dropout", lambda: launch.shrink(x, experts.a.t(), experts, gate, dropout)
    seeded = Dropout(0.1, empty(1, dtype=torch.int64))
    yield "shrink, seed in memory", lambda: launch.shrink(x, experts.a.t(), experts, gate, seeded)
    yield "shrink dy", lambda: launch.shrink(dy, experts.b, experts, None, None, keep_s=False)
    yield "lora_grad_partials dy: U, dB", lambda: launch.lora_grad_partials_dy(dy, t, experts, gate, True, True, chip)
    yield "lora_grad_partials narrow dy: U, dB", lambda: launch.lora_grad_partials_dy(empty(M, 768), t, narrow, gate, True, True, chip)
    yield "lora_grad_partials dy: U", lambda: launch.lora_grad_partials_dy(dy, t, experts, gate, True, False, chip)
    yield "lora_grad_partials dy: dB", lambda: launch.lora_grad_partials_dy(dy, t, experts, None, False, True, chip)
    yield "lora_grad_partials x: dA", lambda: launch.lora_grad_partials_x(x, t, experts, None, chip, [True] * 2)
    yield "lora_grad_partials x: dA, dropout", lambda: launch.lora_grad_partials_x(x, t, experts, dropout, chip, [True] * 2)
    u = empty(N // 128, M, rank, dtype=torch.float32)
    yield "finish rows", lambda: launch.finalize_row_grads(u, t, experts, gate, gate, t)
    if segments is None:
        yield "add parts", lambda: launch.reduce_partials(empty(16, N, rank, dtype=torch.float32), empty(N, 16), 0)


def segmented(chip):
    """The launches again with the rows in segments: other loads of rows and experts, the same loops."""
    ranks, segments = (32, 32), (M // 2, M // 2)
    experts = experts_of(ranks, segments=segments)
    x, dy, t, f = empty(M, K), empty(M, N), empty(M, 32), experts.b.t()
    dense, transposed, dropout = FrozenMatrix(empty(N, K).t(), False), FrozenMatrix(empty(N, K), True), Dropout(0.1, 3)
    gemm = Gemm(M, N, K, 32)
    for tile in legal_tiles(gemm, chip, aligned=True, inline=False, drop=False):
        yield f"segments, forward {tile}", lambda: launch.gemm(x, dense, empty(N), t, f, experts, tile, chip)
        yield f"segments, dx {tile}", lambda: launch.gemm(dy, transposed, None, t, experts.a, experts, tile, chip)
    for tile in legal_tiles(gemm, chip, aligned=True, inline=False, drop=True):
        yield (f"segments, dx, dropout {tile}",
               lambda: launch.gemm(dy, transposed, None, t, experts.a, experts, tile, chip, dropout))
    for tile in legal_tiles(Gemm(12608, 768, 768, 32), chip, aligned=True, inline=True, drop=False):
        if tile.kind == "inline":
            yield f"segments, {tile}", lambda: inline(tile, ranks, chip, (6304, 6304))
    for name, launch_it in narrow_parts(chip, ranks, segments):
        yield f"segments, {name}", launch_it


def machine_code(job):
    """(capability, name, facts) of every kernel of one share of a target's launches."""
    capability, share, shares = job
    found = []
    third = list(CHIPS).index(capability)
    numbered = enumerate(launches(CHIPS[capability]))
    wanted = (one for number, one in numbered if FULL or number % 3 == third or "descriptor" in one[0])
    for name, rank, launch_it in islice(wanted, share, None, shares):
        with compiled_for(capability) as kernels:
            launch_it()
        found += [(capability, name, facts(kernel) | {"rank": rank, "kernel": kernel.name}) for kernel in kernels]
    return found


@pytest.fixture(scope="module")
def kernels():
    workers = min(2, os.cpu_count() or 1)
    jobs = [(capability, share, workers) for capability in CHIPS for share in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = [kernel for share in pool.map(machine_code, jobs) for kernel in share]
    for capability, name, fact in found:
        print(f"sm_{capability} {name:44}", " ".join(f"{key} {value}" for key, value in fact.items()))
    for capability in CHIPS:
        count = Counter(fact["kernel"] for c, _, fact in found if c == capability)
        each = ", ".join(f"{kernel} {number}" for kernel, number in sorted(count.items()))
        print(f"sm_{capability}: {count.total()} configurations of {len(count)} launchers compiled ({each})")
    if folder := os.environ.get("FEDMS_MACHINE_CODE"):
        Path(folder).write_text(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize("capability", CHIPS)
def test_nothing_spills_and_all_fits(kernels, capability):
    for name, fact in [(name, fact) for c, name, fact in kernels if c == capability]:
        assert fact["STL"] == fact["LDL"] == fact["STACK"] == 0, (name, fact)
        assert fact["shared"] <= CHIPS[capability].shared_memory, (name, fact)


@pytest.mark.parametrize("capability", CHIPS)
def test_matrix_instructions(kernels, capability):
    for name, fact in [(name, fact) for c, name, fact in kernels if c == capability]:
        if not name.endswith(("finish rows", "add parts")):
            assert fact["HGMMA" if capability == 90 else "HMMA"] > 0, (name, fact)
            loads = "UTMALDG" if "descriptor" in name else "LDGSTS"  # asynchronous copies into shared memory
            assert fact[loads] > 0, (name, fact)


def test_the_estimate_of_shared_memory_is_not_too_low(kernels):
    for capability, name, fact in kernels:
        chip, rank = CHIPS[capability], fact["rank"]
        for tile in legal_tiles(Gemm(M, 768, K, rank), chip, aligned=True, inline=True, drop=False):
            if str(tile) in name:
                assert fact["shared"] <= tile.shared_memory(chip, rank, "dropout" in name) + 256, (name, fact)
