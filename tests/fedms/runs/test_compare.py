"""Comparisons and tuning: cached by configuration, in one process or several; and the tests of difference."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import doubling
from synthetic import write_run

from fedms import report
from fedms.config import ConfigError, load_config, read_tables, registry
from fedms.progress import Progress
from fedms.report.significance import differences, holm
from fedms.runs import batch, experiment, tune
from fedms.runs.workers import WorkerDied, in_processes
from fedms.storage.records import RunRecords, comparable
from fedms.storage.validation import read_validation

SMALL = ["data.max_samples=120", "clients.count=2", "clients.unseen=0", "stage1.rounds=1", "stage2.rounds=1",
         "data.partition=iid", "run.threads=1"]


def config(*sets):
    return load_config("digits", [*SMALL, *sets])


class Heard(Progress):
    def __init__(self):
        self.visits, self.notes, self.ended = 0, [], []

    def visit(self, stage, round, client, **metrics):
        self.visits += 1

    def note(self, text):
        self.notes.append(text)

    def done(self, text):
        self.ended.append(text)


def everything(folder):
    return {path.name: json.dumps(comparable(RunRecords.read(path))) for path in sorted(folder.iterdir())}


def test_processes_give_what_one_does_and_ended_runs_stay(tmp_path):
    names = ["fedavg", "ditto"]
    first = Heard()
    batch.compare(config(), names, [0], tmp_path / "many", jobs=2, progress=first)
    assert first.visits == 8 and sorted(text.split(",")[0] for text in first.ended) == sorted(names)
    batch.compare(config(), names, [0], tmp_path / "one")
    assert everything(tmp_path / "many") == everything(tmp_path / "one")

    stamp = (tmp_path / "many/ditto-seed0/summary.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "many/fedavg-seed0")
    again = Heard()
    batch.compare(config(), names, [0], tmp_path / "many", progress=again)
    assert again.visits == 4 and "1 of 2 runs have ended already" in again.notes[0]
    assert (tmp_path / "many/ditto-seed0/summary.json").stat().st_mtime_ns == stamp
    assert everything(tmp_path / "many") == everything(tmp_path / "one")

    with pytest.raises(ConfigError, match="stage1.lr: 0.02, but the run in .*ditto-seed0 has 0.01"):
        batch.compare(config("stage1.lr=0.02"), ["ditto"], [0], tmp_path / "many")


def test_tuning_tries_all_methods_alike_reads_no_test_label_and_goes_on(tmp_path, monkeypatch):
    found = tune.tune(config("stage1.rounds=3"), ["ditto", "local"], tmp_path, count=2)
    assert [(t.method, t.number) for t in found] == [("ditto", 0), ("ditto", 1), ("local", 0), ("local", 1)]
    assert found[0].values == {"stage1.lr": 0.01, "stage2.lr": 0.005, "ditto.pull": 0.1}
    for trial in found:
        records = RunRecords.read(trial.folder)
        assert records.summary is None and records.clients == [] and len(records.rounds) == 2     # 3 / 4 and 1 / 4, up
        assert (trial.score, trial.loss) == read_validation(trial.folder)
    best = min(found[:2], key=lambda t: (-t.score, t.loss))
    chosen = tune.chosen(tmp_path, config())
    assert chosen["ditto"].ditto.pull == best.values["ditto.pull"] and set(chosen) == {"ditto", "local"}
    assert set(read_tables(tmp_path / "ditto.toml")) == {"stage1", "stage2", "ditto"}

    monkeypatch.setattr(experiment, "LoadedTask", None)          # nothing is loaded: all is there
    assert tune.tune(config("stage1.rounds=3"), ["ditto", "local"], tmp_path, count=2) == found


def test_trials_lie_in_their_ranges_and_repeat():
    for method in registry.method_names():
        found = tune.trials(config(), method, 8)
        assert len(found) == 8 and found == tune.trials(config(), method, 8)
        assert len({tuple(values.items()) for values in found}) == 8
        for constant in tune.constants(method):
            assert all(constant.low * 0.99 <= values[constant.key] <= constant.high * 1.01 for values in found[1:])
            tune.replaced(config(f"run.method={method}"), found[-1])
    assert len(tune.trials(config(), "fedms", 1)) == 1


def test_a_dead_process_is_named():
    heard = Heard()
    assert sorted(in_processes(doubling.start, [1, 2, 3], 2, heard, lambda: False)) == [(1, 2), (2, 4), (3, 6)]
    with pytest.raises(WorkerDied, match="one of 2 worker processes was killed; if memory ran out, use fewer --jobs"):
        list(in_processes(doubling.start, ["die"], 2, heard, lambda: False))


def test_processes_end_with_the_one_that_started_them():
    code = ("import doubling; from fedms.progress import Progress; from fedms.runs.workers import in_processes; "
            "list(in_processes(doubling.start, ['wait', 'wait'], 2, Progress(), lambda: False))")
    path = os.pathsep.join([str(Path(doubling.__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert [parent.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
    parent.kill()
    rest, _ = parent.communicate(timeout=60)    # whose end comes when the last process that could write to it has ended
    assert rest == ""


def test_processes_are_dealt_their_environments():
    # As many items as processes, and each takes a while to start: which of them does an item is not known.
    seen = {gpu for _, gpu in in_processes(doubling.start, ["gpu"] * 8, 2, Heard(), lambda: False,
                                           [{"GPU_OF_A_TEST": "a"}, {"GPU_OF_A_TEST": "b"}, {"GPU_OF_A_TEST": "never"}])}
    assert seen and seen <= {"a", "b"}


def test_holm():
    # By hand: 0.01 * 4, then 0.02 * 3, then max of that and 0.03 * 2, then 0.5.
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_differences_are_paired_by_client_and_seed(tmp_path):
    for seed in (0, 1):
        for method in ("local", "fedavg", "fedms"):
            write_run(tmp_path / f"{method}-seed{seed}", method, seed)
    runs, _ = report.read_runs(tmp_path)
    local, fedavg = differences(runs)
    assert (local.against, fedavg.against, local.pairs) == ("local", "fedavg", 24)
    seen = {(r.method, r.seed, c["id"]): c["accuracy"]["personalized"] for r in runs for c in r.clients if not c["unseen"]}
    gaps = [v - seen["local", seed, i] for (method, seed, i), v in seen.items() if method == "fedms"]
    assert local.gap == pytest.approx(sum(gaps) / 24) and local.better == sum(g > 0 for g in gaps)
    assert local.corrected == pytest.approx(min(1, 2 * min(local.p, fedavg.p)) if local.p < fedavg.p else
                                            max(local.p, 2 * fedavg.p))
    assert differences(runs[:2]) == []
    assert "fedms against the others" in (report.write_comparison(tmp_path)[1]).read_text()


def test_processes_are_killed_when_nobody_waits_for_them():
    """As by a second Ctrl-C: the items under way take ten minutes."""
    processes = in_processes(doubling.start, [1, "wait", "wait"], 2, Heard(), lambda: False)
    started = time.monotonic()
    assert next(processes) == (1, 2)
    processes.close()
    assert time.monotonic() - started < 60 and multiprocessing.active_children() == []

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_processes(doubling.start, ["wait"], 2, Heard(), interrupted))
    assert multiprocessing.active_children() == []


def test_ctrl_c_does_not_reach_processes_that_start():
    assert list(in_processes(doubling.start, ["spared"], 1, Heard(), lambda: False)) == [("spared", True)]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
