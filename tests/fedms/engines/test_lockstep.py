"""Clients side by side (`run.lockstep`), against the same clients one after the other."""
from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from private_runs import configuration, new_key
from saved_models import WORDS, save
from tiny_language_models import configuration as of_language_model, write_federation

from fedms import data, methods, models
from fedms.config import ConfigError, load_config, registry, with_run
from fedms.data import ClientSplit
from fedms.errors import Interrupted
from fedms.federated.client import Client, Private, visit
from fedms.federated.lockstep import together
from fedms.federated.server import Server
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords, comparable
from fedms.training.constants import new_cache
from fedms.training.expert_model import ExpertModel

# Query and key are left out: their gradients are so small here that rounding turns the sign of AdamW's steps.
IMAGES = ["data.max_samples=40", 'model.targets=["v_proj","o_proj","fc1","fc2"]', "lora.rank=2", "clients.count=3", "clients.unseen=0",
          "data.partition=iid", "sal.schedule=fixed", "sal.depth=2", "stage1.batch=4", "stage2.batch=4", "run.threads=1", "run.device=cpu"]
SIZES = (11, 4, 7)     # of the clients: each has another number of batches and another last batch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class World:
    """A model, and clients of different sizes.

    Args:
        config: The run file.
        sizes: Number of training samples of each client.
        device: Of the model.
        foundation: The foundation model; None to load it.
    """

    def __init__(self, config, sizes=SIZES, device="cpu", foundation=None):
        self.foundation = foundation or models.load(config.model, config.task.kind)
        self.dataset = data.load(config.data, self.foundation)
        self.model = ExpertModel(self.foundation, self.dataset, config, device=device)
        ends = torch.tensor(sizes).cumsum(0)
        rows = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(3))
        assert int(ends[-1]) + 6 <= len(rows)
        self.splits = [ClientSplit(i, None, rows[end - size:end], rows[-4 - i:-i or None], rows[:0])
                       for i, (size, end) in enumerate(zip(sizes, ends.tolist()))]

    def visits(self, config, stage, privates=None, lockstep=False):
        """What each client's visit comes to: the visit, and the private state after it. All constants are computed anew."""
        method = methods.create(config)
        self.model.config = config      # first, as the new cache is that of the model's settings
        self.model.cache = new_cache(self.model)
        self.model.start()
        server = Server(config, self.model.order, self.model.block_of, method, method.statistics(len(self.dataset.classes)))
        message = server.message(replace(server.start(self.shared(method)), stage=stage))
        clients = [(Client(split, config), Private(dict(own))) for split, own in zip(self.splits, privates or [{}] * len(self.splits))]
        if lockstep:
            return [turn.visit() for turn in together(method.visit, self.model, clients, message)]
        return [visit(method.client_step, self.model, client, private, message) for client, private in clients]

    def shared(self, method):
        """The initial tensors, each moved: no B is zero."""
        noise = torch.Generator().manual_seed(1)
        return {name: t + 0.05 * torch.randn(t.shape, generator=noise) for name, t in method.initial(self.model).items()}


@pytest.fixture(scope="module")
def digits():
    return World(load_config("digits", IMAGES))


def sentences(folder):
    """Settings of a run on a tiny BERT and sentences of 1 to 9 words, both written into a folder."""
    draw = torch.Generator().manual_seed(5)
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (1 + n % 9,), generator=draw)) + f",{'good' if n % 2 else 'bad'}"
             for n in range(80)]
    (folder / "own.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return [f"model.id={save('bert', folder / 'model')}", f"data.name={folder / 'own.csv'}", "data.max_samples=none",
            'model.targets=["value","dense"]']


def agree(found, wanted, tolerance=1e-5):
    """Whether visits came to the same replies, private states and costs."""
    for (one, kept), (other, own) in zip(found, wanted, strict=True):
        assert (one.reason, one.flops) == (other.reason, other.flops)
        same(kept.tensors, own.tensors, tolerance)
        if other.reply is not None:
            assert one.reply.metrics.keys() == other.reply.metrics.keys()
            for name, value in other.reply.metrics.items():
                assert one.reply.metrics[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
            assert one.reply.score == pytest.approx(other.reply.score)
            same(one.reply.tensors, other.reply.tensors, tolerance)
            same(one.reply.statistics, other.reply.statistics, tolerance)


def same(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].double() - tensor.double()).norm() <= tolerance * tensor.double().norm() + 1e-9, name


# The first stage of all methods but those whose visits there are those of fedavg; and the second one where it is another.
VISITS = [(name, "stage1") for name in registry.method_names() if name not in ("fed_sb", "fedavg_ft", "feddpa", "fedms")]
VISITS += [(name, "stage2") for name in ("feddpa", "fedms", "fedms_plus")]


@pytest.mark.parametrize("name, stage", VISITS)
def test_every_method_trains_clients_together_as_one_by_one(digits, name, stage):
    config = load_config("digits", [*IMAGES, f"run.method={name}"])
    agree(digits.visits(config, stage, lockstep=True), digits.visits(config, stage))


@pytest.mark.parametrize("sets", [
    ["stage1.micro_batch=3", "stage1.weight_decay=0.1", "clients.optimizer=kept"],
    ["stage1.steps=4", "stage1.clip=0.01", "sal.cache=off"],
    ["run.method=fedprox", "fedprox.mu=10", "sal.order=bottom_up"],
    ["model.frozen=int8", "run.dtype=bf16"],
    ["run.method=local", "stage1.epochs=2", "stage1.lr=0.05"],      # its best epoch is kept
    ["run.method=fedper", 'clients.budgets=[{share=0.5,max_depth=1},{share=0.5}]'],
], ids=["micro-batches and moments", "steps and clip", "penalty", "int8 and bf16", "epochs", "depths"])
def test_settings_of_a_training_hold_for_each_client(digits, sets):
    config = load_config("digits", [*IMAGES, "run.method=fedavg", *sets])
    world = World(config) if {"model.frozen=int8", "sal.order=bottom_up"} & set(sets) else digits
    first = world.visits(config, "stage1")
    kept = [after.tensors for _, after in first]
    agree(world.visits(config, "stage1", kept, lockstep=True), world.visits(config, "stage1", kept),
          3e-2 if "run.dtype=bf16" in sets else 1e-5)


def test_visits_cost_the_same_on_a_model_that_had_another_cache(digits):
    sets = ["run.method=fedavg", "stage1.steps=1"]
    without = load_config("digits", [*IMAGES, *sets, "sal.cache=off"])
    digits.visits(load_config("digits", [*IMAGES, *sets]), "stage1")
    first, again = ([visit.flops for visit, _ in digits.visits(without, "stage1")] for _ in range(2))
    assert first == again


def test_sentences_of_many_lengths_share_a_pass(tmp_path):
    config = load_config("sentiment", [*IMAGES, *sentences(tmp_path), "run.method=fedavg_ft", "sal.cache_dtype=bf16"])
    world = World(config)
    lengths = world.dataset.inputs.lengths
    assert len(set(lengths[torch.cat([split.train for split in world.splits])].tolist())) > 4
    agree(world.visits(config, "stage1", lockstep=True), world.visits(config, "stage1"))
    agree(world.visits(config, "stage2", lockstep=True), world.visits(config, "stage2"))


def test_answers_of_many_lengths_share_a_pass_of_a_language_model(tmp_path):
    folder = write_federation(tmp_path, ["amy", "bob"], 16, lambda who, number: who * (1 + number % 5))
    config = of_language_model(folder, *IMAGES[2:], 'model.targets=["v_proj","o_proj","down_proj"]', "run.method=fedms")
    world = World(config)
    lengths = world.dataset.inputs.lengths
    assert len(set(lengths[torch.cat([split.train for split in world.splits])].tolist())) > 4
    for stage in ("stage1", "stage2"):
        agree(world.visits(config, stage, lockstep=True), world.visits(config, stage))


@pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="22 million parameters: make test-full")
def test_eight_clients_of_minilm():
    config = load_config("sentiment", [*IMAGES, 'model.targets=["value","dense"]', "clients.count=8", "run.method=fedavg",
                                       "data.max_samples=120"])
    world = World(config, (11, 4, 7, 9, 12, 5, 8, 10))
    agree(world.visits(config, "stage1", lockstep=True), world.visits(config, "stage1"), 1e-4)


def test_a_client_that_diverges_is_left_out_alone(digits):
    config = load_config("digits", [*IMAGES, "run.method=fedper"])
    poisoned = [{}, {"head/weight": torch.full((10, digits.foundation.feature_dim), float("inf"))}, {}]
    found = digits.visits(config, "stage1", poisoned, lockstep=True)
    wanted = digits.visits(config, "stage1")
    agree([found[0], found[2]], [wanted[0], wanted[2]])
    (visit, after) = found[1]
    assert visit.reply is None and visit.reason.startswith("training diverged: loss nan") and "stage1.lr may help" in visit.reason
    assert after.tensors == poisoned[1]     # the very tensors of before


def test_too_little_memory_says_that_fewer_clients_together_may_help(digits, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("fedms.training.seats.SideBySide.losses", full)
    found = digits.visits(load_config("digits", [*IMAGES, "run.method=fedavg"]), "stage1", lockstep=True)
    assert all(visit.reply is None and visit.reason.endswith("; or a smaller run.lockstep, as 3 clients were trained together")
               for visit, _ in found)


# Whole runs

RUN = [*IMAGES, "data.max_samples=60", "stage1.rounds=1", "stage2.rounds=1", "run.method=fedms", "sal.depth=1"]


def tensors_of(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    return {**snapshot.tensors, **{f"{i}/{n}": t for i, own in snapshot.private.items() for n, t in own.items()}}


def test_a_run_stops_between_clients_that_are_visited_together_and_goes_on_with_the_same_bits(tmp_path):
    config = load_config("digits", [*RUN, "run.lockstep=2"])
    run(with_run(config, lockstep=1), tmp_path / "one by one")
    run(config, tmp_path / "undisturbed")
    asked = []

    def stop():
        asked.append(len(RunRecords.read(tmp_path / "stopped").visits))
        return len(asked) == 2

    with pytest.raises(Interrupted):
        run(config, tmp_path / "stopped", stop=stop)
    assert asked == [0, 2]
    with pytest.raises(ConfigError, match="run.lockstep: 3, but the run in .* has 2"):
        run(with_run(config, lockstep=3), tmp_path / "stopped", resume=True)
    run(config, tmp_path / "stopped", resume=True)
    assert RunRecords.read(tmp_path / "stopped").config["run"]["lockstep"] == 2
    found, wanted = tensors_of(tmp_path / "stopped"), tensors_of(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()) and found.keys() == wanted.keys()
    assert json.dumps(comparable(RunRecords.read(tmp_path / "stopped"))) == json.dumps(comparable(RunRecords.read(tmp_path / "undisturbed")))
    same(found, tensors_of(tmp_path / "one by one"), 1e-4)


def test_clients_of_a_run_with_privacy_are_trained_together(tmp_path):
    sets = ["privacy.mode=central", "privacy.noise=0.5", "privacy.score_noise=5", *IMAGES, "data.max_samples=60", "stage1.rounds=1",
            "stage2.rounds=0", "aggregate.weights=uniform"]
    key = new_key(tmp_path)
    for count in (1, 3):
        run(configuration(key, *sets, f"run.lockstep={count}"), tmp_path / str(count))
    same(tensors_of(tmp_path / "3"), tensors_of(tmp_path / "1"), 1e-3)     # updates are rounded to multiples of 2^-16


@pytest.mark.parametrize("sets, problem", [
    (["run.engine=flower-sim"], 'run.lockstep: got 2, but with run.engine = "flower-sim" clients have models of their own; leave it out'),
    (["run.workers=2"], "run.workers: got 2; with run.lockstep = 2 one process visits the clients; leave one of the two out"),
    (["clients.asynchronous=true"], "clients.asynchronous: with run.lockstep = 2 clients answer together; leave one of the two out"),
    (["run.graphs=true"], "run.graphs: a step of several clients is no CUDA graph; with run.lockstep = 2 set it to false"),
    (["lora.dropout=0.1"], "lora.dropout: got 0.1; with run.lockstep = 2 a step would have one mask for all clients"),
    (['data.augment=["flip"]'], 'data.augment: got ["flip"]; with run.lockstep = 2 images cannot be varied'),
    (["run.dtype=fp16"], 'run.dtype: "fp16" scales the loss of each client by itself; with run.lockstep = 2 use "bf16" or "fp32"'),
    (["run.method=fed_sb"], "run.lockstep: fed_sb trains cores in the place of pairs, each client by itself; leave it out"),
])
def test_what_cannot_be_done_together_is_refused(sets, problem):
    with pytest.raises(ConfigError) as refused:
        load_config("digits", ["run.lockstep=2", *sets])
    assert problem in str(refused.value)


def test_a_method_of_ones_own_that_trains_by_itself_is_refused(monkeypatch):
    config = load_config("digits", ["run.method=fedavg", "run.lockstep=2"])
    kind = type(methods.create(config))

    class Own(kind):
        def client_step(self, model, client, private, message):
            return super().client_step(model, client, private, message)

    monkeypatch.setattr("fedms.methods.fedavg.FedAvg", Own)
    with pytest.raises(ConfigError, match="run.lockstep: got 2, but fedavg has its visits as client_step"):
        methods.create(config)
