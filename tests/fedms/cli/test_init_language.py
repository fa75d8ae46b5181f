"""`fedms init` for language models: the file that it writes is the file that runs."""
from __future__ import annotations

import json

import pytest
import tiny_language_models as tiny
from typer.testing import CliRunner

from fedms import cli, errors
from fedms.cli import init
from fedms.config import load_config
from fedms.runs import run as runs


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A model whose logits are capped, and questions, conversations and texts; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    tiny.model("gemma3").save(tmp_path / "lm")
    rows = [(f"Where is it? {i}", f"Here in {shop}!", shop) for shop in ("Bern", "Graz") for i in range(10)]
    (tmp_path / "faq.csv").write_text("q,a,shop\n" + "".join(",".join(row) + "\n" for row in rows))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"id": i, "talk": [
        {"role": "user", "content": f"number {i}?"}, {"role": "assistant", "content": "yes " * (i + 30)}]}) + "\n" for i in range(20)))
    (tmp_path / "books").mkdir()
    for name in ("Emma", "Jane"):
        (tmp_path / "books" / f"{name}.txt").write_text("\ufeff" + f"{name} walked.\r\n" * 100)


def fedms(*words, answers=None):
    return CliRunner().invoke(cli.app, ["init", *words], input=answers)


@pytest.mark.parametrize("words, columns, found", [
    (("--data", "faq.csv", "--client", "shop"), {"question": "q", "answer": "a", "client": "shop"},
     "20 answers of 260 characters; 2 clients"),
    (("--data", "faq.csv", "--task", "causal_lm", "--text", "a"), {"text": "a", "question": None}, "20 texts of 260 characters"),
    (("--data", "chats.jsonl"), {"messages": "talk", "client": None}, "20 answers of 3,160 characters; no column is named"),
    (("--data", "books"), {"text": "text", "messages": None, "client": None}, "characters; 2 clients"),
    (("--data", "books/Emma.txt"), {"text": "text"}, "1 text of 1,400 characters; no column is named"),
])
def test_what_is_written_runs(tmp_path, words, columns, found):
    result = fedms("mine.toml", *words, "--model", "lm", "--yes")
    assert result.exit_code == 0, result.output
    assert found in result.stderr
    text = (tmp_path / "mine.toml").read_text()
    assert all("#" in line for line in text.splitlines() if "=" in line and not line.startswith(("rounds", "lr", "batch", "seed")))
    config = load_config(tmp_path / "mine.toml", ["stage1.rounds=1", "stage2.rounds=1", "run.threads=1"])
    assert config.task.kind == "causal_lm" and config.data.max_tokens == tiny.LONGEST
    assert {key: getattr(config.data, key) for key in columns} == columns
    summary = runs.run(config, tmp_path / "out")
    assert summary["language"]["nats"] > 0


def test_a_table_of_answers_asks_for_the_built_in_model():
    result = fedms("--data", "faq.csv", "--yes")
    assert result.exit_code == 0, result.output
    config = load_config("my-run.toml")
    assert (config.model.id, config.data.template, config.data.partition, config.clients.count) == ("smollm2", "chat", "iid", 2)
    for line in ('guessed: task.kind = "causal_lm"; another one is given by --task', 'guessed: data.question = "q"', 'data.answer = "a"'):
        assert line in result.stderr


def test_labels_beside_a_language_model_are_for_a_classifier(tmp_path):
    (tmp_path / "tickets.csv").write_text("text,label\n" + "".join(f"ticket {i},{'AB'[i % 2]}\n" for i in range(20)))
    assert fedms("--data", "tickets.csv", "--model", "lm", "--yes").exit_code == 0
    assert load_config("my-run.toml").task.kind == "classification"


def test_questions_are_asked(monkeypatch):
    monkeypatch.setattr(init, "has_terminal", lambda: True)
    result = fedms(answers="faq.csv\n\n\n\nshop\nlm\n")
    assert result.exit_code == 0, result.output
    config = load_config("my-run.toml")
    assert (config.data.question, config.data.answer, config.data.client, config.model.id) == ("q", "a", "shop", "lm")


@pytest.mark.parametrize("words, code, said", [
    (("--data", "faq.csv", "--task", "lm"), errors.USAGE, "--task: got 'lm'; accepted: classification, causal_lm"),
    (("--data", "faq.csv", "--task", "causal_lm", "--label", "a"), errors.USAGE, "--label: --task causal_lm reads --messages"),
    (("--data", "faq.csv", "--task", "classification", "--question", "q", "--label", "a"), errors.USAGE,
     "--question, --label: --task classification reads --text and --label;"),
    (("--data", "faq.csv", "--question", "q", "--answer", "a", "--text", "a"), errors.USAGE,
     "--task causal_lm reads --messages, or --question and --answer, or --text;"),
    (("--data", "chats.jsonl", "--messages", "talk", "--text", "id"), errors.USAGE, "--messages, --text: --task causal_lm reads"),
    (("--data", "books", "--task", "classification"), errors.USAGE, "--task: texts in files of their own have no labels"),
    (("--data", "chats.jsonl", "--question", "id"), errors.USAGE, "--answer: no column has a usual name for answers"),
    (("--data", "squad", "--task", "causal_lm"), errors.UNAVAILABLE, "squad is not on this machine. A data set of the hub"),
    (("--data", "faq.csv", "--model", "books"), errors.UNAVAILABLE, "books holds no config.json"),
    (("--data", "faq.csv", "--question", "why", "--answer", "a", "--model", "lm"), errors.UNAVAILABLE, "faq.csv: no column 'why'"),
])
def test_mistakes_leave_no_file(tmp_path, words, code, said):
    result = fedms(*words, "--yes")
    assert result.exit_code == code and said in result.stderr, result.output
    assert not (tmp_path / "my-run.toml").exists()
