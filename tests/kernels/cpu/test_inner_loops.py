"""The inner loops of the CPU kernels, as they were compiled: sums stay in registers, and nothing is loaded twice."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter

import pytest

from fedms_ext import _C

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
BRANCH = re.compile(r"j[a-z]+\s+([0-9a-f]+)")


@functools.cache
def inner_loops(path: str) -> list[list[str]]:
    """The instructions of every loop without a branch in it."""
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", text, flags=re.MULTILINE)
    if not any("vpdpbusd" in instruction for _, instruction in found):
        pytest.skip("this build has no x86 int8 kernels")
    loops: list[list[str]] = []
    start = 0   # behind the last branch
    for i, (_, instruction) in enumerate(found):
        branch = BRANCH.match(instruction)
        if branch is None:
            continue
        target = int(branch[1], 16)
        body = [text for address, text in found[start:i] if int(address, 16) >= target]
        if int(found[start][0], 16) <= target < int(found[i][0], 16):
            loops.append(body)
        start = i + 1
    return loops


# The instruction that adds to a sum, its registers, how many sums, and the one that multiplies.
TILES = {
    "avx512vnni": ("vpdpbusd", "zmm", 24, "vpdpbusd"),
    "avxvnni": ("vpdpbusd", "ymm", 12, "vpdpbusd"),
    "avx2": ("vpaddd", "ymm", 12, "vpmaddwd"),
    "avx2 narrow": ("vpaddd", "ymm", 8, "vpmaddubsw"),
}


@pytest.mark.parametrize("tile", TILES)
def test_the_sums_of_the_largest_tile_stay_in_registers(tile):
    adding, register, sums, typical = TILES[tile]
    product = re.compile(rf"{adding} .*,(%{register}\d+)$")
    tiles = [loop for loop in inner_loops(_C.__file__) if sum(bool(product.search(line)) for line in loop) == sums
             and any(typical in line for line in loop)]  # fmt: skip
    assert tiles, f"no loop with {sums} sums on {register}"
    for loop in tiles:
        written = {product.search(line)[1] for line in loop if product.search(line)}
        assert len(written) == sums
        stores = [line for line in loop if re.match(rf"v?mov\S+ +%{register}\d+,.*\(", line)]
        assert not stores, f"the loop writes registers to memory: {stores}"
        assert not [line for line in loop if "%rsp" in line or "%rbp)" in line], "the loop uses the stack"


def test_no_vector_is_loaded_twice_in_a_step_of_512_bits():
    """A core loads one such vector a cycle, as many as it multiplies: what several products share must lie in a register."""
    product = re.compile(r"vfmadd\S+ .*%zmm\d+$")
    loops = [loop for loop in inner_loops(_C.__file__) if sum(bool(product.search(line)) for line in loop) >= 8]
    assert loops
    for loop in loops:
        vectors = [line for line in loop if "%zmm" in line and "broadcast" not in line and "{1to16}" not in line]
        read = Counter(found[0] for line in vectors if (found := re.search(r"\S*\(%[^)]*\)(?=,)", line)))
        assert not [at for at, times in read.items() if times > 1], "\n".join(loop)
