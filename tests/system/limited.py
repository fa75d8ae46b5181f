"""Plans for devices with little memory, and runs with the planned settings inside a limit that the system enforces.

    python tests/system/limited.py --count 20

Each configuration is planned in a process of its own and run in another one, whose limit is the plan's: what the process
needs by itself, and `--memory`. From the moment its libraries are loaded it may not take more (RLIMIT_DATA: a tensor
beyond it is refused), and in the end its largest resident size, over its whole life, must lie below the limit too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
SMALL = ["run.threads=1", "data.max_samples=240", "clients.count=2", "clients.unseen=1", "data.partition=iid",
         "stage1.rounds=1", "stage2.rounds=1", "sal.schedule=all"]
# Memory in MiB, and what differs from the built-in run file.
CONFIGURATIONS = [
    (170, ["sal.max_depth=1"]),
    (180, ["sal.max_depth=2"]),
    (200, ["sal.max_depth=2"]),
    (256, []),
    (320, []),
    (400, []),
    (512, []),
    (1024, []),
    (512, ["sal.cache=off"]),
    (256, ["sal.cache=disk"]),
    (256, ["sal.cache_dtype=int8"]),
    (400, ["sal.cache_dtype=bf16", "stage1.batch=64", "stage2.batch=64"]),
    (256, ["lora.rank=32", "lora.alpha=32"]),
    (320, ["lora.dropout=0.1"]),
    (256, ["sal.order=bottom_up"]),
    (256, ['model.targets=["query", "value"]']),
    (320, ["model.frozen=int8"]),
    (256, ["run.method=fedavg_ft"]),
    (320, ["gate.mixing=layers", "gate.features=prefix"]),
    (400, ["clients.optimizer=kept", "stage1.epochs=2"]),
]


def planned(memory: int, sets: list[str]) -> dict:
    """The plan for a configuration, made in this process."""
    from fedms.config import load_config
    from fedms.plan import plan

    found = plan(load_config("sentiment", [*SMALL, *sets]), memory=memory, flops=1e9)
    if found.chosen is None:
        raise SystemExit(f"nothing fits in {memory // MIB} MiB: {sets}")
    return {"process": found.process, "peak": found.chosen.peak, "settings": found.settings}


def limited(limit: int, sets: list[str], out: Path) -> dict:
    """Runs a configuration in this process, which may grow up to `limit` bytes from here on."""
    from fedms import run
    from fedms.config import load_config
    from fedms.meter import resident_memory

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    data = int(status["VmData"].split()[0]) * 1024 + limit - resident_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    summary = run.run(load_config("sentiment", [*SMALL, *sets]), out)
    return {"notes": summary["notes"], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_a_process(*arguments: str) -> dict:
    process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {process.returncode}\n{process.stdout}{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def check(memory: int, sets: list[str], folder: Path) -> str:
    """Plans a configuration, runs it within its limit, and says what it took.

    Raises:
        SystemExit: if it cannot be planned, fails, loses a client, or grows above its limit.
    """
    plan = in_a_process("--plan", str(memory), *sets)
    limit = plan["process"] + memory
    settings = [f"{key}={json.dumps(value)}" for key, value in plan["settings"].items()]
    found = in_a_process("--run", str(limit), str(folder / "run"), *sets, *settings)
    said = (f"limit {limit / MIB:.0f} MiB, planned {(plan['process'] + plan['peak']) / MIB:.0f}, largest "
            f"{found['peak'] / MIB:.0f}: {memory // MIB} MiB, {', '.join(sets) or 'as built in'} -> {', '.join(settings)}")
    if found["notes"] or found["peak"] > limit:
        raise SystemExit(f"{said}\nabove its limit, or a client was lost: {found['notes']}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=len(CONFIGURATIONS), help="how many configurations, from the end")
    parser.add_argument("--plan", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(planned(int(arguments.plan[0]), arguments.plan[1:])))
    elif arguments.run:
        print(json.dumps(limited(int(arguments.run[0]), arguments.run[2:], Path(arguments.run[1]))))
    else:
        for number, (memory, sets) in enumerate(CONFIGURATIONS[-arguments.count:]):
            with tempfile.TemporaryDirectory() as folder:
                print(check(memory * MIB, sets, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
