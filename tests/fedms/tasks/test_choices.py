"""Choosing a prompt's own answer among others: what is drawn, and whole runs against plain PyTorch."""
from __future__ import annotations

import pytest
import tiny_language_models as tiny
import torch

from fedms import data
from fedms.data.choices import other_answers, with_answers
from fedms.data.subset import Subset
from fedms.exports.language_model import open_language_model
from fedms.report.numbers import comparison, read_runs
from fedms.report.tables import table
from fedms.runs import run
from fedms.seeds import generator
from fedms.storage.records import RunRecords

SETS = ["clients.count=2", "data.global_test=0", "data.split=[0.3,0.2,0.5]", "stage1.batch=4", "stage1.lr=0.01", "stage2.lr=0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of 16 questions of ann, three in four have the same answer, and those of bob differ."""
    return tiny.write_federation(tmp_path_factory.mktemp("choices"), ("ann", "bob"), 16,
                                 lambda who, i: f"{who} {i if who == 'bob' or i % 4 == 0 else 'x'} {'yes' * (i % 3)}")


def read(folder):
    settings = tiny.configuration(folder, *SETS)
    return data.load(settings.data, tiny.model()), settings


def words(dataset, index):
    """The tokens of a sample's prompt and of its answer."""
    first, last = (int(dataset.texts.offsets[index + i]) for i in (0, 1))
    ids, start = dataset.texts.fields["input_ids"][first:last].tolist(), int(dataset.answers[index])
    return ids[:start], ids[start:]


def test_other_answers_are_different_ones_of_the_same_samples(folder):
    dataset, settings = read(folder)
    part = Subset(torch.tensor([9, 2, 5, 3, 6, 0, 1, 4]))
    drawn = other_answers(dataset, part, 3, generator(0, "a"))
    assert drawn.shape == (8, 3) and torch.equal(drawn, other_answers(dataset, part, 3, generator(0, "a")))
    assert not torch.equal(drawn, other_answers(dataset, part, 3, generator(1, "a")))
    said = [tuple(words(dataset, i)[1]) for i in part.indices.tolist()]
    assert len(set(said)) < len(said)
    for own, row in zip(said, drawn.tolist()):
        assert len({own, *(said[place] for place in row)}) == 4
    most = len(set(said)) - 1
    assert other_answers(dataset, part, most, generator(0)).shape == (8, most)
    assert other_answers(dataset, part, most + 1, generator(0)) is None

    for limit in (60, 20):
        made = with_answers(dataset, part, drawn, limit)
        for i, index in enumerate(part.indices.tolist()):
            for j, place in enumerate(drawn[i].tolist()):
                prompt, answer = words(dataset, index)[0], list(said[place])
                assert words(made, 3 * i + j) == ((prompt + answer)[-limit:-len(answer)], answer)


@pytest.mark.parametrize("sets", [["run.method=fedavg"], ["run.method=fedms", "gate.weight=0.4"]], ids=str)
def test_a_run_chooses_as_plain_pytorch_does(folder, tmp_path, sets):
    path = tmp_path / "runs" / "one"
    summary = run.run(tiny.configuration(folder, *SETS, *sets, "task.choices=3"), path)
    dataset, settings = read(folder)
    partition = data.partition(dataset, settings.data, settings.clients, settings.run.seed)
    language = open_language_model(path)
    experts, model, weight = language.trained.experts(language.model), language.model, 0.4 if len(sets) > 1 else 0.0
    whole = tiny.whole().double()
    plain = {name: p.detach().clone() for name, p in whole.model.named_parameters()}

    def log_p(name, prompt, answer):
        """Log-probability of each token of an answer, (len(answer),), with the LoRA of an expert added by hand in float64."""
        state = dict(plain)
        for layer, module in model.layers.items():
            a, b = (experts.get(name, {}).get(f"expert/{layer}.lora_{ab}") for ab in "ab")
            if a is not None:
                state[f"{layer}.weight"] = plain[f"{layer}.weight"] + module.experts["global"].scale * (b.double() @ a.double())
        ids = torch.tensor(prompt + answer)
        hidden = torch.func.functional_call(whole.model, state, (), {"input_ids": ids[None], "use_cache": False}).last_hidden_state[0]
        each = (hidden @ whole.lm_head.weight.T).log_softmax(-1)[len(prompt) - 1:-1]
        return each.gather(1, torch.tensor(answer)[:, None])[:, 0]

    @torch.no_grad()
    def accuracy(client, before):
        part, right = Subset(client.test), 0
        drawn = other_answers(dataset, part, 2, generator(settings.run.seed, "choices", client.id))
        for index, row in zip(part.indices.tolist(), drawn.tolist()):
            prompt, own = words(dataset, index)
            scores = []
            for answer in (own, *(words(dataset, int(part.indices[place]))[1] for place in row)):
                if before:
                    scores.append(log_p("none", prompt, answer).mean())
                else:
                    p = (1 - weight) * log_p("global", prompt, answer).exp()
                    p = p + weight * log_p(f"client-{client.id}", prompt, answer).exp() if weight else p
                    scores.append(p.log().mean())
            right += all(scores[0] > other for other in scores[1:])
        return right / len(part)

    records = {client["id"]: client["language"] for client in RunRecords.read(path).clients}
    for name, before in (("choice_accuracy", False), ("choice_accuracy_zero_shot", True)):
        wanted = {client.id: accuracy(client, before) for client in partition.clients}
        assert {number: record[name] for number, record in records.items()} == pytest.approx(wanted)
        assert summary["language"][name] == pytest.approx(sum(wanted.values()) / len(wanted))
        assert 0 < summary["language"][name] < 1
    header, rows = table(comparison(read_runs(tmp_path / "runs")[0]))
    shown = [row[header.index("own answer chosen %")] for row in rows]
    assert shown == [f"{100 * summary['language'][name]:.1f}" for name in ("choice_accuracy_zero_shot", "choice_accuracy")]


def test_with_too_few_answers_nothing_is_shown(folder, tmp_path):
    summary = run.run(tiny.configuration(folder, *SETS, "run.method=local", "stage1.rounds=0", "task.choices=64"), tmp_path / "run")
    records = RunRecords.read(tmp_path / "run").clients
    assert len(records) == 2 and all(record["language"]["choice_accuracy"] is None for record in records)
    assert summary["language"]["choice_accuracy"] is None
    assert "own answer chosen %" not in table(comparison(read_runs(tmp_path)[0]))[0]
