"""Buffered rounds: the arithmetic of old replies, any order of arrivals again and again, and Flower against the embedded run."""
from __future__ import annotations

import json
import math
import random

import pytest
import torch

from fedms.config import ConfigError, load_config
from fedms.engines.arrivals import Drawn
from fedms.errors import Interrupted
from fedms.federated.client import Message, Reply
from fedms.federated.server import AllClientsFailed, carried
from fedms.progress import Progress
from fedms.runs import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords, comparable

SMALL = ["data.max_samples=200", "clients.count=5", "clients.unseen=0", "stage1.rounds=3", "stage2.rounds=2", "data.partition=iid",
         "run.threads=1", "clients.asynchronous=true", "clients.fraction=0.8", "clients.buffer=2"]


def config(*sets, engine="local"):
    return load_config("digits", [*SMALL, *sets, f"run.engine={engine}"])


def outcome(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    return comparable(RunRecords.read(path)), snapshot.tensors


def local(path, *sets, **options):
    run.run(config(*sets), path, **options)
    return outcome(path)


def same(a, b):
    tensors = [name for name in a[1] if name.startswith("tensors/")]
    assert tensors and all(torch.equal(a[1][name], b[1][name]) for name in tensors)
    for part in ("rounds", "visits", "clients"):
        assert json.dumps(a[0][part]) == json.dumps(b[0][part]), part


# The arithmetic

def message(round, value):
    return Message("stage1", round, (), 1, 1, {"expert/x": torch.tensor(value)})


def test_an_old_reply_counts_as_its_change_divided_by_the_root_of_its_age():
    """Against x' = now + (x - sent) / sqrt(1 + s) in float64."""
    draw = torch.Generator().manual_seed(0)
    sent, now, reply = (torch.randn(7, 3, generator=draw).tolist() for _ in range(3))
    told = Reply(0, {"expert/x": torch.tensor(reply)}, 3, 1, None, {})
    for age in (1, 2, 9):
        found = carried(told, message(4, sent), message(4 + age, now)).tensors["expert/x"]
        expected = torch.tensor(now).double() + (torch.tensor(reply).double() - torch.tensor(sent).double()) / math.sqrt(1 + age)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert carried(told, message(4, sent), message(4, sent)) is told


def test_the_time_of_a_visit_is_half_normal_and_belongs_to_the_visit():
    """The first and second moments of |x|, x ~ N(0, 1), are sqrt(2 / pi) and 1."""
    order = Drawn(0)
    order.sent(message(1, 0.0), range(4000))
    times = torch.tensor(list(order.due.values()))
    assert abs(times.mean() - math.sqrt(2 / math.pi)) < 0.03 and abs(times.pow(2).mean() - 1) < 0.06
    again = Drawn(0)
    again.sent(message(1, 0.0), [17])
    assert again.due[17] == order.due[17]
    first, _ = order.next(range(4000), message(1, 0.0))
    assert order.clock == min(times) and order.due[first] == order.clock


# The rounds

def test_a_round_goes_on_after_so_many_replies(tmp_path):
    records, _ = local(tmp_path / "run")
    assert [r["clients"] for r in records["rounds"]] == [2] * 5
    ages, at_work = [], {}
    for number, visit in enumerate(records["visits"]):
        assert visit["status"] == "ok"
        ages.append(visit["staleness"])
        at_work.setdefault((visit["stage"], visit["round"]), []).append(visit["client"])
    assert max(ages) >= 1 and min(ages) == 0
    assert all(visit["staleness"] < visit["round"] for visit in records["visits"])      # none of stage 1 counts in stage 2
    assert all(len(set(clients)) == 2 for clients in at_work.values())


def test_the_seed_gives_the_same_bits_and_another_one_another_order(tmp_path):
    first = local(tmp_path / "a")
    same(first, local(tmp_path / "b"))
    order = [visit["client"] for visit in first[0]["visits"]]
    assert order != [visit["client"] for visit in local(tmp_path / "c", "run.seed=1")[0]["visits"]]


def test_a_buffer_for_all_that_are_at_work_is_a_round_as_ever(tmp_path):
    """The same mean, added up in another order."""
    buffered, ordinary = local(tmp_path / "a", "clients.buffer=4"), local(
        tmp_path / "b", "clients.asynchronous=false", "clients.buffer=none")
    assert {visit["staleness"] for visit in buffered[0]["visits"]} == {0}
    assert "staleness" not in ordinary[0]["visits"][0]
    for name, tensor in ordinary[1].items():
        if name.startswith("tensors/"):
            assert torch.allclose(buffered[1][name], tensor, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("moment", [1, 4, 7, 9, 13])
def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path, moment):
    calls = iter(range(10**6))
    with pytest.raises(Interrupted):
        local(tmp_path / "run", stop=lambda: next(calls) >= moment)
    same(local(tmp_path / "run", resume=True), local(tmp_path / "whole"))


def test_recorded_arrivals_are_repeated(tmp_path):
    """Drawn by another seed's order: the records of a run with seed 0 do not fit clients drawn by seed 1."""
    first = local(tmp_path / "a")
    same(first, local(tmp_path / "b", f"clients.arrivals={tmp_path / 'a'}"))
    with pytest.raises(ConfigError, match="answers next in stage[12], round [123], and here the clients .* are at work"):
        local(tmp_path / "c", f"clients.arrivals={tmp_path / 'a'}", "run.seed=1")
    local(tmp_path / "d", "clients.asynchronous=false", "clients.buffer=none")
    with pytest.raises(ConfigError, match="were not buffered"):
        local(tmp_path / "e", f"clients.arrivals={tmp_path / 'd'}")


@pytest.mark.parametrize("sets, words", [
    (["privacy.mode=secure", "aggregate.weights=uniform", "run.method=fedavg", "sal.schedule=fixed"], "masks cancel only in the sum"),
    (["privacy.mode=central", "privacy.noise=1", "aggregate.weights=uniform", "run.method=fedavg", "sal.schedule=fixed"],
     "epsilon is computed for rounds whose clients are drawn anew"),
    (["run.method=fedavg", "aggregate.rule=krum"], "compares tensors"),
    (["run.method=fedavg", "aggregate.rule=exact"], "multiplies tensors"),
    (["run.method=fedavg", "aggregate.rule=svd"], "multiplies tensors"),
    (["run.engine=flower-sim"], "an order that cannot be repeated"), (["clients.arrivals=x", "run.engine=flower"], "leave it unset"),
    (["clients.asynchronous=false"], "clients.buffer: acts on buffered rounds alone")])
def test_what_does_not_go_together_is_refused_with_the_reason(sets, words):
    with pytest.raises(ConfigError, match=words):
        load_config("digits", [*SMALL, *sets])


# Over Flower

def grid_and_shard(tmp_path, faults=None):
    """Nodes that answer one after the other, in an order that only this grid knows."""
    pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")
    from fake_grid import FakeGrid
    from shards import write_shards

    from fedms.data import read_shard
    from fedms.storage.durable import shard_about

    if not (tmp_path / "shards").exists():
        write_shards(config(engine="flower"), tmp_path / "shards", Progress())
    n_train = {i: shard_about(tmp_path / f"shards/client-{i}")["clients"][0]["n_train"] for i in range(5)}
    order = random.Random(4)

    class OneByOne(FakeGrid):
        def pull_messages(self, ids):
            trained = [number for number in ids if self.kinds[number] == "train" and self.replies.get(number)]
            return super().pull_messages([number for number in ids if self.kinds[number] != "train"] or
                                         order.sample(trained, min(1, len(trained))))

        def push_messages(self, messages):
            messages = list(messages)
            numbers = super().push_messages(messages)
            self.kinds |= {number: message.metadata.message_type for number, message in zip(numbers, messages)}
            return numbers

    grid = OneByOne(tmp_path / "states", 5, n_train, lambda i: tmp_path / f"shards/client-{i}", faults)
    grid.kinds = {}
    return grid, read_shard(tmp_path / "shards/server")


def deployed(tmp_path, *sets, faults=None, **options):
    grid, shard = grid_and_shard(tmp_path, faults)
    run.run(config(*sets, engine="flower"), tmp_path / "flower", grid=grid, shard=shard, **options)
    return outcome(tmp_path / "flower")


def repeated(tmp_path, *sets):
    return local(tmp_path / "again", f"clients.arrivals={tmp_path / 'flower'}", *sets)


def same_model(a, b):
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1] if name.startswith("tensors/"))
    assert a[0]["clients"] == b[0]["clients"]
    kept = ("stage", "round", "client", "status", "staleness", "loss", "validation_accuracy")
    assert [[v[k] for k in kept] for v in a[0]["visits"]] == [[v[k] for k in kept] for v in b[0]["visits"]]


def test_a_federation_s_order_of_arrivals_gives_its_bits_in_one_process(tmp_path):
    def broken(message, answer):
        raise_in = side.guarded(message, 2, lambda *_: 1 / 0)
        return raise_in

    pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")
    from fedms.engines.flower import client as side

    found = deployed(tmp_path, faults={("train", "stage1 1", 2): broken})
    assert max(visit["staleness"] for visit in found[0]["visits"]) >= 1
    same_model(found, repeated(tmp_path))


@pytest.mark.parametrize("moment", [2, 5, 9])
def test_a_server_that_stops_asks_again_what_was_under_way_and_can_be_repeated(tmp_path, moment):
    calls = iter(range(10**6))
    with pytest.raises(Interrupted):
        deployed(tmp_path, stop=lambda: next(calls) >= moment)
    found = deployed(tmp_path, resume=True)
    assert {visit["status"] for visit in found[0]["visits"]} == {"ok"}
    same_model(found, repeated(tmp_path))


def test_a_client_that_never_answers_holds_nobody_up(tmp_path):
    silent = {("train", None, client): lambda message, answer: None for client in (1, 3)}
    found = deployed(tmp_path, "clients.round_timeout=0.3", "clients.join_timeout=0.3", faults=silent)
    assert {visit["client"] for visit in found[0]["visits"] if visit["status"] == "ok"} <= {0, 2, 4}
    assert [r["clients"] for r in found[0]["rounds"]].count(2) >= 3
    everyone = {("train", None, client): lambda message, answer: None for client in range(5)}
    with pytest.raises(AllClientsFailed, match="no client could train"):
        deployed(tmp_path, "clients.round_timeout=0.3", "clients.join_timeout=0.3", faults=everyone, overwrite=True)
