"""A federation that trains a language model: its invitation, and joining it with conversations of one's own."""
from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

import tiny_language_models as tiny

from federation import InThisProcess, free_port, nodes
from typer.testing import CliRunner

from fedms import data, models
from fedms.cli import app
from fedms.config import config_from_dict, dump_toml
from fedms.data import DataError, read_shard
from fedms.deployment import join, node, page, server
from fedms.deployment.invitation import read_invitation
from fedms.deployment.own_model import trained_at
from fedms.deployment.state import ClientState
from fedms.progress import Progress
from fedms.storage.records import RunRecords


def typed(*words):
    """What a command of `fedms` prints."""
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A server's folder, made by the command of a run file without classes."""
    made = tmp_path_factory.mktemp("federation")
    tiny.model().save(made / "model")
    config = config_from_dict({
        "task": {"kind": "causal_lm"}, "model": {"id": str(made / "model")}, "run": {"threads": 1}, "stage1": {"rounds": 1},
        "stage2": {"rounds": 1}, "clients": {"round_timeout": 120.0}, "sal": {"depth": 2, "schedule": "fixed"},
        "data": {"name": "brought", "question": "q", "answer": "a", "max_tokens": 60}})
    (made / "run.toml").write_text(dump_toml(config))
    typed("server", "init", made / "server", made / "run.toml", "--host", "127.0.0.1", "--port", free_port())
    return made


def written(path, answers):
    path.write_text("".join(json.dumps({"q": f"number {i}?", "a": answer}) + "\n" for i, answer in enumerate(answers)))
    return str(path)


def test_a_client_joins_with_its_answers(folder, tmp_path):
    invitation = read_invitation(folder / "server/invite.toml")
    assert invitation.classes == ()
    joining = join.prepare(invitation, written(tmp_path / "own.jsonl", ["yes", "no, never"] * 8), "anna", Progress())
    assert sum(joining.samples.values()) == 16
    join.write(joining, tmp_path / "anna")
    dataset = read_shard(tmp_path / "anna").dataset
    assert dataset.answers is not None and dataset.answer_bytes.tolist() == [3, 9] * 8
    text = models.load(invitation.config.model, "causal_lm").tokenizer.decode(dataset.targets(dataset.answers.new_tensor([1])))
    assert text == "no, never<|end|>"


def test_an_empty_answer_is_an_error_at_joining(folder, tmp_path):
    with pytest.raises(DataError, match="line 2 has nothing in column 'a'"):
        join.prepare(read_invitation(folder / "server/invite.toml"), written(tmp_path / "own.jsonl", ["yes", " "]), "bert", Progress())


def test_the_server_has_no_sample_and_the_chat_template_counts_as_preprocessing(folder):
    config = read_invitation(folder / "server/invite.toml").config
    model = models.load(config.model, "causal_lm")
    shard = data.without_samples(config.data, model)
    assert len(shard.dataset) == 0 and shard.dataset.answers is not None
    before = data.preprocessing_fingerprint(config.data, model)
    model.tokenizer.chat_template = tiny.TEMPLATE.replace("m['content']", "m['content'] + ' '")
    assert data.preprocessing_fingerprint(config.data, model) != before


def test_from_the_invitation_to_a_model_that_answers(folder, tmp_path, monkeypatch):
    """By the commands: init, join, accept. Then the rounds, to the end."""
    monkeypatch.setattr(node, "Worker", InThisProcess)
    own, place = written(tmp_path / "own.jsonl", ["yes", "no, never"] * 8), tmp_path / "anna"
    told = typed("client", "join", folder / "server/invite.toml", "--data", own, "--name", "anna", "--state", place, "--yes")
    assert "classes" not in told
    typed("server", "accept", folder / "server", *[line for line in told.splitlines() if line.startswith("ecdsa-")])
    with nodes([ClientState(place)], lines := {}):
        summary = server.start(folder / "server", "127.0.0.1", Progress(), lambda: False)
    records = RunRecords.read(folder / "server/run")
    assert [visit["status"] for visit in records.visits] == ["ok", "ok"], lines
    assert summary["rounds"] == {"stage1": 1, "stage2": 1} and "language" in records.clients[0]
    assert trained_at(place).final.stage == "done"

    # The page shows the perplexity of the mean loss, however the clients' mean of exp(-loss) stands to it.
    rounds = folder / "server/run/rounds.jsonl"
    changed = [{**record, "validation_accuracy": 0.25, "validation_loss": 2.0} for record in records.rounds]
    rounds.write_text("".join(json.dumps(record) + "\n" for record in changed))
    told = page.state(folder / "server")
    assert [each["perplexity"] for each in told["rounds"]] == [math.exp(2.0)] * 2
    assert "validation perplexity 7.4," in "\n".join(page.lines(told))
