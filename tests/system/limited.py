"""Plans for devices with little memory, and runs with the planned settings inside a limit that the system enforces.

    python tests/system/limited.py --count 21

Each configuration is planned in a process of its own and run in another one, whose limit is the plan's: what the process
needs by itself, and `--memory`. A process that is larger (its whole resident size, looked at every two milliseconds) is
killed, and in the end its largest size, as the system noted it, must lie below the limit too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
SMALL = ["run.method=fedms", "run.threads=1", "data.max_samples=240", "clients.count=2", "clients.unseen=1", "data.partition=iid",
         "stage1.rounds=1", "stage2.rounds=1", "sal.schedule=all"]
# Memory in MiB, and what differs from the built-in run file; those that have failed most often last.
CONFIGURATIONS = [
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
    (320, ["gate.mixing=layers", "gate.features=prefix"]),
    (400, ["clients.optimizer=kept", "stage1.epochs=2"]),
    (200, ["sal.max_depth=2"]),
    (170, ["sal.max_depth=1"]),
    (180, ["sal.max_depth=2"]),
    (256, ["run.dtype=bf16"]),
    (256, ["run.method=fedavg_ft"]),
]


def planned(memory: int, sets: list[str]) -> dict:
    """The plan for a configuration, made in this process."""
    from fedms.config import load_config
    from fedms.runs.plan import plan

    found = plan(load_config("sentiment", [*SMALL, *sets]), memory=memory, flops=1e9)
    if found.chosen is None:
        raise SystemExit(f"nothing fits in {memory // MIB} MiB: {sets}")
    return {"process": found.process, "peak": found.chosen.peak, "settings": found.settings}


def started(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_within(limit: int, sets: list[str], out: Path) -> int:
    """Runs a configuration in a process of at most `limit` bytes; returns its largest size.

    Raises:
        RuntimeError: if it fails, loses a client, or grows above the limit.
    """
    process = started("--run", str(out), *sets)
    pages = Path(f"/proc/{process.pid}/statm")
    status = None
    while status is None:
        if int(pages.read_text().split()[1]) * resource.getpagesize() > limit:
            process.kill()
        time.sleep(0.002)
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        status = code if pid else None
    said = process.stdout.read()
    peak = usage.ru_maxrss * 1024
    if status or peak > limit or "failed" in said:
        raise RuntimeError(f"{said}\nexit status {status}, largest size {peak}, limit {limit}: {sets}")
    return peak


def check(memory: int, sets: list[str], folder: Path) -> str:
    """Plans a configuration, runs it within its limit, and says what it took.

    Raises:
        RuntimeError: if it cannot be planned, or not be run within its limit.
    """
    planning = started("--plan", str(memory), *sets)
    said, _ = planning.communicate()
    if planning.returncode:
        raise RuntimeError(said)
    plan = json.loads(said.splitlines()[-1])
    settings = [f"{key}={json.dumps(value)}" for key, value in plan["settings"].items()]
    limit = plan["process"] + memory
    peak = run_within(limit, [*sets, *settings], folder / "run")
    return (f"limit {limit / MIB:.0f} MiB, planned {(plan['process'] + plan['peak']) / MIB:.0f}, largest "
            f"{peak / MIB:.0f}: {memory // MIB} MiB, {', '.join(sets) or 'as built in'} -> {', '.join(settings)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=len(CONFIGURATIONS), help="how many configurations, from the end")
    parser.add_argument("--plan", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(planned(int(arguments.plan[0]), arguments.plan[1:])))
    elif arguments.run:
        from fedms.config import load_config
        from fedms.runs import run

        notes = run.run(load_config("sentiment", [*SMALL, *arguments.run[1:]]), Path(arguments.run[0]))["notes"]
        print("\n".join(notes))
    else:
        failed = 0
        for memory, sets in CONFIGURATIONS[-arguments.count:]:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    print(check(memory * MIB, sets, Path(folder)), flush=True)
                except RuntimeError as error:
                    print(f"FAILED: {error}", flush=True)
                    failed += 1
        sys.exit(f"{failed} of {arguments.count} failed" if failed else 0)


if __name__ == "__main__":
    main()
