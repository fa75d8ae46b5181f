"""All that a GPU can show, in one folder of at most eight files: tests, machine code, benchmarks, a report.

    python -m bench.run_gpu --dest FOLDER [--quick [--seconds S]] [--since EPOCH] [--rehearse]

`make gpu` rebuilds the package and calls this. Exit status 1 if a test fails; the benchmarks run all the same. Where all
tests of the CUDA C++ kernels pass, $FEDMS_CACHE gets a record of it, and those kernels become candidates from then on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fedms_ext
from fedms_ext.backends import device

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "kernels" / "triton"
CUDA_TESTS = [str(ROOT / "tests" / "kernels" / "cuda" / name)
              for name in ("numerics.py", "planned.py", "planned_peft.py", "siblings.py", "siblings_in_models.py")]
SANITIZED = "test_every_tile or test_bits_repeat"
QUICK = "test_every_tile or test_bits_repeat or test_graph_replay or test_opcheck or test_measured_choices"
QUICK_SECONDS = 8 * 60
RESERVE = 10.0  # seconds to write the report
# Of the seconds that are left when a quick run comes to a benchmark: the share that it may have. Most of them go into
# compiling the tiles that are measured.
SHARES = {"linear": 0.6, "step": 0.5, "kernels": 0.6, "mixture": 1.0}
ROOMS = {"linear": "layers", "step": "steps", "kernels": "kernels", "mixture": "layers"}
# Tests spend their time in compilers, one thread each.
SHARDS = max(1, min(16, (os.cpu_count() or 1) - 2))

# Of the GEMMs and of the narrow kernels: how busy the tensor cores and the memory are, and what was read of it.
COUNTERS = [
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "lts__t_sector_hit_rate.pct",
]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

Step = dict[str, object]


@functools.cache
def machine() -> dict[str, object]:
    def git(*command: str) -> str:
        if shutil.which("git") is None:  # nor need the sources have a history
            return ""
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

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
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed files": len(git("status", "--porcelain").splitlines()),
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "backends": fedms_ext.available(),
        "CUDA kernels": fedms_ext.explain("cuda") or "built",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


class Steps:
    """Runs commands in the root of the repository, until the time is over, and keeps what became of them.

    The report is written again after each of them, so that whoever ends this process has what was found until then.
    """

    def __init__(self, end: float, dest: Path) -> None:
        self._end, self._dest = end, dest
        self.done: dict[str, Step] = {}

    def left(self) -> float:
        """Seconds."""
        return self._end - time.time()

    def run(self, name: str, command: list[str], limit: float, shards: int = 1, **environment: str) -> Step:
        """`shards`: as many processes side by side, each with its share of the tests."""
        limit = min(limit, self.left())
        if limit < RESERVE:
            return self._keep(name, {"command": " ".join(command), "status": "left out: no time", "seconds": 0.0, "output": ""})
        start = time.perf_counter()
        jobs = [os.environ | environment | {"FEDMS_SHARD": f"{i}/{shards}"} for i in range(shards)]
        with ThreadPoolExecutor(shards) as pool:
            results = list(pool.map(lambda environment: self._one(command, limit, environment), jobs))
        status = next((status for status, _ in results if status != 0), 0)
        seconds = round(time.perf_counter() - start, 1)
        print(f"{name}: {status} after {seconds} s", flush=True)
        output = "\n".join(said for result, said in results if shards == 1 or result != 0)
        last = "; ".join(said.strip().splitlines()[-1] for _, said in results if said.strip())
        return self._keep(name, {"command": " ".join(command), "status": status, "seconds": seconds, "last": last,
                                 "output": output})

    def _keep(self, name: str, step: Step) -> Step:
        self.done[name] = step
        (self._dest / "report.md").write_text(report(self))
        return step

    @staticmethod
    def _one(command: list[str], limit: float, environment: dict[str, str]) -> tuple[int | str, str]:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, errors="replace",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too, which hold the pipe open
            return f"timed out after {limit:.0f} s", process.communicate()[0]


def test(steps: Steps, quick: bool, dest: Path) -> None:
    if fedms_ext.explain("cuda") is None:
        step = steps.run("tests of the CUDA kernels", [*PYTEST, *CUDA_TESTS], 90 if quick else 900, SHARDS)
        if step["status"] == 0:
            print(f"the CUDA kernels are candidates from now on: {device.record_pass()}")
    fewer = ["-k", QUICK] if quick and SHARDS < 8 else []  # the whole list takes a minute on 16 cores
    steps.run("tests on the GPU", [*PYTEST, str(TESTS / "on_gpu.py"), *fewer], 150 if quick else 1500, SHARDS)
    if quick:
        return
    code = {"FEDMS_MACHINE_CODE": str(dest / "machine_code.json")}
    steps.run("machine code", [*PYTEST, "-s", str(TESTS / "compiled.py")], 600, **code)
    if sanitizer := shutil.which("compute-sanitizer"):
        # PyTorch's caching allocator would hide an access behind the end of a tensor.
        checked, uncached = [sanitizer, "--error-exitcode", "9", *PYTEST], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.run("compute-sanitizer", [*checked, str(TESTS / "on_gpu.py"), "-k", SANITIZED], 1800, **uncached)
        if fedms_ext.explain("cuda") is None:
            kernels = [*checked, *CUDA_TESTS, "-k", "every_tile or dropout or int8 or segments or one_launch"]
            steps.run("compute-sanitizer, CUDA kernels", kernels, 1800, **uncached)
    if profiler := shutil.which("ncu"):  # needs the right to read counters, which is not everyone's
        steps.run(
            "counters",
            [profiler, "--csv", "--metrics", ",".join(COUNTERS), "--kernel-name", "regex:gemm|shrink|narrow|lora_grad_partials",
             "--launch-count", "40", sys.executable, "-m", "bench.layers.bench_gpu_linear", "--quick"],
            900, FEDMS_TUNE="0",
        )  # fmt: skip


def self_check(steps: Steps) -> None:
    """The trainer's own look at the GPU: does its kernels' arithmetic agree with the reference."""
    steps.run("self-check", [sys.executable, "-m", "fedms", "doctor"], 120)


# Federated runs: a vision transformer, MiniLM, a language model. The first one needs neither weights nor data from elsewhere.
SOURCES = {"digits": (), "sentiment": (), "dictionaries": ("stage1.rounds=3", "stage2.rounds=2")}
REHEARSED = ("data.max_samples=60", "clients.count=2", "clients.unseen=0", "stage1.rounds=1", "stage2.rounds=1", "run.threads=1")


def train(steps: Steps, options: argparse.Namespace) -> None:
    """Each federated run on the GPU, there with CUDA graphs, and on the CPU: accuracy, seconds a round, peak memory."""
    for source, settings in SOURCES.items():
        if options.rehearse and source != "digits":     # the others' models may not be there
            continue
        command = [sys.executable, "-m", "bench.federated.devices", source]
        for setting in REHEARSED if options.rehearse else settings:
            command += ["--set", setting]
        command += ["--rehearse"] * options.rehearse + ["--seeds", "1"] * (options.quick or options.rehearse)
        steps.run(f"benchmark federated {source}", command, 60 if options.quick else 900)


def lockstep(steps: Steps, options: argparse.Namespace) -> None:
    """Rounds whose clients are trained side by side, 1, 4, 8 and 16 of them at a time."""
    rehearsal = ["--lockstep", "1,4", "--repeats", "1", "--set", "clients.count=4", "--set", "data.max_samples=60"]
    for source in ("digits",) if options.rehearse else ("sentiment", "digits"):
        command = [sys.executable, "-m", "bench.federated.lockstep", source, *(rehearsal if options.rehearse else ())]
        steps.run(f"benchmark lockstep {source}", command, 60 if options.quick else 600)


def measure(steps: Steps, options: argparse.Namespace, dest: Path) -> None:
    """The benchmarks. The choices that they make are measured on this machine, and belong to the results."""
    choices = dest / "choices"
    shutil.rmtree(choices, ignore_errors=True)
    choices.mkdir()
    if fedms_ext.explain("cuda") is None and device.has_passed(device.properties(device.current()).capability):
        shutil.copy(device.record_of(device.properties(device.current()).capability), choices)
    if not options.rehearse:
        compiler = [sys.executable, "-m", "bench.kernels.compile", *["--quick"] * options.quick]
        steps.run("compilation", compiler, 90 if options.quick else 900)
    for name, share in SHARES.items():
        command = [sys.executable, "-m", f"bench.{ROOMS[name]}.bench_gpu_{name}", "--json", str(dest / f"{name}.json")]
        command += ["--quick"] * options.quick + ["--rehearse"] * options.rehearse
        limit = 1500.0
        if options.quick:
            limit = max(0.0, share * (steps.left() - RESERVE))
            command += ["--seconds", f"{0.8 * limit:.0f}"]  # the rest is for the start, and for a table that takes longer
        steps.run(f"benchmark {name}", command, limit, FEDMS_CACHE=str(choices))
    kept = {file.name: json.loads(file.read_text()) for file in choices.glob("*.json")}
    shutil.rmtree(choices, ignore_errors=True)
    (dest / "choices.json").write_text(json.dumps(kept, indent=1))


def report(steps: Steps) -> str:
    lines = ["# GPU report", "", *[f"- {key}: {value}" for key, value in machine().items()], "",
             "| step | status | seconds | |", "| --- | --- | --- | --- |"]  # fmt: skip
    for name, step in steps.done.items():
        last = "" if name.startswith("benchmark") else str(step.get("last", ""))
        lines.append(f"| {name} | {step['status']} | {step['seconds']} | {last} |")
    for name, tool in (("compute-sanitizer", "compute-sanitizer"), ("counters", "ncu")):
        if name not in steps.done:
            lines.append(f"| {name} | {'left out' if shutil.which(tool) else 'not on this machine'} | | |")
    for name, step in steps.done.items():
        if step["status"] != 0:
            lines += ["", f"## {name}: {step['status']}", "", "```", str(step["output"])[-8000:], "```"]
        elif name.startswith("benchmark"):
            lines += ["", f"## {name}", "", str(step["output"])]
        elif name == "counters":
            lines += ["", f"## {name}", "", "```", str(step["output"]), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", required=True, type=Path, help="folder of the results; made if it is not there")
    parser.add_argument("--quick", action="store_true",
                        help="fewer tests and shapes, within --seconds; the report says what was left out")
    parser.add_argument("--seconds", type=float, default=QUICK_SECONDS, metavar="S",
                        help=f"how long --quick may take (default: {QUICK_SECONDS})")  # fmt: skip
    parser.add_argument("--since", type=float, metavar="EPOCH", default=time.time(),
                        help="from when on the --seconds count, in seconds since 1970 (default: now)")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="no GPU: benchmarks on tiny sizes on the CPU, no tests")
    options = parser.parse_args()
    if (reason := fedms_ext.explain("triton")) and not options.rehearse:
        sys.exit(f"the GPU kernels cannot run here: {reason}; --rehearse shows how this runs, on the CPU")
    dest = options.dest.resolve()
    dest.mkdir(parents=True, exist_ok=True)
    (dest / "machine.json").write_text(json.dumps(machine(), indent=1))
    steps = Steps(options.since + options.seconds if options.quick else float("inf"), dest)
    if not options.rehearse:
        self_check(steps)
        test(steps, options.quick, dest)
    train(steps, options)
    lockstep(steps, options)
    measure(steps, options, dest)
    print(dest / "report.md")
    in_time = [step["status"] for step in steps.done.values() if not str(step["status"]).startswith("left out")]
    return 1 if any(status != 0 for status in in_time) else 0


if __name__ == "__main__":
    sys.exit(main())
