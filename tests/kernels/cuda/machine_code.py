"""Compiles the CUDA kernels for every target on a machine without a GPU, and reads the machine code.

    python tests/kernels/cuda/machine_code.py [--write]

Checks: nothing spills or uses local memory; the matrix instructions and the asynchronous copies of the target are
there; ptxas has no wgmma to wait for that it was not told of (its messages C75xx); registers and shared memory of
every kernel, and the instructions of the loops with wgmma, are those of resources.txt, which --write writes anew. Code is kept in
build/cuda-check by the hash of what it is made from, so that a second run takes a second.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNELS = ROOT / "csrc" / "cuda"
KEPT = ROOT / "build" / "cuda-check"
TABLE = HERE / "resources.txt"
# The files of each target. 8.6 and 8.9 run the code of 8.0 where they have none of their own; Jetson's 8.7 does not.
FAMILY = ("gemm_sm80", "shrink", "lora_grad", "reduce", "join")
TARGETS = {"sm_80": FAMILY, "sm_86": FAMILY, "sm_87": FAMILY, "sm_89": FAMILY, "sm_90": FAMILY,
           "sm_90a": ("gemm_sm90", "narrow_sm90", "narrow_backward_sm90", "shrink_sm90", "strips_sm90")}  # fmt: skip
MOST_SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_90a": 232448}
# What must be in the code of a kernel; the kernels that only add have none of it.
# ACQBULK is griddepcontrol.wait, PREEXIT griddepcontrol.launch_dependents.
WANTED = {"mma_gemm": ("HMMA", "LDGSTS", "LDSM"), "shrink_ahead": ("HGMMA", "UTMALDG", "SYNCS", "PREEXIT"),
          "shrink": ("HMMA", "LDGSTS", "LDSM"), "lora_grad_partials": ("HMMA", "LDGSTS", "LDSM"),
          "lora_grad_strips": ("HGMMA", "UTMALDG", "SYNCS"),
          "narrow_forward": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS"),
          "narrow_backward": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS"),
          "wgmma_gemm": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "ACQBULK")}  # fmt: skip
LOCAL = ("STL", "LDL")
COUNTED = (*LOCAL, "HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "UTMASTG", "SYNCS", "ACQBULK", "PREEXIT")


@dataclass(frozen=True)
class Kernel:
    target: str
    name: str
    registers: int
    instructions: tuple[tuple[str, int], ...]
    loop: str  # what its innermost loop with wgmma consists of

    def __str__(self) -> str:
        counts = " ".join(f"{name} {count}" for name, count in self.instructions if count)
        return f"{self.target} {self.name:44} {self.registers:3} registers  {counts}"


def tool(name: str) -> str:
    """nvdisasm and cuobjdump: the toolkit's, or those that Triton brings."""
    if found := shutil.which(name):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_file(target: str, file: str) -> tuple[Path, str]:
    """The machine code (of compute_80: PTX), and what ptxas said about it."""
    headers = [ROOT / "csrc/include/fedms" / name for name in ("cuda.h", "dropout.h")]
    sources = sorted([*KERNELS.glob("*.h"), KERNELS / f"{file}.cu", *headers])
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc/include'}", "-DFEDMS_WITH_SM90A", f"-arch={target}"]
    command += ["-ptx"] if target.startswith("compute") else ["-cubin", "-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror"]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    text = " ".join(command) + version + "".join(source.read_text() for source in sources)
    code = KEPT / f"{file}.{target}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.cubin"
    said = code.with_suffix(".log")
    if not (code.exists() and said.exists()):
        KEPT.mkdir(parents=True, exist_ok=True)
        temporary = code.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, str(KERNELS / f"{file}.cu"), "-o", str(temporary)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{file}.cu does not compile for {target}, or spills:\n{done.stderr[-6000:]}")
        said.write_text(done.stderr)
        temporary.rename(code)
    return code, said.read_text()


def plain(symbol: str) -> str:
    """gemm<Bf16, 0, true> out of a mangled kernel's name, without what is the same in all."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"fedms::cuda::(\(anonymous namespace\)::)?|_kernel|^void |\(anonymous namespace\)::", "", name)
    return name.partition("(")[0]


def kernels_of(target: str, file: str) -> list[Kernel]:
    code, said = compile_file(target, file)
    found = []
    if waits := re.findall(r"\(C75\d\d\).*", said):
        sys.exit(f"{file}.cu for {target}: ptxas adds waits for wgmma:\n" + "\n".join(waits[:5]))
    listing = subprocess.run([tool("nvdisasm"), "-c", str(code)], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", str(code)], capture_output=True, text=True, check=True)
    registers = dict(re.findall(r"Function (\S+):\n\s*REG:(\d+)", usage.stdout + usage.stderr))
    for section in re.split(r"(?m)^\.section\s+\.text\.", listing)[1:] or re.split(r"(?m)^//-+ \.text\.", listing)[1:]:
        symbol = re.match(r"[\w$]+", section)[0]
        counts = tuple((name, len(re.findall(rf"\b{name}\b", section))) for name in COUNTED)
        found.append(Kernel(target, plain(symbol), int(registers[symbol]), counts, wgmma_loop(section)))
    if len(found) != len(registers) or not found:
        sys.exit(f"{file}.cu for {target}: {len(registers)} kernels, but the code of {len(found)} was read")
    return found


def wgmma_loop(section: str) -> str:
    """How many instructions the innermost loop with wgmma of a kernel has, and how many of them are wgmma; nothing without one."""
    labels: dict[str, int] = {}
    code: list[str] = []
    loops = []
    for line in section.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            code.append(found[1])
            target = re.search(r"BRA.*`\(\.(L_\w+)\)", line)
            if target and target[1] in labels:
                loops.append(code[labels[target[1]]:])
    counts = [(len(loop), sum(name.startswith("HGMMA") for name in loop)) for loop in loops]
    counts = [(length, products) for length, products in counts if products]
    return "; loop of {} instructions, {} of them wgmma".format(*min(counts)) if counts else ""


def shared_memory() -> str:
    """Dynamic shared memory, from the headers that the launchers take it from."""
    program = KEPT / f"shared_memory.{os.getpid()}"
    KEPT.mkdir(parents=True, exist_ok=True)
    source = ('#include <cstdio>\n#include "heuristics.h"\nusing namespace fedms::cuda;\nint main() { for (const Tile& t : TILES)'
              ' std::printf("%s %d x %d, %d stages: %d bytes, %d threads\\n", t.kind == Kind::mma ? "mma" : "wgmma", t.bm, t.bn,'
              ' t.stages, t.shared_bytes(), t.threads());'
              ' std::printf("narrow_forward: %d bytes\\n", NARROW_SHARED_BYTES);'
              ' std::printf("narrow_backward: %d bytes\\n", NARROW_BACKWARD_SHARED_BYTES);'
              ' std::printf("shrink_ahead: %d bytes\\n", SHRINK_SHARED_BYTES);'
              ' std::printf("lora_grad_strips: %d bytes\\n", STRIP_SHARED_BYTES); }')  # fmt: skip
    command = ["c++", "-std=c++17", "-x", "c++", "-", f"-I{ROOT / 'csrc/include'}", f"-I{KERNELS}", f"-I{HERE}", "-o", str(program)]
    subprocess.run(command, input=source, text=True, check=True)
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    program.unlink()
    return text


def main() -> int:
    jobs = [(target, file) for target, files in TARGETS.items() for file in files]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        kernels = [kernel for found in pool.map(lambda job: kernels_of(*job), jobs) for kernel in found]
    problems = []
    for kernel in kernels:
        counts = dict(kernel.instructions)
        wanted = next((names for start, names in WANTED.items() if kernel.name.startswith(start)), ())
        problems += [f"{kernel}: uses local memory" for name in LOCAL if counts[name]]
        problems += [f"{kernel}: has no {name}" for name in wanted if not counts[name]]
    print(*kernels, sep="\n")
    for file in FAMILY:  # for GPUs to come
        text = compile_file("compute_80", file)[0].read_text()
        print(f"compute_80 {file}: {text.count('.entry')} kernels as PTX")
    lines = [f"{k.target} {k.name}: {k.registers} registers{k.loop}" for k in kernels]
    table = "\n".join(["Of `make check-cuda`, nvcc 13.0. Dynamic shared memory of a block:", shared_memory(), *sorted(lines), ""])
    if "--write" in sys.argv:
        TABLE.write_text(table)
    elif table != (kept := TABLE.read_text() if TABLE.exists() else ""):
        old, new = set(kept.splitlines()), set(table.splitlines())
        problems += [f"resources.txt has: {line}" for line in sorted(old - new)]
        problems += [f"now: {line}" for line in sorted(new - old)]
        problems.append("if that is meant: python tests/kernels/cuda/machine_code.py --write")
    print(f"{len(kernels)} kernels for {len(TARGETS)} targets, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
