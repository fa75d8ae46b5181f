"""One table of every CPU kernel: bytes, multiply-adds, floor, time, share of the floor, and the instructions of its inner loop.

    make roofline        or        python bench/kernels/roofline.py [--build build/roofline] [--write FILE]

Times are of one thread, in CPU time: the median of 31 turns with the 20th and the 80th percentile. The floor is the longer of
two times: of the multiply-adds at the rate that the instruction set reaches from registers alone, and of the bytes at the
bandwidth of the cache that the operands fit into, both measured in the same run. The rows that are farthest from their floor
come first; a kernel without arithmetic that it counts (dropout's random numbers, 4-bit expansion at few rows) is far from the time
that its bytes take. The inner loops of the kernels for Arm are estimated by `arm_cycles.py`.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The function whose inner loop does the work of a kernel, by the name in the table, and its instructions in four kinds.
FUNCTIONS = {
    "lora dots": r"dots_tile<\d+, \d+, float>",
    "lora expand": r"expand_tile<\d+, \d+>",
    "lora reduce": r"reduce_tile<\d+, \d+>",
    "dropout": r"dropout\(",
    "few rows, fp32 weight, forward": r"dots_tile<1, \d+, float>",
    "few rows, fp32 weight, backward": r"expand_tile<1, \d+>",
    "few rows, fp16": r"dots_tile<1, \d+, fedms::Fp16>",
    "few rows, bf16": r"dots_tile<1, \d+, fedms::Bf16>",
    "quantize x": r"quantize\w*\(",
    "int8 layer": r"tile<\d+|multiply\(",  # with AVX2 the tiles are inlined
    "4-bit layer": r"tile<\d+",
    "attention": r"(expand_)?tile<\d+, \d+>",
    "token loss": r"dots_tile<\d+, \d+, float>",
    "RMS norm": r"rms_norm\(",
}
OBJECTS = {"lora": "lora/{isa}", "few": "lora/{isa}", "dropout": "lora/{isa}", "quantize": "int8/{int8}", "int8": "int8/{int8}",
           "4-bit": "int8/{nibble}", "attention": "{pairs}", "token": "lora/{isa}", "RMS": "rms_norm"}  # fmt: skip
INT8_FILES = {"avx512": "avx512vnni", "avx2": "avx2", "avxvnni": "avxvnni"}
ARITHMETIC = re.compile(r"v(fmadd|pdp|dpbf16|pmadd|paddd|mulps|addps|pmuludq|pmull|pmulh)")
SHUFFLE = re.compile(r"v(perm|punpck|unpck|pshuf|shuf|extract|insert|pack|pmov[sz]x|cvt|pbroadcast|broadcast)")
BRANCH = re.compile(r"j[a-z]+\s+([0-9a-f]+)")


def build(folder: Path) -> Path:
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFEDMS_ROOFLINE=ON",
                    "-DCMAKE_BUILD_TYPE=Release"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    subprocess.run(["cmake", "--build", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / "roofline"


def largest_loop(folder: Path, kernel: str, isa: str, unit: str) -> str:
    """How many instructions of each kind the longest inner loop of a kernel's function has."""
    prefix = next(name for name in FUNCTIONS if kernel.startswith(name))
    name = object_of(next(start for start in OBJECTS if prefix.startswith(start)), isa, unit)
    objects = list(folder.glob(f"**/{name}.cpp.o"))
    if not objects:
        return ""
    text = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", str(objects[0])], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    best: list[str] = []
    for function in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", text, flags=re.MULTILINE):
        if re.search(FUNCTIONS[prefix], function[0]):
            best = max([best, *inner_loops(function[1])], key=lambda loop: sum(bool(ARITHMETIC.match(i)) for i in loop))
    kinds = Counter(kind_of(instruction) for instruction in best)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def object_of(start: str, isa: str, unit: str) -> str:
    """The source file of a kernel's function in csrc/cpu, without its suffix; `start` is a key of OBJECTS."""
    lora, nibble = "avx2" if isa == "avxvnni" else isa, "avx2_4bit" if isa == "avx2" else INT8_FILES.get(isa, isa)
    pairs = "bfloat16/pairs_avx512bf16" if unit == "bf16" else f"lora/{lora}"
    return OBJECTS[start].format(isa=lora, pairs=pairs, int8=INT8_FILES.get(isa, isa), nibble=nibble)


def inner_loops(text: str) -> list[list[str]]:
    """The instructions of every loop without a branch in it."""
    found = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", text, flags=re.MULTILINE)
    loops, start = [], 0
    for i, (_, instruction) in enumerate(found):
        branch = BRANCH.match(instruction)
        if branch is None:
            continue
        target = int(branch[1], 16)
        if int(found[start][0], 16) <= target < int(found[i][0], 16):
            loops.append([body for address, body in found[start:i] if int(address, 16) >= target])
        start = i + 1
    return loops


def kind_of(instruction: str) -> str:
    if ARITHMETIC.match(instruction):
        return "arithmetic" + (" from memory" if "(" in instruction else "")
    if "broadcast" in instruction:
        return "broadcasts"
    if instruction.startswith("prefetch"):
        return "prefetches"
    if re.match(r"v?mov\S+ +%.*\(", instruction):
        return "stores"
    if "(" in instruction and instruction.startswith("v"):
        return "loads"
    return "shuffles" if SHUFFLE.match(instruction) else "others"


def table(output: str, folder: Path) -> list[str]:
    peaks: dict[tuple[str, str], float] = {}
    bandwidths: list[tuple[float, float]] = []
    rows = []
    for line in output.splitlines():
        what, *fields = line.split("\t")
        if what == "peak":
            peaks[fields[0], fields[1]] = float(fields[2])
        elif what == "bandwidth":
            bandwidths.append((float(fields[0]), float(fields[1])))
        else:
            isa, kernel, shape, unit, *numbers = fields
            macs, moved, working_set, median, p20, p80 = map(float, numbers)
            bandwidth = next((rate for size, rate in bandwidths if working_set <= 2 * size), bandwidths[-1][1])
            arithmetic = macs / peaks[isa, unit] if macs else 0.0
            floor = max(arithmetic, moved / bandwidth)
            bound = "arithmetic" if floor == arithmetic else "bytes"
            rows.append((floor / median, f"| {kernel} | {isa} | {shape} | {macs / 1e6:.2f} | {moved / 1e3:.0f} | {1e6 * floor:.2f} "
                         f"({bound}) | {1e6 * median:.2f} ({1e6 * p20:.2f}-{1e6 * p80:.2f}) | {100 * floor / median:.0f} % "
                         f"| {largest_loop(folder, kernel, isa, unit)} |"))  # fmt: skip
    lines = ["| peak, from registers | GMAC/s |", "| --- | ---: |"]
    lines += [f"| {isa}, {unit} | {rate / 1e9:.1f} |" for (isa, unit), rate in peaks.items()]
    lines += ["", "| working set, KiB | GB/s, read |", "| ---: | ---: |"]
    lines += [f"| {size / 1024:.0f} | {rate / 1e9:.1f} |" for size, rate in bandwidths]
    lines += ["", "| kernel | instruction set | rows; K -> N | multiply-adds, millions | bytes, KB | floor, us | time, us | share "
              "of the floor | inner loop |", "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    return lines + [line for _, line in sorted(rows)]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "roofline", help="build folder")
    parser.add_argument("--write", type=Path, help="write the table to this file instead of the screen")
    options = parser.parse_args()
    output = subprocess.run([build(options.build)], capture_output=True, text=True, check=True).stdout
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    head = ["# Every CPU kernel beside its floor", "", f"{processor()}, one thread, commit {commit.stdout.strip()}. Made by "
            "`make roofline`; see `bench/kernels/roofline.py`.", ""]  # fmt: skip
    text = "\n".join([*head, *table(output, options.build), ""])
    if options.write:
        options.write.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
