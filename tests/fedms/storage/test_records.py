"""The run folder: written whole or not at all, and read back with its damage named."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fedms.config import ConfigError, dump_toml, load_config
from fedms.storage import records
from fedms.storage.records import CLIENT_FIELDS, EXEMPT, ROUND_FIELDS, SUMMARY_FIELDS, VISIT_FIELDS
from fedms.errors import RunFolderError
from fedms.storage.records import RunRecords, comparable, find_runs
from fedms.storage.run_folder import RunFolder
from synthetic import write_run

CONFIG = load_config("digits")
AS_CREATED = {"config.toml", "rounds.jsonl", "visits.jsonl", "clients.jsonl"}


def names(folder):
    return set(os.listdir(folder))


# Creating

@pytest.mark.parametrize("existing", [False, True])
def test_a_fresh_folder_holds_its_configuration(tmp_path, existing):
    path = tmp_path / "a" / "b"
    if existing:
        path.mkdir(parents=True)
    RunFolder.create(path, CONFIG).close()
    assert names(path) == AS_CREATED
    assert (path / "config.toml").read_text(encoding="utf-8") == dump_toml(CONFIG)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its configuration has the old keys; to whoever reads it, it has today's."""
    config = load_config("digits", ["run.method=fedms"])
    RunFolder.create(tmp_path, config).close()
    shutil.copy(Path(__file__).parents[2] / "helpers/config_format_1.toml", tmp_path / "config.toml")
    RunFolder.resume(tmp_path, config).close()
    assert RunRecords.read(tmp_path).config["gate"].get("held_out") is None
    RunFolder.resume(tmp_path, load_config("digits", ["run.method=fedms", "plus.held_out=0.3"])).close()     # another method's key
    with pytest.raises(ConfigError, match="gate.lr: 0.5, but the run in .* has 0.001"):
        RunFolder.resume(tmp_path, load_config("digits", ["run.method=fedms", "gate.lr=0.5"]))
    (tmp_path / "config.toml").write_text("format = 9\n")
    with pytest.raises(RunFolderError, match="format: got 9; accepted: 1 to 2"):
        RunRecords.read(tmp_path)


def test_the_working_folder_itself_can_be_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = RunFolder.create(".", CONFIG)
    out.append_round({"stage": "stage1", "round": 1})
    out.close()
    assert names(tmp_path) == AS_CREATED and len(RunRecords.read(tmp_path).rounds) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_is_refused(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="thesis.tex" if overwrite else "not empty.*--force"):
        RunFolder.create(tmp_path, CONFIG, overwrite=overwrite)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunFolderError, match="is no folder"):
        RunFolder.create(tmp_path / "out", CONFIG, overwrite=True)
    with pytest.raises(RunFolderError, match="cannot be written: Not a directory"):
        RunFolder.create(tmp_path / "out" / "deeper", CONFIG)


def test_an_earlier_run_is_replaced_only_if_asked(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "report.html").write_text("old")
    (path / "checkpoint").mkdir()
    (path / "checkpoint" / "state").write_text("old")
    (path / ".summary.json.tmp").write_text("left behind by a kill")
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder.create(path, CONFIG)
    assert RunRecords.read(path).summary is not None
    RunFolder.create(path, CONFIG, overwrite=True).close()
    assert names(path) == AS_CREATED
    assert RunRecords.read(path).rounds == []


def test_a_linked_folder_keeps_its_link(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    for _ in range(2):
        RunFolder.create(tmp_path / "link", CONFIG, overwrite=True).close()
        assert (tmp_path / "link").is_symlink() and names(real) == AS_CREATED


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, existing):
    path = tmp_path / "run"
    if existing:
        write_run(path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="cannot be written: No space left"):
        RunFolder.create(path, CONFIG, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert path.exists() == existing


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    if os.geteuid() == 0:  # root may write everywhere but where the system makes the files
        path = Path("/proc/fedms-run")
    else:
        tmp_path.chmod(0o555)
        path = tmp_path / "run"
    with pytest.raises(RunFolderError, match=f"{path}: cannot be written: "):
        RunFolder.create(path, CONFIG)


def test_a_vanished_folder_is_named_when_a_record_is_added(tmp_path):
    out = RunFolder.create(tmp_path / "run", CONFIG)
    os.rename(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(RunFolderError, match="rounds.jsonl: cannot be written"):
        out.append_round({"stage": "stage1", "round": 1})
    with pytest.raises(RunFolderError, match="cannot be written"):
        out.write_summary({})


# Writing records

def test_records_are_complete_and_plain(tmp_path):
    out = RunFolder.create(tmp_path / "run", CONFIG)
    out.append_round({"stage": "stage1", "round": 1, "loss": np.float32(0.5), "validation_accuracy": math.nan,
                      "depth": torch.tensor(2), "event": 'a "quoted"\nline – ü'})
    out.append_visit({"stage": "stage1", "round": 1, "client": np.int64(3), "loss": math.inf, "seconds": 0.1})
    out.append_client({"id": 0, "accuracy": {"personalized": np.float64(0.25)}, "unseen": np.bool_(True)})
    out.append_client({"id": 1, "accuracy": {}})
    out.write_summary({"method": "fedms", "gate": {"mean": -math.inf}, "notes": ("a", "b")})
    got = RunRecords.read(tmp_path / "run")
    for record, fields in ((got.rounds[0], ROUND_FIELDS), (got.visits[0], VISIT_FIELDS), (got.clients[0], CLIENT_FIELDS),
                           (got.summary, SUMMARY_FIELDS)):
        assert set(record) == set(fields) - records.OPTIONAL
    assert set(got.clients[0]["accuracy"]) == set(got.clients[1]["accuracy"]) == set(records.ACCURACY_FIELDS)
    assert got.rounds[0]["loss"] == 0.5 and got.rounds[0]["validation_accuracy"] is None
    assert got.rounds[0]["depth"] == 2 and got.rounds[0]["event"] == 'a "quoted"\nline – ü'
    assert got.visits[0]["client"] == 3 and got.visits[0]["loss"] is None
    assert got.clients[0]["accuracy"]["personalized"] == 0.25 and got.clients[0]["unseen"] is True
    assert got.summary["gate"] == {"mean": None} and got.summary["notes"] == ["a", "b"]
    assert "NaN" not in (tmp_path / "run" / "rounds.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("append", ["append_round", "append_visit", "append_client", "write_summary"])
def test_a_misspelled_field_is_refused(tmp_path, append):
    out = RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="unknown record field 'looss'"):
        getattr(out, append)({"looss": 1})


def test_the_same_records_give_the_same_bytes(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for name in names(a):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# Reading

def test_a_last_line_cut_off_is_dropped_and_noted(tmp_path):
    path = write_run(tmp_path / "run")
    whole = RunRecords.read(path)
    assert whole.notes == ()
    data = (path / "visits.jsonl").read_bytes()
    for cut in (1, 2, 40):
        (path / "visits.jsonl").write_bytes(data[:-cut])
        got = RunRecords.read(path)
        if cut == 1:  # only the newline is gone
            assert got.visits == whole.visits and got.notes == ()
        else:
            assert got.visits == whole.visits[:-1]
            assert got.notes == ("visits.jsonl: its last line is cut off and was left out",)


@pytest.mark.parametrize("damage", [b'{"stage": "sta', b"\x00\x00\x00", b"17", b"\xff\xfe", b"[]"])
def test_damage_in_the_middle_is_named_by_file_and_line(tmp_path, damage):
    path = write_run(tmp_path / "run")
    lines = (path / "rounds.jsonl").read_bytes().split(b"\n")
    lines[2] = damage
    (path / "rounds.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(RunFolderError, match=r"rounds\.jsonl, line 3: not a record"):
        RunRecords.read(path)


@pytest.mark.parametrize("name, content, message", [
    ("summary.json", "{", "summary.json: cannot be read"),
    ("summary.json", "[]", "summary.json: cannot be read: no JSON object"),
    ("config.toml", "[run", "config.toml: cannot be read"),
    ("config.toml", "[run]\nseed = 1\n", r"config.toml: run\.method is missing"),
    ("config.toml", 'run = "x"\n', r"config.toml: run\.method is missing"),
])
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    path = write_run(tmp_path / "run")
    (path / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        RunRecords.read(path)


def test_a_run_that_has_not_ended_has_no_summary(tmp_path):
    got = RunRecords.read(write_run(tmp_path / "run", stop_after=2))
    assert got.summary is None and len(got.rounds) == 2 and got.clients == []
    assert (got.method, got.seed) == ("fedms", 0)
    (tmp_path / "run" / "visits.jsonl").unlink()
    assert RunRecords.read(tmp_path / "run").visits == []


def test_finding_runs(tmp_path):
    with pytest.raises(RunFolderError, match="no such folder"):
        find_runs(tmp_path / "none")
    with pytest.raises(RunFolderError, match="holds no run"):
        find_runs(tmp_path)
    with pytest.raises(RunFolderError, match="no run folder"):
        RunRecords.read(tmp_path)
    b, a = write_run(tmp_path / "b"), write_run(tmp_path / "a")
    write_run(tmp_path / ".hidden")
    assert find_runs(tmp_path) == [a, b] and find_runs(a) == [a]


# Comparing

def test_runs_that_differ_in_exempt_fields_alone_are_comparable(tmp_path):
    a, b, c = (write_run(tmp_path / name) for name in "abc")

    def change(path, field, value):
        for name in ("rounds.jsonl", "visits.jsonl"):
            lines = [json.loads(line) for line in (path / name).read_text().splitlines()]
            (path / name).write_text("".join(
                json.dumps({**line, **({field: value} if field in line else {})}) + "\n" for line in lines))
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps({**summary, field: value}))

    for field in EXEMPT:
        change(b, field, 12345)
    change(c, "bytes_up", 12345)
    assert comparable(RunRecords.read(a)) == comparable(RunRecords.read(b)) != comparable(RunRecords.read(c))
    assert '"seconds"' not in json.dumps(comparable(RunRecords.read(a)))


def test_fields_that_had_another_name_are_read(tmp_path):
    folder = write_run(tmp_path / "run")
    before = RunRecords.read(folder)
    assert before.summary["personalized_accuracy"] and before.clients[0]["accuracy"]["personalized"] is not None
    for name in ("clients.jsonl", "summary.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("personalized", "personalised"))
        assert (folder / name).read_text() != text
    after = RunRecords.read(folder)
    assert (after.summary, after.clients) == (before.summary, before.clients)
