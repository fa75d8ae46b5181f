"""The inner loops of the int8 kernels for Arm, of which there is no machine here: instructions, and LLVM's estimate of cycles.

    python bench/kernels/arm_cycles.py [--cpu neoverse-n1] [--k 384] [--rank 8]

Cross-compiles the kernels (`g++-aarch64-linux-gnu`), takes the loop with most products of each, and counts: multiply-adds of a
turn, instructions by kind, and, where `llvm-mca` knows the CPU, cycles of a turn and the resource that is busiest. The products
alone give the bound: a core that starts two of them a cycle needs half as many cycles as there are. Then, with `qemu-aarch64`, the
instructions of a whole layer K -> K with one expert: those that quantize x, and those that multiply, with all that surrounds the loop.

What it showed (LLVM 14's model for neoverse-n1): with a broadcast of x for every product row, `dotprod` made 384 multiply-adds in
20.1 cycles; with x multiplied by lane, four groups at a time, 1536 in 55.2, 1.46 times as many a cycle. `i8mm` makes 512 in 16.2
cycles, where its 16 products alone take 16; loads of two groups at a time were tried and cost more in moves (1024 in 42.2). Rows left
over by the largest tile went one by one (`i8mm`: two by two) through all of a panel, so that each loaded the weight again: in one
tile 4 rows of 384 -> 384 take 0.64 and 16 rows 0.87 times the instructions with `dotprod`, 4 rows 0.86 times with `i8mm`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A kernel's file, the instruction that multiplies, its multiply-adds, and the architecture to compile for.
KERNELS = {"dotprod": ("sdot", 16, "armv8.2-a+dotprod"), "i8mm": ("usmmla", 32, "armv8.2-a+dotprod+i8mm")}


def assembly(name: str, architecture: str) -> str:
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O3", f"-march={architecture}", "-DFEDMS_ARM64", f"-I{ROOT}/csrc/include",
               "-S", "-o", "-", str(ROOT / f"csrc/cpu/int8/{name}.cpp")]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hottest_loop(text: str, product: str) -> list[str]:
    """The instructions between a label and a branch back to it, of the loop with most products."""
    lines = [line.strip() for line in text.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    best: list[str] = []
    for i, line in enumerate(lines):
        branch = re.match(r"(?:b\.?\w*|cbn?z\s+\w+,|tbn?z\s+\w+, #?\d+,)\s+(\.L\w+)$", line)
        start = labels.get(branch[1], i) if branch else i
        body = [text for text in lines[start + 1 : i + 1] if text and not text.startswith(".")]
        if start < i and not any(other.startswith(".L") for other in body):
            count = sum(other.startswith(product) for other in body)
            best = max(best, body, key=lambda loop: sum(other.startswith(product) for other in loop)) if count else best
    return best


def kind(instruction: str, product: str) -> str:
    name = instruction.split()[0]
    if name == product:
        return "products"
    if name.startswith("ld"):
        return "loads"
    if name in ("dup", "ins", "mov", "zip1", "zip2", "uzp1", "uzp2", "ext"):
        return "moves"
    return "stores" if name.startswith("st") else "others"


def estimate(loop: list[str], cpu: str, architecture: str) -> str:
    if shutil.which("llvm-mca") is None:
        return "llvm-mca is not installed"
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(loop[:-1]) + "\n")
        file.flush()
        command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm", "-iterations=100",
                   "-bottleneck-analysis", file.name]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"llvm-mca fails: {done.stderr.strip().splitlines()[0]}"
    cycles = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    reciprocal = re.search(r"Block RThroughput:\s+([\d.]+)", done.stdout)
    pressure = re.findall(r"^\s+- (\w+)\s+\[ ([\d.]+)% \]", done.stdout, flags=re.MULTILINE)
    busiest = ", ".join(f"{resource} {share} %" for resource, share in pressure) or "none named"
    return f"{int(cycles[1]) / 100:.1f} cycles, at best {reciprocal[1]}; bottleneck: {busiest}" if cycles and reciprocal else "?"


def counted(program: Path, *case: str | int) -> int:
    """Instructions of one more call of a case; see arm_count.cpp."""
    def of(times: int) -> int:
        trace = program.with_suffix(".trace")
        subprocess.run(["qemu-aarch64", "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", trace, program, *map(str, case),
                        str(times)], check=True)  # fmt: skip
        with trace.open() as lines:
            return sum(line.startswith("Trace") for line in lines)

    return of(2) - of(1)


def layers(k: int, rank: int) -> None:
    """Print the instructions of whole layers."""
    if shutil.which("qemu-aarch64") is None:
        return print("\nqemu-aarch64 is not installed, so whole layers are not counted (Debian: qemu-user)")
    print(f"\n| {k} -> {k}, r = {rank} | rows | quantize x | multiply | instructions a row and 1,000 multiply-adds |\n"
          "| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "arm_count"
        sources = [ROOT / "bench/kernels/arm_count.cpp", *(ROOT / f"csrc/cpu/int8/{name}.cpp" for name in KERNELS)]
        subprocess.run(["aarch64-linux-gnu-g++", "-std=c++17", "-O3", "-static", f"-march={KERNELS['i8mm'][2]}", "-DFEDMS_ARM64",
                        f"-I{ROOT}/csrc/include", *sources, "-o", program], check=True)  # fmt: skip
        for name, panel in (("dotprod", 16), ("i8mm", 8)):
            for rows in (1, 4, 16, 48):
                quantize = counted(program, name, "quantize", rows, k, rank)
                multiply = counted(program, name, "multiply", rows, k, rank) * -(-k // panel)
                each = 1000 * (quantize + multiply) / (rows * k * k)
                print(f"| {name} | {rows} | {quantize:,} | {multiply:,} | {each:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", default="neoverse-n1", help="a CPU that llvm-mca knows (default: neoverse-n1)")
    parser.add_argument("--k", type=int, default=384, help="width of the layers, a multiple of 16 (default: 384)")
    parser.add_argument("--rank", type=int, default=8, help="of the expert (default: 8)")
    options = parser.parse_args()
    print("| kernel | multiply-adds a turn | products | instructions of a turn | products, share of them | llvm-mca |")
    print("| --- | ---: | ---: | --- | ---: | --- |")
    for name, (product, each, architecture) in KERNELS.items():
        loop = hottest_loop(assembly(name, architecture), product)
        kinds = Counter(kind(instruction, product) for instruction in loop)
        counts = ", ".join(f"{count} {what}" for what, count in kinds.most_common())
        print(f"| {name} | {each * kinds['products']} | {kinds['products']} | {counts} | {100 * kinds['products'] / len(loop):.0f} % "
              f"| {estimate(loop, options.cpu, architecture)} |")  # fmt: skip
    layers(options.k, options.rank)


if __name__ == "__main__":
    main()
