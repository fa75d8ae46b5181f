"""The records of the study: one line of JSON for each run, enough for every figure of the page and small enough to commit.

A study can so go on elsewhere. A record counts only for the configuration it was made with, which it holds: that is compared
with the run as it is planned now, keys that are younger than the record having their defaults. Records of other settings
stay in the file, and are named and left out.
"""
from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.study.plan import ABLATIONS, StudyRun
from fedms.config import config_from_dict, dump_toml, of_method
from fedms.errors import ConfigError, Interrupted, RunFolderError
from fedms.foreign import parse_json
from fedms.progress import Progress
from fedms.report.numbers import flops_by_round
from fedms.runs.batch import BatchRun, BatchRunner
from fedms.runs.workers import in_processes
from fedms.storage.durable import FolderLock, write_durably
from fedms.storage.records import RunRecords, renamed

ROOT = Path(__file__).parents[2]
# What a record takes of a run's summary, and of the line of a client.
_OF_SUMMARY = ("personalized_accuracy", "global_test_accuracy", "zero_shot_accuracy", "macro_f1", "unseen_accuracy", "gate",
               "final_depth", "trainable_percent", "bytes_up", "bytes_down", "flops", "seconds", "peak_memory_bytes")
_OF_CLIENT = ("id", "group", "unseen", "n_train", "n_test", "accuracy", "gate_mean")
# Records of earlier versions have no id, but a label: that of an ablation, or the method.
EARLIER_IDS = {ablation.label: ablation.id for ablation in ABLATIONS.values()}


def carry_out(planned: Sequence[StudyRun], records: Path, work: Path, *, jobs: int = 1,
              say: Callable[[str], None] = print, stop: Callable[[], bool] = lambda: False) -> int:
    """Carry out the runs that have no record yet, and add their records to the file one by one.

    Args:
        planned: The runs of the study.
        records: The file of the records.
        work: Where run folders are kept. A run that was killed goes on from its last round.
        jobs: Number of runs at a time.
        say: Called with a line about each run.
        stop: Asked between clients whether to stop. Runs under way go on at the next call.

    Returns:
        The number of runs still to do: 0 when the study is whole.

    Raises:
        RunFolderError: If another process works on these records, or they cannot be read or written.
    """
    records.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(records.parent)
    except BlockingIOError as error:
        raise RunFolderError(f"{records.parent}: {error}, another study; wait for its end") from None
    try:
        lines = read_records(records)
        known = set(map(key_of, lines))
        todo = [run for run in planned if run.key not in known]
        say(f"{len(planned) - len(todo)} of {len(planned)} runs are recorded in {records}")
        left = len(todo)
        for run, line in _results(todo, work, jobs, stop):
            lines.append(line)
            text = "".join(json.dumps(each, sort_keys=True, ensure_ascii=False) + "\n" for each in lines)
            try:
                write_durably(records, text.encode())
            except OSError as error:
                raise RunFolderError(f"{records}: cannot be written: {error.strerror}") from error
            left -= 1
            say(f"{run.title}: {100 * line['personalized_accuracy']['mean']:.1f} % in {line['seconds']:.0f} s; "
                f"{left} runs to do")
        return left
    finally:
        lock.release()


def _results(todo: Sequence[StudyRun], work: Path, jobs: int,
             stop: Callable[[], bool]) -> Iterator[tuple[StudyRun, dict[str, Any]]]:
    """Carry out runs, and yield each with its record. Fewer are yielded if `stop` says so."""
    try:
        if jobs > 1 and todo:
            yield from in_processes(partial(Recorder, work), todo, jobs, Progress(), stop)
        else:
            record = Recorder(work)
            yield from ((run, record(run, Progress(), stop)) for run in todo)
    except Interrupted:
        return


class Recorder:
    """Carries out runs one after the other, and makes their records.

    Args:
        work: Where run folders are kept.
    """

    def __init__(self, work: Path) -> None:
        self.work, self._carry_out_one = work, BatchRunner()

    def __call__(self, run: StudyRun, progress: Progress, stop: Callable[[], bool]) -> dict[str, Any]:
        """Carry out a run, and return its record as plain data."""
        folder = self.work / run.setting.name / f"{run.id}-seed{run.config.run.seed}"
        go = partial(self._carry_out_one, BatchRun(run.config, folder), progress, stop)
        try:
            summary = go()
        except ConfigError:                 # the folder holds a run with other settings
            summary = go(overwrite=True)
        assert summary is not None          # test data are read
        return {"config": run.values} | _rounded({
            "setting": run.setting.name, "id": run.id, "method": run.config.run.method, "seed": run.config.run.seed,
            "command": run.command, "model_fingerprint": summary["fingerprint"][:16],
            **machine(), **{key: summary[key] for key in _OF_SUMMARY},
            **_of_rounds(RunRecords.read(folder)),
            "clients": [{key: client[key] for key in _OF_CLIENT} for client in RunRecords.read(folder).clients]})


def _of_rounds(run: RunRecords) -> dict[str, list[Any]]:
    """Return what a record has of each round: validation accuracy, trained blocks, and what all clients did and sent in it."""
    return {"validation": [line["validation_accuracy"] for line in run.rounds], "round_depth": [line["depth"] for line in run.rounds],
            "round_bytes": [line["bytes_up"] + line["bytes_down"] for line in run.rounds], "round_flops": flops_by_round(run)}


def machine() -> dict[str, str]:
    """Return what a figure was made with: commit, version of PyTorch, and CPU."""
    import torch

    from fedms.storage.provenance import processor

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()

    # The study itself changes its records and its page; they are no part of what a figure was made with.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "python", "fedms_ext", "csrc")
    return {"commit": (git("rev-parse", "--short=7", "HEAD") or "unknown") + ("-dirty" if changed else ""),
            "torch": torch.__version__, "cpu": processor()}


def key_of(line: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return `StudyRun.key` of the run that a record is of; None if it has keys that the run file no longer has."""
    try:
        return line["id"], dump_toml(config_from_dict(of_method(line["config"])))
    except ConfigError:
        return None


def _rounded(value: Any) -> Any:
    """Return plain data with fractions rounded to four digits, a hundredth of a percent, and without nulls."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items() if each is not None}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; there are none if there is no file.

    Raises:
        RunFolderError: If a line is damaged.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = renamed(parse_json(text))
            line["id"] = line["id"] if "id" in line else EARLIER_IDS.get(line["label"], line["label"])
            line["config"]["run"], line["personalized_accuracy"]["mean"]
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"{path}, line {number}: not a record of the study ({error}); remove the line") from None
        lines.append(line)
    return lines
