"""A language model over Flower: the same bits as in one process, and what its clients may say of themselves."""
from __future__ import annotations

import json

import pytest
import tiny_language_models as tiny
import torch
from fake_grid import FakeGrid
from shards import write_shards

from fedms.data import DataError, read_shard
from fedms.data.dataset import make_dataset
from fedms.data.inputs import TextInputs
from fedms.federated.schema import RECORD, SchemaError
from fedms.progress import Progress
from fedms.runs import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.durable import shard_about
from fedms.storage.records import RunRecords, comparable

CLIENTS = 2
SETS = ["data.global_test=0.2", "data.partition=natural", f"clients.count={CLIENTS}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_federation(tmp_path_factory.mktemp("language"), "ab", 12, lambda who, i: f"{who}{i % 3} {who * 2}")


def config(folder, engine, *sets):
    return tiny.configuration(folder, *SETS, *sets, f"run.engine={engine}")


def outcome(path):
    return comparable(RunRecords.read(path)), CheckpointFolder(path / "checkpoint").load()[0].tensors


@pytest.mark.parametrize("sets", [["task.choices=2"], ["gate.on=logits", "run.method=fedms_plus"]], ids=str)
def test_nodes_with_their_own_data_give_the_same_bits_and_records(folder, tmp_path, sets):
    shards = tmp_path / "shards"
    write_shards(config(folder, "flower", *sets), shards, Progress())
    n_train = {i: shard_about(shards / f"client-{i}")["clients"][0]["n_train"] for i in range(CLIENTS)}
    grid = FakeGrid(tmp_path / "states", CLIENTS, n_train, lambda i: shards / f"client-{i}",
                    own=config(folder, "flower", *sets))
    run.run(config(folder, "flower", *sets), tmp_path / "flower", grid=grid, shard=read_shard(shards / "server"))
    run.run(config(folder, "local", *sets), tmp_path / "local")
    (ours, tensors), (theirs, expected) = outcome(tmp_path / "flower"), outcome(tmp_path / "local")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
    for part in ("rounds", "visits", "clients", "summary"):
        assert json.dumps(ours[part]) == json.dumps(theirs[part]), part
    assert all(client["language"]["bits_per_byte"] > 0 for client in ours["clients"])
    assert any(client["language"].get("choice_accuracy") is not None for client in ours["clients"]) == ("task.choices=2" in sets)


@pytest.mark.parametrize("change, words", [
    (lambda r: r["language"].update(nats="low"), "language.nats is 'low', expected a number"),
    (lambda r: r["language"].update(perplexity=float("inf")), "language.perplexity is"),
    (lambda r: r["language"].pop("tokens"), "language.tokens is missing"),
    (lambda r: r["language"].update(choice_accuracy=1.5), "language.choice_accuracy is 1.5"),
    (lambda r: r["language"].update(more=1), "language.more: unknown"),
    (lambda r: r.pop("language"), "language or macro_f1 is missing")])
def test_a_record_that_a_summary_cannot_be_made_of_is_refused(change, words):
    said = {"nats": 1.0, "nats_zero_shot": 2.0, "tokens": 9, "perplexity": 2.7, "exact_match": 0.0, "bits_per_byte": None}
    record = {"id": 0, "group": None, "unseen": False, "n_train": 3, "n_validation": 1, "n_test": 2,
              "accuracy": {"personalized": 0.5, "zero_shot": 0.25}, "language": said}
    assert RECORD.read(record) == record
    change(record)
    with pytest.raises(SchemaError, match=words):
        RECORD.read(record)


@pytest.mark.parametrize("answers, answer_bytes, words", [
    ([1, 3], None, "sample 1 begins at token 3, expected 1 to 2"), ([0, 1], None, "sample 0 begins at token 0"),
    ([1], None, r"shape \(1,\), expected int64 \(2,\)"), ([1.0, 1.0], None, "torch.float32"), ([1, 1], [4], "answer_bytes are")])
def test_answers_that_do_not_fit_their_texts_are_refused(answers, answer_bytes, words):
    inputs = TextInputs({"input_ids": torch.arange(6)}, torch.tensor([0, 3, 6]), {"input_ids": 0})
    with pytest.raises(DataError, match=words):
        make_dataset("made", inputs, torch.zeros(2, dtype=torch.int64), ("text",), answers=torch.tensor(answers),
                     answer_bytes=None if answer_bytes is None else torch.tensor(answer_bytes))
