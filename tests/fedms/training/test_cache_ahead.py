"""`[sal] cache_ahead`: in a run whose depth grows, each sample passes each frozen block once."""
from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedms import methods
from fedms.config import load_config
from fedms.data import ClientSplit
from fedms.data.subset import Subset
from fedms.federated.client import Client, Private, visit
from fedms.federated.lockstep import together
from fedms.federated.server import Server
from fedms.federated.visit_costs import CostModel
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTask
from fedms.training.constants import new_cache, prefix_bytes
from fedms_ext import ConstantPrefix, activation_order

GROWS = ["run.method=fedavg", "data.max_samples=120", "clients.count=2", "clients.unseen=0", "stage1.rounds=4", "stage2.rounds=0",
         "data.partition=iid", "sal.schedule=every", "sal.every=1", "stage1.batch=16", "run.threads=1"]


class World:
    """The digits and their model of four blocks, in runs that are taken apart."""

    def __init__(self) -> None:
        self.task = LoadedTask(load_config("digits", GROWS), Progress())
        self.model = self.task.model
        # The first replay of a class of blocks runs one of them, to learn the form of what it returns.
        inputs = self.model.inputs(torch.arange(1))
        prefix = ConstantPrefix(self.model.foundation.module, 1)
        with prefix.replay(prefix.capture(lambda: self.model.foundation.features(inputs))):
            self.model.foundation.features(inputs)

    def begin(self, *sets):
        config = load_config("digits", [*GROWS, *sets])
        self.model.config = config
        self.model.order = activation_order(self.model.blocks, config.sal.order)
        self.model.cache = new_cache(self.model)
        self.model.start()
        return self.task.experiment(config)

    def rounds(self, experiment, lockstep=False):
        """Carry out stage 1, and yield each round's visits and message, and the state after it."""
        server, method, clients = experiment.server, experiment.method, experiment.clients
        state = server.start(method.initial(self.model))
        while state.stage != "done":
            message, collected = server.message(state), server.collect(state)
            if lockstep:
                turns = together(method.visit, self.model, [(client, Private()) for client in clients], message, server.ahead)
                visits = [turn.visit()[0] for turn in turns]
            else:
                visits = [visit(method.client_step, self.model, client, Private(), message, server.ahead(message, client))[0]
                          for client in clients]
            for came in visits:
                collected.add(came.reply)
            state, _ = server.step(state, collected)
            yield visits, message, state

    def costs(self, experiment):
        return CostModel(self.model, experiment.method, experiment.config, experiment.partition)


@pytest.fixture(scope="module")
def world():
    return World()


def frozen_passes(model):
    """Counts how many samples pass each block without a gradient, from now on."""
    passes, first = Counter(), {layer.block: layer for layer in reversed(model.layers.values())}

    def count(block, _, args, out):
        if not torch.is_grad_enabled():
            passes[block] += len(args[0])
    return passes, [layer.register_forward_hook(partial(count, block)) for block, layer in first.items()]


@pytest.mark.parametrize("sets", [[], ["sal.step=2"], ["sal.cache=disk"], ["sal.cache_dtype=bf16"], ["sal.order=[4,2,1,3]"]])
def test_each_sample_passes_each_frozen_block_once(world, sets, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    experiment = world.begin(*sets)
    validated = sum(len(client.validation) for client in experiment.clients)
    everything = validated + sum(len(client.train) for client in experiment.clients)
    passes, hooks = frozen_passes(world.model)
    try:
        for _, message, _ in world.rounds(experiment):
            below = world.model.untrained_below(message.depth)
            # In round 1 everything passes the frozen blocks; after that a pass that validates begins above them.
            wanted = {block: everything * (block <= below and message.round == 1) + validated * (block > below)
                      for block in range(1, 5)}
            assert dict(passes) == {block: n for block, n in wanted.items() if n}, message.round
            passes.clear()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("sets", [
    ["clients.budgets=[{share=1, max_depth=2}]"], ["run.method=fedms", "stage1.rounds=2", "stage2.rounds=2"],
    ["run.method=fedms", "stage1.rounds=2", "stage2.rounds=2", "gate.features=prefix", "sal.order=interleaved"]])
def test_blocks_below_all_applied_pairs_are_passed_once(world, sets):
    experiment = world.begin(*sets)
    below_all, every = world.model.blocks, sum(len(client.train) + len(client.validation) for client in experiment.clients)
    passes, hooks = frozen_passes(world.model)
    flops = []
    try:
        for visits, message, _ in world.rounds(experiment):
            was, below_all = below_all, world.model.untrained_below(message.applied_depth)
            assert not any(passes[block] for block in range(1, below_all + 1)) or was == world.model.blocks
            assert all(passes[block] in (0, every) for block in range(1, below_all + 1)), message
            flops.append(sum(came.flops for came in visits))
            passes.clear()
    finally:
        for hook in hooks:
            hook.remove()
    anew = [sum(came.flops for came in visits) for visits, _, _ in world.rounds(world.begin(*sets, "sal.cache_ahead=false"))]
    assert flops[0] == anew[0] and all(flop <= other for flop, other in zip(flops, anew)) and sum(flops) < sum(anew)


def test_what_is_counted_is_what_is_done(world):
    counted = {}
    for ahead in ("true", "false"):
        experiment = world.begin(f"sal.cache_ahead={ahead}")
        every = [[came.flops for came in visits] for visits, _, _ in world.rounds(experiment)]
        costs = world.costs(experiment)
        own = experiment.partition.clients.index(costs.largest)
        work = [costs.work(depth, True) for depth in range(1, 5)]
        wanted = [each.flops + (each.building_flops if ahead == "false" or depth == 1 else 0)
                  for depth, each in enumerate(work, start=1)]
        counted[ahead] = [flops[own] for flops in every]
        assert counted[ahead] == wanted
    assert sum(counted["true"]) < sum(counted["false"])
    side_by_side = [visits[own].flops for visits, _, _ in world.rounds(world.begin(), lockstep=True)]
    assert side_by_side == counted["true"]


def test_logits_and_features_pay_for_the_prefix_that_they_start_from(world):
    world.begin()
    model, part = world.model, Subset(torch.arange(20))
    moved = {name: tensor + 0.1 for name, tensor in model.initial(0).items()}
    model.load("global", moved, depth=0, applied_depth=3)
    model.load("local", moved, depth=1, applied_depth=3)
    for stream, ask in (("global", lambda: model.frozen_opinions("global", part)), (None, lambda: model.features(part))):
        model.meter.flops = 0
        ask()
        with model.stream(stream) as used:
            below = used.chunk_flops(part, model.prefix_chunk, last=3)
            assert model.meter.flops == below + used.live_flops(part) > below > 0
        before = model.meter.flops
        ask()
        assert model.meter.flops == before


def test_the_bits_are_those_of_a_run_that_computes_anew(world):
    ends = []
    same = ["run.method=fedms_plus", "stage1.rounds=2", "stage2.rounds=2", "clients.budgets=[{share=0.5, max_depth=1}, {share=0.5}]"]
    for sets in (["sal.cache_ahead=true"], ["sal.cache_ahead=false"], ["sal.cache_bytes=100000"]):
        *_, (_, _, state) = world.rounds(world.begin(*sets, *same))
        ends.append({name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()})
    assert ends[0] == ends[1] == ends[2]


def test_a_small_cache_keeps_fewer_outputs_and_counts_the_rest(world):
    experiment = world.begin()
    costs = world.costs(experiment)
    own = experiment.partition.clients.index(costs.largest)
    room = 2 * prefix_bytes(world.model, costs.largest.train)
    work = [costs.work(depth, True).flops for depth in range(1, 5)]
    # Outputs are needed behind blocks 3, 2 and 1. Half of the cache has room for one, two or all three of the training samples'.
    for outputs in (1, 2, 3):
        experiment = world.begin(f"sal.cache_bytes={outputs * room}")
        found = []
        for visits, message, _ in world.rounds(experiment):
            found.append(visits[own].flops - work[message.depth - 1])
            assert world.model.cache.nbytes <= outputs * room
        assert [extra > 0 for extra in found] == [True, outputs < 2, outputs < 3, False]


def test_plans_count_what_is_kept(world):
    experiment = world.begin()
    costs = world.costs(experiment)
    one, largest = costs.constants(1), experiment.partition.clients.index(costs.largest)
    assert [costs.boundaries(depth, True) for depth in (1, 2, 3, 4)] == [[3], [3, 2], [3, 2, 1], [3, 2, 1]]
    assert [costs.boundaries(depth, False) for depth in (1, 2, 3, 4)] == [[3], [2], [1], []]
    assert [costs.constants(depth, True) for depth in (1, 2, 3, 4)] == [one, 2 * one, 3 * one, 3 * one]
    assert [costs.constants(depth) for depth in (1, 2, 3, 4)] == [one, one, one, 0]
    assert costs.building(3, "memory", True) == costs.building(4, "memory", True) == 3 * costs.building(3, "memory") > 0
    assert costs.building(3, "off", True) == 0 == costs.building(4, "disk") < costs.building(3, "memory") < costs.building(3, "disk")
    client = experiment.clients[largest]
    message = experiment.server.message(experiment.server.start(experiment.method.initial(world.model)))
    visit(experiment.method.client_step, world.model, client, Private(), message, experiment.server.ahead(message, client))
    assert world.model.cache.nbytes == costs.constants(4, True)
    bounded = world.costs(world.begin(f"sal.cache_bytes={2 * one}"))
    assert bounded.constants(3, True) == 2 * one and bounded.constants(3) == one


def test_who_makes_no_provision(world):
    """A device whose memory is planned, an evaluation, and a schedule that stays."""
    def ahead(*sets, stage="stage1", round=1):
        config = load_config("digits", [*GROWS, *sets])
        method, model = methods.create(config), world.model
        server = Server(config, list(range(model.blocks, 0, -1)), model.block_of, method)
        state = server.start({})
        client = Client(ClientSplit(0, None, *[torch.empty(0)] * 3), config)
        return server.ahead(server.message(replace(state, stage=stage, round=round)), client)

    assert ahead() == (2, 3, 4) and ahead(round=3) == (2,) and ahead(round=4) == () and ahead(stage="done") is None
    assert ahead("sal.schedule=all") == () == ahead("sal.schedule=fixed") and ahead("sal.cache_ahead=false") is None
    both = ["stage1.rounds=2", "stage2.rounds=2", "sal.every=2"]
    assert ahead(*both) == (2,) == ahead(*both, round=2) and ahead(*both, stage="stage2", round=2) == ()
    assert ahead(*both, "run.method=fedms") == ()           # which begins anew in stage 2
    assert ahead("clients.budgets=[{share=1, memory='1GiB'}]") is None
    assert ahead("clients.budgets=[{share=1, max_depth=2}]") == (2, 3, 4)       # passes start below what others train
