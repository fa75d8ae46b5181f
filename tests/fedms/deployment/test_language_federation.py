"""A federation that trains a language model: its invitation, and joining it with conversations of one's own."""
from __future__ import annotations

import json

import pytest

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

import tiny_language_models as tiny

from fedms import data, models
from fedms.config import config_from_dict
from fedms.data import DataError, read_shard
from fedms.deployment import join, server
from fedms.deployment.invitation import read_invitation
from fedms.progress import Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("federation")
    tiny.model().save(made / "model")
    config = config_from_dict({
        "task": {"kind": "causal_lm"}, "model": {"id": str(made / "model")}, "run": {"threads": 1},
        "data": {"name": "brought", "question": "q", "answer": "a", "max_tokens": 60}, "sal": {"depth": 2, "schedule": "fixed"}})
    server.init(made / "server", config, "127.0.0.1", 9091, Progress())
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
    with pytest.raises(DataError, match="the answer is ' '"):
        join.prepare(read_invitation(folder / "server/invite.toml"), written(tmp_path / "own.jsonl", ["yes", " "]), "bert", Progress())


def test_the_server_has_no_sample_and_the_chat_template_counts_as_preprocessing(folder):
    config = read_invitation(folder / "server/invite.toml").config
    model = models.load(config.model, "causal_lm")
    shard = data.without_samples(config.data, model)
    assert len(shard.dataset) == 0 and shard.dataset.answers is not None
    before = data.preprocessing_fingerprint(config.data, model)
    model.tokenizer.chat_template = tiny.TEMPLATE.replace("m['content']", "m['content'] + ' '")
    assert data.preprocessing_fingerprint(config.data, model) != before
