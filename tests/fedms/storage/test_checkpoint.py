"""Checkpoints: exact, verified, atomic; and runs that stop anywhere and go on as if nothing had happened."""
from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from fedms import methods
from fedms.config import ConfigError, load_config
from fedms.engines.base import Interrupted
from fedms.progress import Progress
from fedms.runs import batch, run
from fedms.storage import checkpoint, durable
from fedms.storage.checkpoint import CheckpointError, CheckpointFolder, Snapshot
from fedms.errors import RunFolderError
from fedms.storage.records import RunRecords, comparable
from fedms.storage.run_folder import RunFolder

CONFIG = load_config("digits", ["run.method=fedms", "data.max_samples=200", "clients.count=3", "clients.unseen=0", "clients.fraction=0.7",
                                "stage1.rounds=2", "stage2.rounds=2", "data.partition=iid", "lora.dropout=0.1",
                                "sal.schedule=every", "sal.every=1", "clients.optimizer=kept", "run.threads=1"])


def outcome(path):
    """All that a run leaves: its records but for the exempt fields, and the tensors of its last checkpoint."""
    snapshot, notes = CheckpointFolder(path / "checkpoint").load()
    tensors = {**snapshot.tensors, **{f"{i}/{n}": t for i, own in snapshot.private.items() for n, t in own.items()}}
    digest = {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in tensors.items()}
    return json.dumps(comparable(RunRecords.read(path))), digest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    run.run(CONFIG, path)
    return outcome(path)


# The store

def snapshot(value=0.0, clients=3):
    return Snapshot({"round": value, "queue": [0.1, 1 / 3]},
                    {"a": torch.randn(3, 4) + value, "b": torch.randn(2, dtype=torch.float64)},
                    {i: {"x": torch.randn(5), "empty": torch.empty(0)} for i in range(clients)} | {clients: {}})


def same(a, b):
    def equal(x, y):
        return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)
    return (a.state == b.state and equal(a.tensors, b.tensors) and a.private.keys() == b.private.keys()
            and all(equal(a.private[i], b.private[i]) for i in a.private))


def test_what_is_saved_comes_back(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoint")
    assert folder.load() == (None, [])
    saved = snapshot()
    folder.save(saved)
    loaded, notes = CheckpointFolder(tmp_path / "checkpoint").load()
    assert same(loaded, saved) and notes == []


def test_two_are_kept_and_unchanged_clients_are_not_written_again(tmp_path):
    folder = CheckpointFolder(tmp_path)
    first = snapshot()
    folder.save(first)
    for value in (1.0, 2.0, 3.0):
        last = Snapshot({"round": value}, {"a": torch.full((2,), value)},
                        {**first.private, 1: {"x": torch.full((5,), value)}})
        folder.save(last)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if n.endswith(".json")] == ["000003.json", "000004.json"]
    assert len(names) == 2 + 2 + 2 + 1      # manifests, servers, client 1 twice, the first object of the others
    assert same(CheckpointFolder(tmp_path).load()[0], last)


def test_every_damage_is_noticed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    before = snapshot(1.0)
    after = Snapshot({"round": 2.0}, {"a": torch.randn(3)}, {**snapshot().private, 0: before.private[0]})
    folder.save(before)
    folder.save(after)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    newest = {tmp_path / "000002.json"} | {tmp_path / f"{name}.safetensors" for name in _objects(tmp_path / "000002.json")}
    assert len(whole) == 6 and len(newest) == 4     # the oldest private object belongs to both
    generator = torch.Generator().manual_seed(0)
    for path, data in whole.items():
        for trial in range(40):
            place = int(torch.randint(len(data), (), generator=generator))
            flipped = data[:place] + bytes([data[place] ^ 1 << trial % 8]) + data[place + 1:]
            path.write_bytes(flipped if trial % 2 else data[:place])
            try:
                loaded, notes = CheckpointFolder(tmp_path).load()
            except CheckpointError as error:        # damaged is what both of them need
                assert "no checkpoint is whole" in str(error) and path in newest and "json" not in path.name
            else:
                assert same(loaded, before if path in newest else after), path
                assert len(notes) == (path in newest)
        path.write_bytes(data)
    assert same(CheckpointFolder(tmp_path).load()[0], after)


def _objects(manifest):
    content = json.loads(manifest.read_bytes())["content"]
    return {content["server"], *content["private"].values()}


def test_a_damaged_checkpoint_is_replaced_by_the_next(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(snapshot(1.0))
    folder.save(snapshot(2.0))
    (tmp_path / "000002.json").write_text("{")
    again = CheckpointFolder(tmp_path)
    loaded, notes = again.load()
    assert loaded.state["round"] == 1.0 and "checkpoint 2 is damaged" in notes[0]
    third = snapshot(3.0)
    again.save(third)
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["000001.json", "000003.json"]
    assert same(CheckpointFolder(tmp_path).load()[0], third)


def test_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    CheckpointFolder(tmp_path).save(snapshot(1.0))
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {
        1: lambda content: {**content, "state": {**content["state"], "two": True}},
        2: lambda content: {**content, "state": {**content["state"], "three": content["format"]}}})
    folder = CheckpointFolder(tmp_path)
    assert folder.load()[0].state == {"round": 1.0, "queue": [0.1, 1 / 3], "two": True, "three": 2}
    folder.save(snapshot(2.0))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match=r"000002.json: written by a newer version \(format 3; this one reads up to 2\)"):
        CheckpointFolder(tmp_path).load()


# Runs that stop

class Calls:
    """Counts calls; True, or an error, at one of them."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self):
        self.count += 1
        return self.count == self.at


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, undisturbed):
    for at in range(1, 30):
        path = tmp_path / str(at)
        try:
            run.run(CONFIG, path, stop=Calls(at))
        except Interrupted:
            assert not (path / "summary.json").exists()
        else:
            break
        run.run(CONFIG, path, resume=True)
        assert outcome(path) == undisturbed, at
    assert at == 2 * 4 + 3 + 1      # two clients in each of four rounds, three clients evaluated


def test_a_run_stopped_again_and_again(tmp_path, undisturbed):
    stops = 0
    while True:
        try:
            run.run(CONFIG, tmp_path / "run", resume=True, stop=Calls(2))
            break
        except Interrupted:
            stops += 1
            if stops > 8:       # evaluation has no checkpoint of its own: it begins again, and must be let through
                run.run(CONFIG, tmp_path / "run", resume=True)
                break
    assert stops >= 8 and outcome(tmp_path / "run") == undisturbed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("failure", [Killed(), OSError(errno.ENOSPC, "No space left on device")],
                         ids=["killed", "disk full"])
@pytest.mark.parametrize("point", ["before", "after"])
def test_every_durable_write_may_be_the_last(tmp_path, undisturbed, monkeypatch, failure, point):
    replace = os.replace
    for at in range(1, 40):
        calls, path = Calls(at), tmp_path / str(at)

        def failing(source, target):
            failed = calls()
            if failed and point == "before":
                raise failure
            replace(source, target)
            if failed:
                raise failure

        monkeypatch.setattr(durable.os, "replace", failing)
        try:
            run.run(CONFIG, path)
        except (Killed, CheckpointError, RunFolderError) as error:
            monkeypatch.setattr(durable.os, "replace", replace)
            if not isinstance(error, Killed):
                assert "No space left on device" in str(error)
        else:
            break
        run.run(CONFIG, path, resume=True)
        assert outcome(path) == undisturbed, at
        assert not [p for p in path.rglob("*") if p.name.endswith(".tmp")]
    # Configuration, data; two objects and a manifest for each round; final tensors, outcome, validation, summary.
    writes = 2 + 4 * 3 + 4
    assert at == writes + 1


def test_a_line_that_does_not_fit_leaves_no_part(tmp_path, undisturbed, monkeypatch):
    from fedms.storage import run_folder

    def short(file, data, calls=Calls(5)):
        if calls():
            os.write(file, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        os.write(file, data)

    monkeypatch.setattr(run_folder, "_write_all", short)
    with pytest.raises(RunFolderError, match="visits.jsonl: cannot be written: No space left on device"):
        run.run(CONFIG, tmp_path / "run")
    assert (tmp_path / "run/visits.jsonl").read_text().endswith("}\n")
    monkeypatch.undo()
    run.run(CONFIG, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == undisturbed


def test_resuming_what_is_done_or_was_never_begun(tmp_path, undisturbed):
    path = tmp_path / "run"
    summary = run.run(CONFIG, path, resume=True)
    assert outcome(path) == undisturbed
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert run.run(CONFIG, path, resume=True) == summary
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")}.keys() == before.keys()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.is_file())


def test_a_comparison_goes_on(tmp_path):
    with pytest.raises(Interrupted):
        batch.compare(CONFIG, ["local", "fedavg"], [0, 1], tmp_path / "stopped", stop=Calls(30))
    assert sorted(p.parent.name for p in tmp_path.glob("stopped/*/summary.json")) == ["fedavg-seed0", "local-seed0"]
    batch.compare(CONFIG, ["local", "fedavg"], [0, 1], tmp_path / "stopped")
    batch.compare(CONFIG, ["local", "fedavg"], [0, 1], tmp_path / "whole")
    for name in ("local-seed0", "fedavg-seed0", "local-seed1", "fedavg-seed1"):
        assert outcome(tmp_path / "stopped" / name) == outcome(tmp_path / "whole" / name), name


def test_a_damaged_checkpoint_in_a_run_is_survived(tmp_path, undisturbed):
    path, notes = tmp_path / "run", []
    with pytest.raises(Interrupted):
        run.run(CONFIG, path, stop=Calls(6))
    newest = max((path / "checkpoint").glob("*.json"))
    newest.write_bytes(newest.read_bytes()[:100])
    progress = Progress()
    progress.note = notes.append
    run.run(CONFIG, path, resume=True, progress=progress)
    assert any("is damaged" in note for note in notes) and outcome(path) == undisturbed


# Refusals

def test_another_configuration_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run.run(CONFIG, tmp_path / "run", stop=Calls(2))
    other = load_config("digits", ["data.max_samples=200"])
    with pytest.raises(ConfigError, match=r"clients.count: 6, but the run in .* has 3"):
        run.run(other, tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="exists and is not empty"):
        run.run(CONFIG, tmp_path / "run")


def test_lost_records_are_noticed(tmp_path):
    with pytest.raises(Interrupted):
        run.run(CONFIG, tmp_path / "run", stop=Calls(6))
    (tmp_path / "run/visits.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="visits.jsonl: is shorter than when the checkpoint was written"):
        run.run(CONFIG, tmp_path / "run", resume=True)


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    code = ("import sys; from fedms.storage.run_folder import *; from fedms.config import load_config\n"
            "try: RunFolder.create(sys.argv[1], load_config('digits'), overwrite=True)\n"
            "except RunFolderError as error: print(error)")
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True).stdout
    assert f"in use by the process {os.getpid()}, another run" in said
    assert (tmp_path / "run/config.toml").exists()
    folder.close()
    assert not (tmp_path / "run/.lock").exists()
    RunFolder.resume(tmp_path / "run", CONFIG).close()


def test_a_lock_outlives_nobody(tmp_path):
    code = ("import os, sys; from pathlib import Path; from fedms.storage.durable import FolderLock\n"
            "FolderLock(Path(sys.argv[1])); os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, tmp_path])
    assert (tmp_path / ".lock").exists()
    lock = durable.FolderLock(tmp_path)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        durable.FolderLock(tmp_path)
    lock.release()
    durable.FolderLock(tmp_path).release()


def test_out_of_memory_fails_the_client_alone(tmp_path, monkeypatch):
    steps = Calls(2)
    step = methods.create(CONFIG).__class__.client_step

    def exhausted(*args):
        if steps():
            torch.empty(1 << 60)        # what torch itself raises
        return step(*args)

    monkeypatch.setattr(methods.create(CONFIG).__class__, "client_step", exhausted)
    summary = run.run(CONFIG, tmp_path / "run")
    failed = [v for v in RunRecords.read(tmp_path / "run").visits if v["status"] == "failed"]
    assert len(failed) == 1 and failed[0]["reason"].startswith("out of memory")
    assert any("out of memory" in note for note in summary["notes"])
