"""No method is favored: tuning sees every constant, private parts stop alike, depth goes on where there are no stages."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedms.config import load_config
from fedms.federated.client import Client, Private
from fedms.federated.evaluation import evaluate_client
from fedms.federated.schedule import SalState
from fedms.federated.server import Server
from fedms.methods import apfl, create, fedms_plus, mixing, steps
from fedms.runs import tune
from fedms.runs.experiment import LoadedTask
from fedms.progress import Progress
from fedms.tasks import Score
from fedms.storage.records import RunRecords
from fedms.storage.validation import read_validation
from fedms.data.partitioning import partition

SMALL = ["data.max_samples=160", "clients.count=3", "clients.unseen=0", "data.partition=dirichlet", "data.alpha=0.5",
         "stage1.rounds=1", "stage2.rounds=2", "run.threads=1"]


def config(*sets):
    return load_config("digits", [*SMALL, *sets])


@pytest.fixture(scope="module")
def task():
    return LoadedTask(config(), Progress())


class World:
    """One client of a method with its model, visited as often as a test asks."""

    def __init__(self, task, *sets):
        self.experiment = task.experiment(config(*sets))
        self.model, self.method, self.server = task.model, self.experiment.method, self.experiment.server
        self.model.config = self.experiment.config
        self.model.start()
        self.state = self.server.start(self.method.initial(self.model))
        self.client = self.experiment.clients[0]

    def visit(self, private=Private(), stage="stage1"):
        message = self.server.message(self.state if stage == "stage1" else
                                      type(self.state)(**{**vars(self.state), "stage": stage}))
        self.model.clear()
        flops = self.model.meter.flops
        reply, after = self.method.client_step(self.model, self.client, private, message)
        return message, reply, after, self.model.meter.flops - flops


@pytest.mark.parametrize("method, key, values", [
    ("fedavg", "stage2.lr", (1e-4, 1e-2)), ("fedper", "stage2.lr", (1e-4, 1e-2)), ("feddpa", "feddpa.scale", (0.25, 2.0)),
    ("fedavg_prior", "fedavg_prior.tau", (0.0, 1.0))])
def test_a_trial_is_judged_by_what_the_method_answers_in_the_end(tmp_path, monkeypatch, method, key, values):
    monkeypatch.setattr(tune, "trials", lambda config, name, count: [{key: value} for value in values])
    first, second = tune.tune(config(), [method], tmp_path, count=2)
    assert first.loss != second.loss, "the constant is chosen blindly"
    folder = tmp_path / f"trials/{method}-0"
    clients = json.loads((folder / "validation.json").read_text())
    total = sum(client["n_validation"] for client in clients)
    assert [client["id"] for client in clients] == [0, 1, 2] and total
    assert read_validation(folder)[1] == pytest.approx(sum(c["n_validation"] * c["loss"] for c in clients) / total)
    assert RunRecords.read(folder).clients == [], "no test label is read"


def test_trials_of_language_models_are_ranked_by_their_loss_as_reports_rank_methods():
    apart, alike = (tune.Trial("causal_lm", "fedms", number, {}, None, sum(map(math.exp, (-a, -b))) / 2, (a + b) / 2)
                    for number, (a, b) in enumerate([(1.0, 3.2), (2.0, 2.0)]))
    assert apart.score > alike.score and min(apart, alike, key=lambda trial: trial.rank) is alike
    assert (apart.words, alike.words) == ("perplexity 8.2", "perplexity 7.4")
    apart, alike = (replace(trial, task="classification") for trial in (apart, alike))
    assert min(apart, alike, key=lambda trial: trial.rank) is apart and apart.words == "20.4%"


def test_a_trial_has_two_rounds_of_stage_2():
    def rounds(first, second):
        trial = tune.Trial("classification", "fedms", 0, {}, None)
        short = tune.trial_config(config(f"stage1.rounds={first}", f"stage2.rounds={second}"), trial)
        return short.stage1.rounds, short.stage2.rounds
    assert (rounds(8, 4), rounds(8, 1), rounds(2, 0), rounds(12, 12)) == ((2, 2), (2, 1), (1, 0), (3, 3))


def test_the_gate_and_the_local_expert_are_kept_or_reverted_as_one(task):
    world = World(task, "run.method=fedms", "stage2.lr=30.0", "gate.lr=3.0", "stage2.epochs=2", "stage2.keep=best")
    message, reply, after, _ = world.visit(stage="stage2")
    assert reply.tensors.keys() == {name for name in message.tensors if name.startswith("gate/")}
    assert all(torch.equal(tensor, message.tensors[name]) for name, tensor in reply.tensors.items())
    assert all(torch.equal(after.tensors[name], message.constants[name]) for name in after.tensors)
    world = World(task, "run.method=fedms", "stage2.lr=30.0", "gate.lr=3.0", "stage2.epochs=2", "stage2.keep=last")
    message, reply, *_ = world.visit(stage="stage2")
    assert not torch.equal(reply.tensors["gate/out.weight"], message.tensors["gate/out.weight"])


@pytest.mark.parametrize("method", ["local", "fedavg_ft", "ditto", "apfl", "fedms", "fedms_plus"])
def test_the_best_epoch_of_a_visit_is_kept(task, method, monkeypatch):
    """Of three epochs whose losses are 3, 1, 2 after 5 the second one's tensors are kept, though training went on."""
    world = World(task, f"run.method={method}", "stage2.epochs=3", "stage1.epochs=3", "stage2.keep=best", "gate.weight=0.5")
    found = iter([])
    epochs = []

    class Judged(steps.BestEpoch):
        def __init__(self, model, client, received, *others):
            super().__init__(model, client, received, *others)
            nonlocal found
            found = iter([3.0, 1.0, 2.0])
            self.score, self._judge = Score(0.0, 5.0), lambda: Score(0.0, next(found))

        def after_epoch(self):
            epochs.append(self._model.read_applied("local"))
            super().after_epoch()
    for module in (steps, mixing, apfl, fedms_plus):
        monkeypatch.setattr(module, "BestEpoch", Judged)
    after = world.visit(stage="stage2")[2].tensors
    assert len(epochs) == 3 and next(found, None) is None
    assert all(torch.equal(after[name], tensor) for name, tensor in epochs[1].items())
    assert any(not torch.equal(epochs[2][name], tensor) for name, tensor in epochs[1].items())


def test_the_private_rate_falls_linearly_where_it_is_asked_to():
    def rate(stage, number, decay):
        settings = config("stage2.lr=0.008", "stage1.lr=0.1", "stage2.rounds=4", f"stage2.decay={decay}")
        return steps.private_lr_of(SimpleNamespace(config=settings), SimpleNamespace(stage=stage, round=number))
    assert [rate("stage2", k, "linear") for k in (1, 2, 3, 4)] == pytest.approx([0.008, 0.006, 0.004, 0.002])
    assert rate("stage2", 4, "off") == 0.008 and rate("stage1", 1, "linear") == 0.1


@pytest.mark.parametrize("method", ["fedper", "fedrep", "fedsa_lora"])
def test_private_parts_stop_early_as_those_of_other_methods_do(task, method):
    for keep, reverted in (("best", True), ("last", False)):
        world = World(task, f"run.method={method}", "stage1.lr=30.0", f"stage2.keep={keep}", "stage1.clip=0",
                      "stage1.epochs=2")
        begun = world.model.initial(0)
        _, reply, after, _ = world.visit()
        own = [name for name in after.tensors if name.startswith(("head/", "expert/"))]
        assert own and all(torch.equal(after.tensors[name], begun[name]) == reverted for name in own)
        assert any(not torch.equal(tensor, begun[name]) for name, tensor in reply.tensors.items()), "what is shared is sent"


@pytest.mark.parametrize("method, depth", [("fedavg", 2), ("ditto", 2), ("fedms", 1), ("fedavg_ft", 1), ("fedms_plus", 2)])
def test_depth_begins_again_in_stage_2_where_what_is_shared_has_ended(method, depth):
    settings = load_config("digits", [f"run.method={method}", "sal.queue=2"])
    server = Server(settings, [4, 3, 2, 1], {}, create(settings))
    state = server.start({})
    state = type(state)(**{**vars(state), "round": settings.stage1.rounds, "sal": SalState(2), "applied_depth": 2})
    after = server._next_round(state)
    assert (after.stage, after.sal.depth, after.applied_depth) == ("stage2", depth, 2)


def test_fedrep_does_not_run_the_whole_network_again_at_each_visit(task):
    flops = {}
    for method in ("fedper", "fedrep"):
        world = World(task, f"run.method={method}", "sal.schedule=fixed", "sal.depth=1", "fedrep.head_epochs=1")
        _, _, private, _ = world.visit()
        world.state = type(world.state)(**{**vars(world.state), "round": 2,
                                           "tensors": {n: t + 0.01 for n, t in world.state.tensors.items()}})
        flops[method] = world.visit(private)[3]     # another body has come
    assert flops["fedrep"] < 2 * flops["fedper"], flops


def test_the_gate_of_fedms_plus_sees_no_validation_label_unless_asked_to(task):
    method = World(task, "run.method=fedms_plus").method
    client = task.experiment(config("run.method=fedms_plus")).clients[0]
    rows, part, gate_rows = method._split(client)
    assert part is client.train and len(gate_rows) and not set(rows.tolist()) & set(gate_rows.tolist())
    assert len(rows) + len(gate_rows) == len(client.train)


def test_the_recorded_validation_is_of_what_a_client_answers_in_the_end(task):
    """With the last aggregate, as the test accuracy beside it, and not with the gate that the client has just trained."""
    world = World(task, "run.method=fedms", "stage2.keep=last")
    message, reply, after, _ = world.visit(stage="stage2")
    others = {name: t + 0.5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for name, t in message.tensors.items()}
    final = replace(message, stage="done", tensors=others)
    record = evaluate_client(world.method, world.model, world.client, after, final)
    answer = world.method.predict(world.model, world.client.validation, after, final).personalized
    expected = world.model.task.score(answer, world.model.targets(world.client.validation))
    assert (record["validation_accuracy"], record["validation_loss"]) == (expected.accuracy, expected.loss)
    assert record["validation_loss"] != reply.metrics["validation_loss"]


def test_clients_may_have_a_least_size_and_splits_need_not_be_stratified(task):
    def sizes(*sets):
        settings = config("data.alpha=0.05", *sets)
        found = partition(task.dataset, settings.data, settings.clients, 0)
        return found, [len(c.train) + len(c.validation) + len(c.test) for c in found.clients]
    _, small = sizes("data.partition=quantity")
    found, least = sizes("data.partition=quantity", "data.min_samples=30", "data.global_test=0.0")
    assert min(small) < 30 <= min(least) and sum(least) == len(task.dataset)
    everyone = torch.cat([t for c in found.clients for t in (c.train, c.validation, c.test)])
    assert sorted(everyone.tolist()) == list(range(len(task.dataset)))

    def shares(stratify):
        found, _ = sizes("data.partition=iid", f"data.stratify={stratify}", "data.split=[0.4, 0.2, 0.4]")
        counts = [[torch.bincount(task.dataset.labels[part], minlength=10) for part in (c.train, c.test)] for c in found.clients]
        return max(int((train - test).abs().max()) for train, test in counts)
    assert shares("true") <= 2 < shares("false")
