"""Kills runs and fills disks, resumes, and compares with the undisturbed run: `python crashes.py --help`.

Every run is a process forked from this one, which has imported everything and trained nothing, so that a trial costs no more than
the run itself.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fedms.config import load_config
from fedms.progress import Progress
from fedms.runs import run
from fedms.runs.experiment import LoadedTask
from fedms.storage.checkpoint import CheckpointError, CheckpointFolder
from fedms.errors import RunFolderError
from fedms.storage.records import RunRecords, comparable

CONFIG = load_config("digits", ["run.method=fedms", "data.max_samples=200", "clients.count=4", "clients.unseen=1", "stage1.rounds=3",
                                "stage2.rounds=2", "clients.fraction=0.8", "clients.optimizer=kept",
                                "lora.dropout=0.1", "run.threads=1"])
KILLED, NO_SPACE = -signal.SIGKILL, 4


def start(out: Path, *, resume: bool = False, die_at: int | None = None) -> int:
    """Forks a run; it kills itself at its `die_at`-th call of fsync or rename, just before it or just after."""
    child = os.fork()
    if child:
        return child
    try:
        if die_at is not None:
            _die_at(die_at)
        run.run(CONFIG, out, resume=resume)
        os._exit(0)
    except (CheckpointError, RunFolderError) as error:
        os._exit(NO_SPACE if "No space left on device" in str(error) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _die_at(number: int) -> None:
    left = [number]

    def mortal(call):
        def wrapped(*args):
            left[0] -= 1
            if left[0] == 0 and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped

    os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(path: Path) -> tuple[str, dict]:
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    tensors = {**snapshot.tensors, **{f"{i}/{n}": t for i, own in snapshot.private.items() for n, t in own.items()}}
    return json.dumps(comparable(RunRecords.read(path))), {n: t.numpy().tobytes() for n, t in tensors.items()}


def kill_runs(folder: Path, count: int, draw: random.Random) -> bool:
    started = time.perf_counter()
    assert wait(start(folder / "undisturbed")) == 0
    seconds = time.perf_counter() - started
    expected = outcome(folder / "undisturbed")
    right = True
    for trial in range(count):
        path, told, kills = folder / f"run{trial}", [], 0
        resume = False
        while True:
            # Half of the kills hit at a random moment, which is mostly training; half hit a write of a checkpoint.
            if trial % 2:
                number = draw.randrange(1, 40)
                child, what = start(path, resume=resume, die_at=number), f"at write {number}"
            else:
                moment = draw.uniform(0, seconds)
                child, what = start(path, resume=resume), f"after {moment:.2f} s"
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
            code, resume = wait(child), True
            if code == KILLED:
                kills += 1
                told.append(what)
            if code != KILLED or draw.random() < 0.7:
                break
        code = wait(start(path, resume=True))
        same = code == 0 and outcome(path) == expected
        right &= same
        print(f"run {trial:2}: killed {', '.join(told) or 'too late'}; resumed: {'same bytes' if same else 'DIFFERENT'}",
              flush=True)
    return right


def fill_disks(folder: Path, sizes: list[int], draw: random.Random) -> bool:
    assert wait(start(folder / "roomy")) == 0
    expected = outcome(folder / "roomy")
    disk, right = folder / "disk", True
    disk.mkdir()
    for size in sizes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            code = wait(start(disk / "run"))
            whole = all(line.endswith("\n") for file in disk.glob("run/*.jsonl") for line in open(file))
            left = [file.name for file in disk.rglob("*.tmp")]
            subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
            resumed = wait(start(disk / "run", resume=True))
            same = resumed == 0 and outcome(disk / "run") == expected
            fine = code in (0, NO_SPACE) and whole and not left and same
            right &= fine
            print(f"{size:4} KiB: {'full' if code == NO_SPACE else 'enough' if code == 0 else f'exit code {code}'}; "
                  f"{'records whole' if whole and not left else f'HALF-WRITTEN {left}'}; resumed with space: "
                  f"{'same bytes' if same else 'DIFFERENT'}", flush=True)
        finally:
            subprocess.run(["umount", disk], check=True)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="runs to kill, some of them several times")
    parser.add_argument("--disks", type=int, default=0, help="disks to fill (tmpfs: needs root)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    # Most modules are imported where a run first needs them: here, and not in each of its processes.
    LoadedTask(CONFIG, Progress()).experiment(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        right = kill_runs(Path(folder), arguments.kills, draw) if arguments.kills else True
        if arguments.disks:
            sizes = [round(4 + 700 * i / arguments.disks) for i in range(arguments.disks)]
            right &= fill_disks(Path(folder), sizes, draw)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
