"""Visits that runs of a comparison have in common: made once, with the records of runs by themselves."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedms.config import load_config
from fedms.errors import Interrupted
from fedms.federated import lockstep, shared_visits
from fedms.federated.shared_visits import SharedVisits, _is_due
from fedms.methods import steps
from fedms.progress import Progress
from fedms.runs import batch
from fedms.runs.experiment import LoadedTask
from fedms.runs.run import SHARED
from fedms.storage.records import RunRecords, comparable
from fedms.training.flop_meter import FlopMeter

SMALL = ["data.max_samples=60", "clients.count=2", "clients.unseen=0", "stage1.rounds=2", "stage2.rounds=1", "data.partition=iid",
         "run.threads=1", "sal.schedule=fixed", "sal.depth=2", "lora.dropout=0.1"]
NAMES = ["fedavg", "ditto", "fedms", "fedms_plus"]
OF_FEDAVG = 2 * 3       # visits, in both stages


def config(*sets):
    return load_config("digits", [*SMALL, *sets])


@pytest.fixture
def made(monkeypatch):
    """The numbers of the clients that were visited in the way of federated averaging, in a list."""
    visited, carry_out = [], steps._averaging_visit

    def counted(model, client, *arguments):
        visited.append(client.id)
        return (yield from carry_out(model, client, *arguments))
    monkeypatch.setattr(steps, "_averaging_visit", counted)
    return visited


def records(folder: Path) -> dict[str, str]:
    """All records of all runs but times and peak memory, and the note that some are shared."""
    def without_note(value):
        if isinstance(value, dict):
            return {key: without_note(part) for key, part in value.items()}
        return [without_note(part) for part in value if part != SHARED] if isinstance(value, list) else value
    return {path.name: json.dumps(without_note(comparable(RunRecords.read(path)))) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A comparison whose runs share nothing."""
    out = tmp_path_factory.mktemp("alone")
    batch.compare(config(), NAMES, [0], out, share=False)
    return out


def test_the_records_are_those_of_runs_by_themselves(tmp_path, alone, made):
    batch.compare(config(), NAMES, [0], tmp_path)
    # fedms_plus goes on with the global expert in stage 2, from other random draws.
    assert len(made) == OF_FEDAVG + 2
    assert records(tmp_path) == records(alone)          # and the folder of shared visits is gone
    for name in NAMES:
        shared, own = RunRecords.read(tmp_path / f"{name}-seed0"), RunRecords.read(alone / f"{name}-seed0")
        assert [note for note in shared.summary["notes"] if note not in own.summary["notes"]] == [SHARED]
        for line in shared.rounds:
            of_round = [visit for visit in shared.visits if (visit["stage"], visit["round"]) == (line["stage"], line["round"])]
            assert line["seconds"] >= sum(visit["seconds"] for visit in of_round) > 0
        assert shared.summary["seconds"] >= sum(line["seconds"] for line in shared.rounds)
    first, other = (RunRecords.read(tmp_path / f"{name}-seed0").visits[0] for name in ("fedavg", "fedms"))
    assert other["seconds"] == pytest.approx(first["seconds"], abs=0.1) and other["peak_memory_bytes"] >= first["peak_memory_bytes"] / 2


class Calls:
    """Is true from the n-th call on."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left < 0


class Killed(BaseException):
    """Stands for the end of the process in the middle of a visit."""


def test_what_was_stopped_or_killed_goes_on(tmp_path, alone, made, monkeypatch):
    shared = tmp_path / batch.SHARED_VISITS
    for module, name, count in ((lockstep, "train", 1), (shared_visits, "_written", 3)):
        real, soon = getattr(module, name), Calls(count)

        def killed(*arguments, **settings):
            if soon():
                raise Killed
            return real(*arguments, **settings)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, killed)
            batch.compare(config(), NAMES, [0], tmp_path)
    # The first of the visits was stored before the training of the second, three more before the fifth was.
    assert len(list(shared.glob("*.constant"))) == 4
    with pytest.raises(Interrupted):
        batch.compare(config(), NAMES, [0], tmp_path, stop=Calls(11))           # in the first rounds of ditto
    assert len(list(shared.glob("*.constant"))) == OF_FEDAVG
    assert all(file.stat().st_mode & 0o077 == 0 for file in (shared, *shared.iterdir()))
    ended = len(made)
    batch.compare(config(), NAMES, [0], tmp_path)
    assert len(made) == ended + 2 and records(tmp_path) == records(alone)


def test_damaged_files_are_made_again(tmp_path, alone, made):
    with pytest.raises(Interrupted):
        batch.compare(config(), NAMES, [0], tmp_path, stop=Calls(11))
    files = sorted((tmp_path / batch.SHARED_VISITS).glob("*.constant"))
    assert len(files) == OF_FEDAVG
    for number, file in enumerate(files):
        whole = file.read_bytes()
        file.write_bytes(whole[:len(whole) // 2] if number % 2 else whole[:-1] + bytes([whole[-1] ^ 1]))
    batch.compare(config(), NAMES, [0], tmp_path)
    assert records(tmp_path) == records(alone) and len(made) > OF_FEDAVG + 2


def test_to_replace_runs_is_to_make_their_visits_anew(tmp_path, made):
    with pytest.raises(Interrupted):
        batch.compare(config(), ["fedavg"], [0], tmp_path, stop=Calls(4))
    made.clear()
    batch.compare(config(), ["fedavg"], [0], tmp_path, overwrite=True)
    assert len(made) == OF_FEDAVG


def test_another_setting_is_another_visit(tmp_path, alone, made):
    other = config("stage1.lr=0.02")
    batch.compare(config(), ["fedavg", "ditto"], [0], tmp_path, settings={"ditto": other})
    assert len(made) == 2 * OF_FEDAVG
    assert records(tmp_path)["fedavg-seed0"] == records(alone)["fedavg-seed0"]


def test_what_visits_depend_on(tmp_path):
    task = LoadedTask(config(), Progress())

    def fingerprint(*sets):
        return SharedVisits(tmp_path, task.model, config(*sets)).cache.fingerprint
    same = fingerprint()
    for key in ("run.method=ditto", "gate.lr=0.5", "stage2.lr=0.5", "ditto.pull=3.0", "plus.held_out=0.5", "run.workers=2"):
        assert fingerprint(key) == same, key
    for key in ("run.seed=1", "run.threads=2", "lora.dropout=0.2", "lora.rank=3", "aggregate.rule=\"freeze_a\"", "data.augment=[\"flip\"]",
                "wire.dtype=int8", "sal.cache=off", "run.method=ffa_lora", "clients.max_change=3.0"):
        assert fingerprint(key) != same, key


def test_a_visit_is_taken_where_it_would_cost_the_same():
    meter = FlopMeter()
    meter.paid = {"a", "b"}
    costs = {"flops": 1, "seconds": 0.5, "peak_memory_bytes": 1}
    assert _is_due({**costs, "paid": ["c"], "found": ["a"]}, meter) and _is_due({**costs, "paid": [], "found": []}, meter)
    assert not _is_due({**costs, "paid": ["a"], "found": []}, meter)        # it would not pay again
    assert not _is_due({**costs, "paid": [], "found": ["c"]}, meter)        # it would have to pay first
