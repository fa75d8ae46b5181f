"""Every launcher with every tile, compiled for three targets on a machine without a GPU. Run by test_processes.py.

The machine code must not spill, must use the matrix instructions of its target, and must fit into shared memory.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from ahead_of_time import compiled_for, facts

from fedms_ext.triton_kernels import launch
from fedms_ext.triton_kernels.launch import Dropout, Experts
from fedms_ext.triton_kernels.tiles import Chip, Gemm, legal_tiles

CHIPS = {
    80: Chip((8, 0), 108, 166912),
    89: Chip((8, 9), 128, 101376),
    90: Chip((9, 0), 132, 232448),
}
M, N, K = 8192, 4096, 4096


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(chip):
    """(name, total rank, function) of every launch to compile: all tiles, and all ways to run a kernel that change its
    code. Blocks of ranks grow up to a total rank of 128."""
    for ranks in [(16, 16), (64, 64)]:
        for name, launch_it in launches_with(chip, ranks):
            if ranks == (16, 16) or "pointer" not in name:  # the pointer tiles' code is the same for any rank above 16
                yield name, sum(ranks), launch_it


def launches_with(chip, ranks):
    rank = sum(ranks)
    x, weight, dy, bias, t = empty(M, K), empty(N, K), empty(M, N), empty(N), empty(M, rank)
    a, b = empty(rank, K), empty(N, rank)
    experts = Experts(a, b, empty(2, dtype=torch.float32), empty(rank, dtype=torch.int32), ranks)
    gate = empty(M, 2, dtype=torch.float32)
    dropout = Dropout(0.1, 3)
    gemm = Gemm(M, N, K, rank)
    tiles = legal_tiles(gemm, chip, aligned=True, inline=False, drop=False)
    for tile in tiles:
        yield f"forward {tile}", lambda: launch.gemm(x, weight.t(), bias, t, b.t(), tile, chip)
        yield f"dx {tile}", lambda: launch.gemm(dy, weight, None, t, a, tile, chip, across=True)
    for tile in legal_tiles(gemm, chip, aligned=True, inline=False, drop=True):
        yield f"dx, dropout {tile}", lambda: launch.gemm(dy, weight, None, t, a, tile, chip, dropout, across=True)
    int8, w_scale = empty(N, K, dtype=torch.int8), empty(N, dtype=torch.float32)
    for tile in tiles:
        if tile.kind == "pointer":
            yield f"int8 {tile}", lambda: launch.gemm(x, int8.t(), bias, t, b.t(), tile, chip, None, w_scale)
    for tile in legal_tiles(gemm, chip, aligned=False, inline=False, drop=True):
        yield f"dx, int8, dropout {tile}", lambda: launch.gemm(
            dy, empty(K, N, dtype=torch.int8).t(), None, t, a, tile, chip, dropout, w_scale
        )
    narrow = Gemm(12608, 768, 768, rank)
    for tile in legal_tiles(narrow, chip, aligned=True, inline=True, drop=False):
        if tile.kind == "inline":
            few = Experts(empty(rank, 768), empty(768, rank), experts.scale, experts.expert, ranks)
            yield str(tile), lambda: launch.gemm_inline(
                empty(12608, 768), empty(768, 768), empty(768), few, empty(12608, 2, dtype=torch.float32), tile
            )
    yield "shrink", lambda: launch.shrink(x, a.t(), experts, gate, None)
    yield "shrink, dropout", lambda: launch.shrink(x, a.t(), experts, gate, dropout)
    yield "shrink dy", lambda: launch.shrink(dy, b, experts, None, None, keep_s=False)
    yield "sweep dy: U, dB", lambda: launch.sweep_dy(dy, t, experts, gate, True, True)
    narrow_dy, narrow_experts = empty(M, 768), Experts(a, empty(768, rank), experts.scale, experts.expert, ranks)
    yield "sweep narrow dy: U, dB", lambda: launch.sweep_dy(narrow_dy, t, narrow_experts, gate, True, True)
    yield "sweep dy: U", lambda: launch.sweep_dy(dy, t, experts, gate, True, False)
    yield "sweep dy: dB", lambda: launch.sweep_dy(dy, t, experts, None, False, True)
    yield "sweep x: dA", lambda: launch.sweep_x(x, t, None)
    yield "sweep x: dA, dropout", lambda: launch.sweep_x(x, t, dropout)
    u = empty(N // 128, M, rank, dtype=torch.float32)
    yield "finish rows", lambda: launch.finish_rows(u, t, experts, gate, gate, dy)
    yield "add parts", lambda: launch.add_parts(empty(16, N, rank, dtype=torch.float32), empty(N, 16), 0)


def machine_code(job):
    """(capability, name, facts) of every kernel of one share of a target's launches."""
    capability, share, shares = job
    found = []
    for number, (name, rank, launch_it) in enumerate(launches(CHIPS[capability])):
        if number % shares == share:
            with compiled_for(capability) as kernels:
                launch_it()
            found += [(capability, name, facts(kernel) | {"rank": rank}) for kernel in kernels]
    return found


@pytest.fixture(scope="module")
def kernels():
    workers = min(4, os.cpu_count() or 1)
    jobs = [(capability, share, workers) for capability in CHIPS for share in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = [kernel for share in pool.map(machine_code, jobs) for kernel in share]
    for capability, name, fact in found:
        print(f"sm_{capability} {name:44}", " ".join(f"{key} {value}" for key, value in fact.items()))
    for capability in CHIPS:
        print(f"sm_{capability}: {sum(c == capability for c, _, _ in found)} launches compiled")
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
        if name not in ("finish rows", "add parts"):
            assert fact["HGMMA" if capability == 90 else "HMMA"] > 0, (name, fact)
            loads = "UTMALDG" if "descriptor" in name else "LDGSTS"  # asynchronous copies into shared memory
            assert fact[loads] > 0, (name, fact)


def test_the_estimate_of_shared_memory_is_not_too_low(kernels):
    for capability, name, fact in kernels:
        chip, rank = CHIPS[capability], fact["rank"]
        for tile in legal_tiles(Gemm(M, 768, K, rank), chip, aligned=True, inline=True, drop=False):
            if str(tile) in name:
                assert fact["shared"] <= tile.shared_memory(chip, rank, "dropout" in name) + 256, (name, fact)
