"""All that a GPU can show, in one folder of at most eight files: tests, machine code, benchmarks, a report.

    python bench/gpu.py --dest FOLDER [--quick] [--rehearse]

`make gpu` rebuilds the package and calls this. Exit status 1 if a test fails; the benchmarks run all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import fedms_ext

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "triton_kernels"
CUDA_TESTS = ROOT / "tests" / "cuda_kernels" / "numerics.py"  # skipped where the build has no CUDA kernels
SANITISED = "test_every_tile or test_bits_repeat"
QUICK = "test_every_tile or test_bits_repeat or test_graph_replay or test_opcheck or test_measured_choices"
# Seconds that a quick run gives each benchmark; most of them go into compiling the tiles that are measured.
QUICK_LIMITS = {"linear": 150, "mixture": 70, "step": 70}


# Of the GEMMs and of the narrow kernels: how busy the tensor cores and the memory are, and what was read of it.
COUNTERS = [
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "lts__t_sector_hit_rate.pct",
]


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    gpu = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return {
        "commit": commit,
        "changed files": len(changed.splitlines()),
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "backends": fedms_ext.available(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def run(command: list[str], limit: float, **environment: str) -> dict[str, object]:
    """Runs a command in the tests' folder; its exit status, seconds and the end of what it said."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=TESTS, env=os.environ | environment, timeout=limit, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        status, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        status, said = "timed out", said.decode(errors="replace") if isinstance(said, bytes) else said
    seconds = round(time.perf_counter() - start, 1)
    print(f"{' '.join(command[1:])}: {status} after {seconds} s", flush=True)
    return {"command": " ".join(command), "status": status, "seconds": seconds, "output": said[-4000:], "all": said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", required=True, type=Path, help="folder of the results; made if it is not there")
    parser.add_argument("--quick", action="store_true", help="within 8 minutes: fewer tests and shapes")
    parser.add_argument("--rehearse", action="store_true", help="no GPU: benchmarks on tiny sizes on the CPU, no tests")
    options = parser.parse_args()
    if (reason := fedms_ext.explain("triton")) and not options.rehearse:
        sys.exit(f"the GPU kernels cannot run here: {reason}; --rehearse shows how this runs, on the CPU")
    dest = options.dest.resolve()
    dest.mkdir(parents=True, exist_ok=True)
    (dest / "machine.json").write_text(json.dumps(machine(), indent=1))
    # The choices are measured on this machine, and belong to the results.
    choices = dest / "choices"
    shutil.rmtree(choices, ignore_errors=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    quick, linear = options.quick or options.rehearse, str(ROOT / "bench" / "bench_gpu_linear.py")
    if options.rehearse:
        steps = {}
    elif options.quick:
        steps = {"tests on the GPU": run([*pytest, "on_gpu.py", "-k", QUICK], 130)}
    else:
        found = str(dest / "machine_code.json")
        steps = {
            "tests on the GPU": run([*pytest, "on_gpu.py"], 1500),
            "tests of the CUDA kernels": run([*pytest, "-rs", str(CUDA_TESTS)], 900),
            "machine code": run([*pytest, "-s", "compiled.py"], 300, FEDMS_MACHINE_CODE=found),
        }
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not quick:
        # PyTorch's caching allocator would hide an access behind the end of a tensor.
        steps["compute-sanitizer"] = run(
            [sanitizer, "--error-exitcode", "9", *pytest, "on_gpu.py", "-k", SANITISED], 1800,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        steps["compute-sanitizer, CUDA kernels"] = run(
            [sanitizer, "--error-exitcode", "9", *pytest, str(CUDA_TESTS), "-k", "every_tile or dropout or int8"], 1800,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
    profiler = shutil.which("ncu")
    if profiler and not quick:  # needs the right to read counters, which is not everyone's
        steps["counters"] = run(
            [profiler, "--csv", "--metrics", ",".join(COUNTERS), "--kernel-name", "regex:gemm_|shrink|sweep",
             "--launch-count", "40", sys.executable, linear, "--quick"], 900, FEDMS_TUNE="0",
        )  # fmt: skip
    tables = []
    for name in ("linear", "mixture", "step"):
        command = [sys.executable, str(ROOT / "bench" / f"bench_gpu_{name}.py"), "--json", str(dest / f"{name}.json")]
        command += ["--quick"] * options.quick + ["--rehearse"] * options.rehearse
        step = run(command, QUICK_LIMITS[name] if options.quick else 1500, FEDMS_CACHE=str(choices))
        steps[f"benchmark {name}"] = step
        tables.append(f"## {name}\n\n{step['all']}")

    kept = {file.name: json.loads(file.read_text()) for file in choices.glob("*.json")}
    shutil.rmtree(choices, ignore_errors=True)
    (dest / "choices.json").write_text(json.dumps(kept, indent=1))
    lines = ["# GPU report", "", *[f"- {key}: {value}" for key, value in machine().items()], "", "| step | status | seconds |",
             "| --- | --- | --- |"]  # fmt: skip
    lines += [f"| {name} | {step['status']} | {step['seconds']} |" for name, step in steps.items()]
    for name, found in (("compute-sanitizer", sanitizer), ("counters", profiler)):
        if name not in steps:
            lines.append(f"| {name} | {'left out' if found else 'not on this machine'} | |")
    failed = {name: step for name, step in steps.items() if step["status"] != 0}
    for name, step in failed.items():
        lines += ["", f"## {name}: {step['status']}", "", "```", step["output"], "```"]
    if "counters" in steps:
        tables.append(f"## counters\n\n```\n{steps['counters']['all']}\n```")
    (dest / "report.md").write_text("\n".join(lines) + "\n\n" + "\n".join(tables))
    print(f"{dest / 'report.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
