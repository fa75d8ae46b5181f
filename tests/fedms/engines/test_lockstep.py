"""Clients side by side (`run.lockstep`), against the same clients one after the other."""
from __future__ import annotations

import collections
import functools
import json
import os

import pytest
import torch
from private_runs import configuration, new_key
from tiny_language_models import configuration as of_language_model, write_federation
from torch.utils._python_dispatch import TorchDispatchMode
from visits import IMAGES, World, agree, same, sentences

from fedms import methods
from fedms.config import ConfigError, load_config, registry, with_run
from fedms.errors import Interrupted
from fedms.federated.local_training import Steps
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords, comparable


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return World(load_config("digits", IMAGES))


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


class Counter(TorchDispatchMode):
    """Counts the operators that are called within the context, by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_what_a_step_calls_does_not_grow_with_its_clients_where_they_share_it(digits, monkeypatch):
    """A layer, and the optimizer, are called once for all clients; the optimizer and the clipping are few calls beside the pass."""
    steps = []

    def counted(step, self, running):
        backward = self._backward

        def alone(*arguments):
            with Counter() as inner:
                backward(*arguments)
            steps[-1].append(inner.calls)
        with Counter() as outer:
            steps.append([len(running), outer.calls])
            self._backward = alone
            step(self, running)
            self._backward = backward
    monkeypatch.setattr(Steps, "_step", functools.partialmethod(functools.partial(counted, Steps._step)))
    config = load_config("digits", [*IMAGES, "run.method=fedavg"])
    for lockstep in (False, True):
        digits.visits(config, "stage1", lockstep=lockstep)
    one = [step for step in steps if step[0] == 1][1]       # the first step makes the optimizer's state
    three = next(step for step in steps if step[0] == 3)
    for _, outer, inner in (one, three):
        assert inner["fedms_ext.expert_linear.default"] == inner["fedms_ext.expert_linear_backward.default"] == 8
        assert outer["aten._fused_adamw_.default"] == 1 and outer["aten._foreach_norm.Scalar"] == 1
    assert 10 * (one[1] - one[2]).total() < one[2].total()


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
    stopped, undisturbed = (json.dumps(comparable(RunRecords.read(tmp_path / name))) for name in ("stopped", "undisturbed"))
    assert stopped == undisturbed
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
