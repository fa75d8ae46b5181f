"""Bytes that a stranger may have made: every reader answers with its own error, whatever they are.

FEDMS_FULL=1 tries more than 200,000 files, otherwise a few thousand.
"""
from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from fedms.config import ConfigError, load_config
from fedms.data import make_dataset, read_shard
from fedms.data.inputs import DataError, TextInputs
from fedms.data.partitioning import ClientSplit, Partition
from fedms.data.shard import Shard, _checksum, write_shard
from fedms.errors import CheckpointError, RunFolderError
from fedms.exports.manifest import MANIFEST, read_manifest
from fedms.federated.server_state import unpack_server
from fedms.foreign import parse_json, parse_toml, printable, read_tensors
from fedms.report import render
from fedms.report.watch import RunState, view
from fedms.storage.checkpoint import CheckpointFolder, Snapshot, _digest
from fedms.storage.durable import SHARD, shard_about
from fedms.storage.final import SharedTensors, read_final, write_final
from fedms.storage.records import RunRecords
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save
from synthetic import write_run

FULL = bool(os.environ.get("FEDMS_FULL"))
DEEP = "[" * 100_000


def tries(few: int, many: int):
    return settings(max_examples=many if FULL else few, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**350) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["\ud800", "a\x00b\x1b", "../../etc/passwd", "x" * 400, "[/x]", "stage1", 2**63, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)


def places(value, path=()):
    """The paths to all values inside of one."""
    found = [path]
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw, good):
    """Plain data with one place of it replaced or left out; sometimes two."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(st.sampled_from([path for path in places(value) if path]))
        inner = value
        for key in above:
            inner = inner[key]
        if draw(st.booleans()):
            inner[last] = draw(VALUES)
        else:
            del inner[last]
        if not value:
            break
    return value


@st.composite
def damaged(draw, good):
    """Bytes with a few of them changed, cut off, or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from("change cut put".split()))
        if what == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[at:at + draw(st.integers(1, 40))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=6) | st.sampled_from([DEEP.encode()[:3000], b"9" * 5000]))
    return bytes(data)


# Formats

@pytest.mark.parametrize("text", ["", "nul", "[NaN]", "[Infinity]", "[1e999]", "[" + "9" * 400 + "]", DEEP, '["\\ud800"]',
                                  '{"a": "\\uDC00"}', b"\xff", b"\xff\xfe[\x00]\x00"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_that_is_one():
    assert parse_json('[1, -2.5e3, "\\ud83d\\ude00", null, true]') == [1, -2500.0, "\U0001f600", None, True]


@pytest.mark.parametrize("text", ["a=" + "[" * 5000, "a=" + "9" * 5000, "a", b"\xff"])
def test_what_is_no_toml_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_toml(text)


def test_text_that_can_be_printed():
    assert printable("a\x1b[31m\x00\u202eb\ud800") == "a\\x1b[31m\\x00\\u202eb\\ud800"
    assert printable("ü – 😀 <b>") == "ü – 😀 <b>"
    assert len(printable("x" * 10**6)) == 300


@pytest.mark.parametrize("line", ["[run]\nseed=" + "9" * 5000, "a=" + "[" * 5000, "[run]\nseed=" + "[" * 300 + "]" * 300,
                                  "[sal]\ncache_bytes='" + "9" * 400 + "TiB'", "[sal]\ncache_bytes=" + "9" * 400])
def test_run_files_that_are_none(tmp_path, line):
    (tmp_path / "x.toml").write_text(line)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.toml")
    assert max(map(len, caught.value.problems)) < 1000


@tries(40, 40_000)
@given(st.data())
def test_any_run_file(tmp_path, data):
    good = b'[run]\nmethod = "fedms"\nseed = 3\n[stage1]\nlr = 0.01\n[sal]\ncache_bytes = "2GiB"\norder = [1, 2]\n'
    (tmp_path / "x.toml").write_bytes(data.draw(damaged(good)))
    try:
        load_config(tmp_path / "x.toml")
    except ConfigError as error:
        str(error).encode()


@tries(80, 60_000)
@given(st.data())
def test_any_tensors(data):
    good = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, {"x": "y"})
    try:
        read_tensors(data.draw(damaged(good)))
    except ValueError:
        pass


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "X", 1, None])
def test_tensors_of_a_kind_that_pytorch_does_not_have(dtype):
    head = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 1]}}).encode()
    try:
        read_tensors(struct.pack("<Q", len(head)) + head + b"\x00")
    except ValueError as error:
        assert "safetensors" in str(error)


# Run folders

@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "good", clients=2, unseen=1, rounds=(1, 1))


@pytest.fixture(scope="module")
def run_folder(good_run, tmp_path_factory):
    """A folder beside, with files of the good run in it, to be changed by each try."""
    folder = tmp_path_factory.mktemp("changed")
    for path in good_run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@tries(20, 4_000)
@given(st.data())
def test_any_run_folder(good_run, run_folder, data):
    """It is refused, or every reader of records can show it."""
    name = data.draw(st.sampled_from(["rounds.jsonl", "visits.jsonl", "clients.jsonl", "summary.json"]))
    good = (good_run / name).read_bytes()
    lines = good.splitlines(keepends=True) if name.endswith("l") else [good]
    number = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        lines[number] = json.dumps(data.draw(mutated(json.loads(lines[number])))).encode() + b"\n"
    else:
        lines[number] = data.draw(damaged(lines[number]))
    (run_folder / name).write_bytes(b"".join(lines))
    try:
        records = RunRecords.read(run_folder)
        assert all(isinstance(each["round"], int) for each in (*records.rounds, *records.visits))
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            Console(file=nowhere, width=200).print(view([RunState.read(run_folder)]))
    except RunFolderError as error:
        str(error).encode()
    finally:
        (run_folder / name).write_bytes(good)


ODD = {"xss": '<script>alert(1)</script>"><img src=x onerror=alert(1)>', "formula": r"a$\frac{$b", "markup": "[/nope]",
       "control": "a\x00b\x1b[31m", "surrogate": "\\ud800", "long": "x" * 5000}


@pytest.mark.parametrize("name", ODD)
def test_names_are_text_in_the_page_and_in_the_terminal(good_run, tmp_path, name):
    folder = tmp_path / "[red]"
    folder.mkdir()
    for path in good_run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for file, field in (("clients.jsonl", "group"), ("rounds.jsonl", "stage"), ("rounds.jsonl", "event"),
                        ("visits.jsonl", "reason")):
        lines = [{**json.loads(line), field: ODD[name]} for line in (folder / file).read_text().splitlines()]
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = render([RunRecords.read(folder)])
    assert "<script>alert" not in html and "<img src=x" not in html and "\x1b" not in html and "\x00" not in html
    assert "x" * 3000 not in html
    html.encode()
    out = Console(width=250, record=True, file=open(os.devnull, "w"))
    out.print(view([RunState.read(folder)]))
    assert "[red]" in out.export_text() and "\x1b" not in out.export_text()


# Checkpoints

def checkpoint(folder: Path, content, *, sha: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    CheckpointFolder(folder).save(Snapshot({}, {"t": torch.ones(2)}, {1: {"p": torch.ones(1)}}))
    path = next(folder.glob("*.json"))
    path.write_text(json.dumps({"content": content, "sha256": _digest(content) if sha else "x"}))
    return path


@pytest.mark.parametrize("content", [{}, {"format": "2"}, {"format": 0}, {"format": 1, "state": {}}, {"format": True},
                                     {"format": 2, "state": {}, "server": "../x", "private": {}},
                                     {"format": 2, "state": {}, "server": "0" * 64, "private": {"-1": "0" * 64}},
                                     {"format": 2, "state": [], "server": "0" * 64, "private": {}}, []])
def test_checkpoints_of_strangers(tmp_path, content):
    path = checkpoint(tmp_path / "c", content)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        CheckpointFolder(tmp_path / "c").load()
    path.write_bytes(b'{"sha256": "x", "content": ' + DEEP.encode())
    with pytest.raises(CheckpointError, match="nested too deeply"):
        CheckpointFolder(tmp_path / "c").load()


GOOD_SERVER = {"stage": "stage1", "round": 1, "applied_depth": 1, "final_depth": {"stage1": 1},
               "sal": {"depth": 1, "rounds": 0, "queue": [0.5]},
               "collected": {"weights": "samples", "streams": True, "replies": 0, "numbers": [], "mean_weights": {},
                             "residual_weights": {}}}


@tries(100, 50_000)
@given(mutated(GOOD_SERVER))
def test_any_state_of_a_server(plain):
    try:
        unpack_server(plain, {})
    except CheckpointError:
        pass


# What a run ended with

HEAD = {"stage": "done", "round": 3, "depth": 1, "applied_depth": 2}


def test_what_a_run_ended_with_comes_back(tmp_path):
    tensors = {"expert/a.lora_a": torch.randn(2, 3)}
    write_final(tmp_path, SharedTensors(**HEAD, tensors=tensors, constants={"c": torch.ones(2)}, statistics={}))
    found = read_final(tmp_path)
    assert {name: getattr(found, name) for name in HEAD} == HEAD and found.statistics == {}
    assert found.tensors.keys() == tensors.keys() and torch.equal(found.tensors["expert/a.lora_a"], tensors["expert/a.lora_a"])
    assert torch.equal(found.constants["c"], torch.ones(2))


@tries(40, 20_000)
@given(st.data())
def test_anything_that_a_run_may_have_ended_with(tmp_path, data):
    good = save({"tensors/a": torch.ones(2)}, {"final": json.dumps(data.draw(mutated(HEAD)))})
    (tmp_path / "final").mkdir(exist_ok=True)
    (tmp_path / "final/shared.safetensors").write_bytes(data.draw(st.just(good) | damaged(good)))
    try:
        assert {type(getattr(read_final(tmp_path), name)) for name in HEAD} == {str, int}
    except RunFolderError as error:
        str(error).encode("utf-8", "backslashreplace")


# Exports

GOOD_MANIFEST = {
    "format": 1, "kind": "mixture", "classes": ["a", "b"], "prompts": None, "clients": {"0": "x", "1": None}, "config": {},
    "model_fingerprint": "0", "model": {"id": "base"}, "elsewhere": [],
    "final": {"stage": "done", "round": 1, "depth": 1, "applied_depth": 1},
    "files": {"x": {"bytes": 1, "sha256": "0" * 64}}}


@tries(40, 40_000)
@given(mutated(GOOD_MANIFEST))
def test_any_manifest(tmp_path, content):
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    try:
        read_manifest(tmp_path)
    except RunFolderError as error:
        str(error).encode("utf-8", "backslashreplace")


@pytest.mark.parametrize("change", [{"files": None}, {"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}},
                                    {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, {"classes": []},
                                    {"model": {"id": "base", "trust_remote_code": True}}, {"final": {}}, {"kind": "evil"}])
def test_manifests_of_strangers(tmp_path, change):
    (tmp_path / MANIFEST).write_text(json.dumps({**GOOD_MANIFEST, **change}))
    with pytest.raises(RunFolderError, match=re.escape(MANIFEST)):
        read_manifest(tmp_path)


# Shards

def texts() -> Shard:
    inputs = TextInputs({"input_ids": torch.arange(12)}, torch.arange(0, 13, 2), {"input_ids": 0})
    dataset = make_dataset("d", inputs, torch.tensor([0, 1] * 3), ("a", "b"))
    split = ClientSplit(0, None, torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3]))
    return Shard(dataset, Partition((split,), (), torch.tensor([4]), ()), (None,))


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    write_shard(folder, texts())
    return folder, (folder / SHARD).read_bytes()


def test_a_shard_comes_back(shard):
    found = read_shard(shard[0])
    assert found.dataset.fingerprint == texts().dataset.fingerprint and shard_about(shard[0])["clients"][0]["n_train"] == 2


def test_each_flipped_bit_of_a_shard_is_noticed(tmp_path, shard):
    """But for those that mean nothing: spaces in the header."""
    good = shard[1]
    size = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, size, 1 if FULL else 7), *range(size, len(good), 1 if FULL else 5)]:
        raw = bytearray(good)
        raw[at] ^= 0x40
        (tmp_path / SHARD).write_bytes(raw)
        try:
            same = read_shard(tmp_path)
        except DataError:
            continue
        assert at < size and same.dataset.fingerprint == texts().dataset.fingerprint


@tries(40, 20_000)
@given(st.data())
def test_any_shard(tmp_path, shard, data):
    """Also one whose maker has computed its checksum."""
    if data.draw(st.booleans()):
        raw = data.draw(damaged(shard[1]))
    else:
        tensors, metadata = read_tensors(shard[1])
        about = json.dumps(data.draw(mutated(json.loads(metadata["shard"]))))
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name] = data.draw(st.sampled_from([torch.zeros(0), torch.tensor([-1]), torch.tensor([2**40]), tensors[name],
                                                   torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), torch.tensor(1)]))
        raw = save(tensors, {"shard": about, "sha256": _checksum(about, tensors)})
    (tmp_path / SHARD).write_bytes(raw)
    try:
        shard_about(tmp_path)
    except ValueError:
        pass
    try:
        found = read_shard(tmp_path)
        found.dataset.inputs.batch(found.partition.clients[0].train if found.partition.clients else torch.arange(0))
    except DataError:
        pass
