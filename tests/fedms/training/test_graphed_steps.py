"""CUDA graphs of training steps (`run.graphs`), on a GPU that is not there, against the same visits without graphs."""
from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch
from fake_device import FakeCuda
from fake_graph import FakeGraphs
from tiny_language_models import configuration as of_language_model, write_federation
from visits import IMAGES, World, same, sentences

from fedms import models
from fedms.config import load_config, registry, with_run
from fedms.errors import FedMSError
from fedms.training.graphs import StepGraphs

# Three steps of one batch: the first is run, the second is captured and replayed, the third is replayed.
SETS = [*IMAGES[2:], "sal.depth=1", "stage1.epochs=3", "stage2.epochs=3", "stage1.batch=8", "stage2.batch=8", "gate.features=prefix"]
CLIENT = (8,)

# How many losses a visit trains with, of the methods that have not one in each stage.
LOSSES = {("ditto", "stage1"): 2, ("ditto", "stage2"): 2, ("apfl", "stage1"): 2, ("apfl", "stage2"): 2, ("fedms_plus", "stage2"): 2}

# Without it each kind of loss once: the other visits train with the same ones.
FULL = "FEDMS_FULL" in os.environ
VISITS = [(name, stage) for name in registry.method_names() for stage in ("stage1", "stage2")] if FULL else [
    ("fedprox", "stage1"), ("apfl", "stage1"), ("fed_sb", "stage1"), ("fedms_plus", "stage2")]


@contextmanager
def gpu_with(config, sizes):
    """A model on the GPU, and clients; the graphs of the GPU are `graphs`."""
    foundation = models.load(config.model, config.task.kind)    # on the CPU, as a run does it
    with FakeCuda(), FakeGraphs() as graphs:
        world = World(config, sizes, "cuda", foundation)
        world.graphs = graphs
        yield world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sentences that are all of the same length."""
    texts = sentences(tmp_path_factory.mktemp("own"), length=4)
    with gpu_with(load_config("sentiment", [*SETS, *texts]), CLIENT) as world:
        world.texts = texts
        yield world


def graphs_change_nothing(world, config, stage, of_gate=0.0, rounding=0.0):
    """Asserts that a visit with graphs comes to what it comes to without them; returns how many were captured and replayed."""
    plain = world.visits(config, stage)
    world.model.graphs = StepGraphs(world.model)
    before = world.graphs.captured, world.graphs.replays
    found = world.visits(with_run(config, graphs=True), stage)
    for (one, kept), (other, own) in zip(found, plain, strict=True):
        assert one.reply is not None, one.reason
        assert one.flops == other.flops and one.reply.metrics == pytest.approx(other.reply.metrics, rel=of_gate + rounding, abs=0)
        for tensors, wanted in ((kept.tensors, own.tensors), (one.reply.tensors, other.reply.tensors)):
            assert rounding or all(torch.equal(tensors[n], t) for n, t in wanted.items() if "gate/" not in n or not of_gate)
            same(tensors, wanted, of_gate + rounding)
    return world.graphs.captured - before[0], world.graphs.replays - before[1]


@pytest.mark.parametrize("name, stage", VISITS)
def test_every_method_is_captured_and_trains_the_same_bits(world, name, stage):
    losses = LOSSES.get((name, stage), 1)
    found = graphs_change_nothing(world, load_config("sentiment", [*SETS, *world.texts, f"run.method={name}"]), stage)
    assert found == (2 * losses, 4 * losses)      # a forward and a backward pass of each, in two steps


@pytest.mark.parametrize("sets, of_gate", [
    (["run.method=fedms", "gate.mixing=layers"], 1e-6),     # the parts of the gate's gradient are added in another order
    (["run.method=fedms_plus", "plus.gate_on=validation"], 0),
    *[pytest.param(*more, marks=pytest.mark.skipif(not FULL, reason="make test-full")) for more in (
        (["run.method=fedms", "gate.on=probabilities", "gate.training=private"], 0),
        (["run.method=fedms_plus", "gate.mixing=layers", "plus.gate_on=validation"], 1e-6))],
], ids=["in layers", "the gate alone", "probabilities", "the gate alone in layers"])
def test_every_way_to_mix_is_captured(world, sets, of_gate):
    captured, replays = graphs_change_nothing(world, load_config("sentiment", [*SETS, *world.texts, *sets]), "stage2", of_gate)
    assert replays > captured >= 2


@pytest.mark.parametrize("stage", ["stage1", pytest.param("stage2", marks=pytest.mark.skipif(not FULL, reason="make test-full"))])
def test_a_language_model_is_captured_where_batches_have_as_many_positions_and_tokens_as_before(tmp_path, stage):
    folder = write_federation(tmp_path, ["amy", "bob"], 16, lambda who, number: who)
    config = of_language_model(folder, *SETS, 'model.targets=["v_proj","down_proj"]', "run.method=fedms")
    with gpu_with(config, CLIENT) as world:
        # The CPU's products, which stand in for the GPU's, depend on how memory is aligned (not with MKL_CBWR=COMPATIBLE).
        assert graphs_change_nothing(world, config, stage, rounding=1e-6) == (2, 4)


def test_a_step_that_cannot_be_captured_says_why(world, monkeypatch):
    loss = world.model.task.loss
    monkeypatch.setattr(world.model.task, "loss", lambda opinion, targets: loss(opinion, targets) * float(opinion.detach().sum()))
    with pytest.raises(FedMSError, match="run.graphs: this step cannot be captured as a CUDA graph: .*; set run.graphs = false"):
        graphs_change_nothing(world, load_config("sentiment", [*SETS, *world.texts, "run.method=fedavg"]), "stage1")
