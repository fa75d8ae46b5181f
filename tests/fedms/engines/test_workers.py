"""Clients visited by worker processes: the bits of a run without them, and what is said of a worker that fails."""
from __future__ import annotations

import json
import os

import errands
import pytest

from fedms import models
from fedms.config import ConfigError, load_config, with_run
from fedms.engines.workers import WorkerFailed, Workers
from fedms.errors import Interrupted, WorkerDied
from fedms.federated.client import Message, Private
from fedms.privacy.key_file import create_key
from fedms.runs.run import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords, comparable

SETS = ["data.max_samples=100", "clients.count=3", "clients.unseen=0", "stage1.rounds=2", "stage2.rounds=1",
        "data.partition=iid", "clients.optimizer=kept", "lora.dropout=0.1", "run.threads=1", "run.method=fedms_plus", "run.device=cpu"]
CONFIG = load_config("digits", SETS)


def everything(path):
    """All records but for the number of workers, and all tensors of the last checkpoint."""
    records = comparable(RunRecords.read(path))
    for tables in (records["config"], records["summary"].get("config", {})):
        tables.get("run", {}).pop("workers", None)
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    tensors = {**snapshot.tensors, **{f"{i}/{n}": t for i, own in snapshot.private.items() for n, t in own.items()}}
    return json.dumps(records), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_two_workers_go_on_with_a_run_of_none_and_give_its_bits(tmp_path):
    run(CONFIG, tmp_path / "none")
    asked = iter([False] * 2 + [True])
    with pytest.raises(Interrupted):
        run(CONFIG, tmp_path / "two", stop=lambda: next(asked))
    assert run(with_run(CONFIG, workers=2), tmp_path / "two", resume=True)["method"] == "fedms_plus"
    assert everything(tmp_path / "two") == everything(tmp_path / "none")


@pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="two more processes: make test-full")
def test_two_workers_of_a_run_with_privacy_give_the_bits_of_none(tmp_path):
    create_key(tmp_path / "privacy.key", b"a key these tests have all alone")
    sets = ["run.method=fedms", "clients.count=4", "stage1.rounds=1", "clients.optimizer=fresh", "sal.schedule=fixed",
            "aggregate.weights=uniform", "privacy.mode=distributed", "privacy.noise=0.5", "privacy.score_noise=5",
            f"privacy.key={tmp_path / 'privacy.key'}"]
    for count in (1, 2):
        run(load_config("digits", [*SETS, *sets, f"run.workers={count}"]), tmp_path / str(count))
    assert everything(tmp_path / "1") == everything(tmp_path / "2")


def message(round):
    return Message("stage1", round, (), 1, 1, {})


def test_results_come_in_the_order_of_the_clients_and_a_dead_worker_is_named():
    states = {}

    def visits(round, *clients):
        found = []
        for client, (said, after) in zip(clients, workers.each("visit", message(round), clients, lambda i: states.get(i, Private()),
                                                               on_common_test=True)):
            states[client] = after
            found.append(said)
        return found

    workers = Workers(errands.start, [{"GPU_OF_A_TEST": "a"}, {"GPU_OF_A_TEST": "b"}, {"GPU_OF_A_TEST": "c"}])
    try:
        workers.paid = {"earlier"}
        further = {"on_common_test": True}
        first, second, third = visits(1, 0, 1, 3)
        assert first == ("visit", 1, 0, ["earlier"], "a", further)
        # A worker that is slow to begin is told what others have paid for meanwhile.
        assert second in [("visit", 1, 1, paid, "b", further) for paid in (["earlier"], ["constant of 0", "earlier"])]
        assert third[:3] + third[4:] == ("visit", 1, 3, "a", further) and {"constant of 0", "earlier"} <= set(third[3])
        assert workers.paid == {"earlier", "constant of 0", "constant of 1", "constant of 3"}
        visits(2, 0, 2)
        assert {client: int(state.tensors["count"]) for client, state in states.items()} == {0: 2, 1: 1, 2: 1, 3: 1}
        with pytest.raises(WorkerFailed, match="worker 2 of 3, busy with client 4: ValueError: a number is missing") as failed:
            visits(3, errands.RAISES)
        assert "errands.py" in str(failed.value.__cause__) and failed.value.resumable
        with pytest.raises(WorkerDied, match="worker 3 of 3, busy with client 5, was killed; if memory ran out, use fewer run.workers"):
            visits(3, 3, errands.DIES)
    finally:
        workers.close()


def test_a_worker_that_cannot_begin_says_why_and_on_which_gpu():
    workers = Workers(errands.cannot_start, [{"CUDA_VISIBLE_DEVICES": "7"}])
    try:
        with pytest.raises(WorkerFailed, match=r"worker 1 of 1 \(GPU 7\), loading the model and the data: OSError: no such model"):
            list(workers.each("visit", message(1), [0], lambda client: Private()))
    finally:
        workers.close()


def test_what_cannot_have_workers_says_so(tmp_path):
    with pytest.raises(ConfigError, match='run.workers: got 2, but run.engine = "flower-sim" has processes of its own; leave it out'):
        load_config("digits", ["run.workers=2", "run.engine=flower-sim"])
    with pytest.raises(ConfigError, match='run.workers: 2 cannot send a model or a data set that is an object of this process'):
        run(with_run(CONFIG, workers=2), tmp_path / "run", foundation=models.load(CONFIG.model))
