"""Whole runs with privacy: the same bits on every engine and after a crash, and nothing of a single client anywhere."""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="pip install 'fedms[flower]'")

from fake_grid import FakeGrid
from private_runs import COUNT, MODES, SETS, configuration, new_key
from shards import write_shards
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedms.config import registry
from fedms.data import read_shard
from fedms.engines.flower import transport
from fedms.errors import AllClientsFailed, ConfigError, Interrupted
from fedms.federated.client import ClientFailure
from fedms.federated.private_client import charge
from fedms.federated.schema import TASKS
from fedms.privacy.key_file import create_key
from fedms.privacy.ledger import BudgetSpent, Price, read_ledger
from fedms.privacy.secure_round import Held
from fedms.privacy.secure_sum import Terms
from fedms.progress import Progress
from fedms.report.page import render
from fedms.runs import run
from fedms.runs.experiment import LoadedTask
from fedms.runs.nodes import simulation_app
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.durable import shard_about
from fedms.storage.records import RunRecords, comparable

ROUNDS = ["stage1.rounds=2", "stage2.rounds=1", "clients.round_timeout=0.3"]


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return new_key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def configure(key):
    return lambda *sets, engine="local": configuration(key, *ROUNDS, *sets, f"run.engine={engine}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, key):
    made = {}

    def of(mode, *sets):
        if (mode, *sets) not in made:
            folder = tmp_path_factory.mktemp("shards")
            write_shards(configuration(key, *ROUNDS, *MODES[mode], *sets), folder, Progress())
            made[(mode, *sets)] = folder, {i: shard_about(folder / f"client-{i}")["clients"][0]["n_train"] for i in range(COUNT)}
        return made[(mode, *sets)]
    return of


class Heard(Progress):
    def __init__(self):
        self.notes, self.visits, self.rounds = [], [], []

    def note(self, text):
        self.notes.append(text)

    def visit(self, stage, round, client, **metrics):
        self.visits.append({"client": client, **metrics})

    def round(self, stage, round, **metrics):
        self.rounds.append(metrics)


def embedded(config, out, **options):
    run.run(config, out, **options)
    return outcome(out)


def deployed(config, out, shards, faults=None, **options):
    folder, n_train = shards
    grid = FakeGrid(out.parent / "states", COUNT, n_train, lambda i: folder / f"client-{i}", faults)
    heard = Heard()
    run.run(config, out, grid=grid, shard=read_shard(folder / "server"), progress=heard, **options)
    return outcome(out), heard, grid


def outcome(path):
    snapshot, _ = CheckpointFolder(path / "checkpoint").load()
    return comparable(RunRecords.read(path)), snapshot.tensors


def shared(found):
    return {name: tensor for name, tensor in found[1].items() if name.startswith(("tensors/", "sums/"))}


def same(a, b):
    assert shared(a).keys() == shared(b).keys() and all(torch.equal(shared(a)[name], shared(b)[name]) for name in shared(a))
    for part in ("rounds", "visits", "clients", "summary"):
        assert json.dumps(a[0][part]) == json.dumps(b[0][part]), part


@pytest.mark.parametrize("mode", MODES)
def test_nodes_with_their_own_data_give_the_same_bits_and_records(mode, tmp_path, configure, shards):
    there, heard, _ = deployed(configure(*MODES[mode], engine="flower"), tmp_path / "flower", shards(mode))
    here = embedded(configure(*MODES[mode]), tmp_path / "embedded")
    same(there, here)
    assert read_ledger(tmp_path / "flower/privacy.jsonl") == read_ledger(tmp_path / "embedded/privacy.jsonl")
    assert len(read_ledger(tmp_path / "flower/privacy.jsonl")) == (0 if mode == "secure" else 4)
    assert not [note for note in heard.notes if "refused" in note or "drops out" in note]


@pytest.mark.parametrize("kind", TASKS)
def test_a_simulated_node_takes_every_kind_of_message(kind, tmp_path, configure):
    """Flower raises an error for a kind that its app has no function for."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    message = Message(transport.write({}, {}), 1, kind)
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    head, _ = transport.read(simulation_app(tmp_path, configure(*MODES["secure"]))(message, context).content)
    assert "format None" in head["problem"]


@pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="starts Ray")
@pytest.mark.parametrize("mode", MODES)
def test_flower_s_own_simulation_gives_the_same_bits(mode, tmp_path, configure):
    """Flower's `run_simulation`, with its grid, its routing of messages and Ray's processes."""
    sets = [*MODES[mode], "stage1.rounds=1"]
    run.run(configure(*sets, engine="flower-sim"), tmp_path / "flower")
    same(outcome(tmp_path / "flower"), embedded(configure(*sets), tmp_path / "embedded"))
    ledgers = [read_ledger(tmp_path / engine / "privacy.jsonl") for engine in ("flower", "embedded")]
    assert ledgers[0] == ledgers[1]


def test_another_key_other_noise_and_without_noise_the_same_model(tmp_path, configure, key):
    """The masks leave no trace: a secure run gives what a central one without noise would."""
    create_key(tmp_path / "other", bytes(32))
    one = embedded(configure(*MODES["secure"]), tmp_path / "a")
    two = embedded(configure(*MODES["secure"], f"privacy.key={tmp_path / 'other'}"), tmp_path / "b")
    assert all(torch.equal(shared(one)[name], shared(two)[name]) for name in shared(one))
    noisy = [embedded(configure(*MODES["central"], f"privacy.key={path}"), tmp_path / name)
             for name, path in (("c", key), ("d", tmp_path / "other"))]
    assert any(not torch.equal(shared(noisy[0])[name], shared(noisy[1])[name]) for name in shared(one))


def test_without_clipping_and_noise_a_sum_is_the_mean(tmp_path, configure):
    """What rounding to 2^-20 of a clip that nobody reaches leaves of an ordinary run."""
    once = ["stage1.rounds=1", "stage2.rounds=0"]
    private = embedded(configure(*MODES["secure"], "privacy.clip=8", "privacy.bits=20", *once), tmp_path / "a")
    plain = embedded(configure(*once), tmp_path / "b")
    for name, tensor in shared(plain).items():
        assert torch.allclose(shared(private)[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("phase, counts", [("share", False), ("mask", False), ("reveal", True)])
def test_client_that_drops_out_of_a_phase(phase, counts, tmp_path, configure, shards):
    def silent(message, answer):
        head, _ = transport.read(message.content)
        return None if head["phase"] == phase else answer(message)

    sets = [*MODES["secure"], "stage1.rounds=1", "stage2.rounds=0"]
    found, heard, _ = deployed(configure(*sets, engine="flower"), tmp_path / "flower",
                               shards("secure", "stage1.rounds=1", "stage2.rounds=0"), {("query.sum", "stage1 1", 2): silent})
    visits = {visit["client"]: visit["status"] for visit in found[0]["visits"]}
    assert visits == {0: "ok", 1: "ok", 2: "ok" if counts else "failed", 3: "ok"}
    assert found[0]["rounds"][0]["clients"] == 3 + counts
    assert any("client 2 drops out of the sum" in note for note in heard.notes)


def test_too_many_drop_out(tmp_path, configure, shards):
    sets = ["stage1.rounds=1", "stage2.rounds=0"]
    faults = {("query.sum", "stage1 1", client): lambda message, answer: None for client in (1, 2)}
    with pytest.raises(AllClientsFailed, match="no secure sum came about in 3 attempts: .*; a run that goes on tries again"):
        deployed(configure(*MODES["secure"], *sets, engine="flower"), tmp_path / "a", shards("secure", *sets), faults)


def test_client_that_fails_adds_nothing_and_nobody_can_tell(tmp_path, configure, monkeypatch):
    """Its visit is recorded like any other."""
    step = LoadedTask(configure(), Progress()).experiment(configure()).method.__class__.client_step

    def fails(self, model, client, private, message):
        if client.id == 1:
            raise ClientFailure("training diverged: loss nan")
        return step(self, model, client, private, message)

    sets = [*MODES["central"], "stage1.rounds=1", "stage2.rounds=0"]
    before = embedded(configure(*sets), tmp_path / "a")
    monkeypatch.setattr("fedms.methods.fedms.FedMS.client_step", fails)
    after = embedded(configure(*sets), tmp_path / "b")
    assert before[0]["visits"] == after[0]["visits"] and before[0]["rounds"][0]["clients"] == after[0]["rounds"][0]["clients"]
    assert any(not torch.equal(before[1][name], after[1][name]) for name in shared(before))


# Crashes and budgets

@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_resumed(mode, tmp_path, configure):
    whole = embedded(configure(*MODES[mode]), tmp_path / "whole")
    asked = iter([False] * 6 + [True])
    with pytest.raises(Interrupted):
        run.run(configure(*MODES[mode]), tmp_path / "stopped", stop=lambda: next(asked))
    same(embedded(configure(*MODES[mode]), tmp_path / "stopped", resume=True), whole)
    assert read_ledger(tmp_path / "stopped/privacy.jsonl") == read_ledger(tmp_path / "whole/privacy.jsonl")


CHILD = """
import sys
from pathlib import Path
from fedms.config import load_config
from fedms.runs.run import run
run(load_config("digits", sys.argv[2:]), Path(sys.argv[1]), resume=True)
"""


@pytest.mark.parametrize("mode", ["central", "distributed"])
def test_kill_9_and_resume(mode, tmp_path, configure, key):
    """Killed once the ledger has a line; the round may be repeated, and then it is the same release."""
    whole = embedded(configure(*MODES[mode]), tmp_path / "whole")
    sets = [*SETS, *ROUNDS, f"privacy.key={key}", *MODES[mode], "run.engine=local"]
    ledger = tmp_path / "killed/privacy.jsonl"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "killed"), *sets])
    deadline = time.monotonic() + 120
    while not (ledger.exists() and ledger.read_bytes()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    same(embedded(configure(*MODES[mode]), tmp_path / "killed", resume=True), whole)
    assert read_ledger(ledger) == read_ledger(tmp_path / "whole/privacy.jsonl")


def server_of(config):
    """The server of a run, and the state before its first round."""
    session = LoadedTask(config, Progress())
    case = session.experiment(config)
    session.model.start()
    return case.server, case.server.start(case.method.initial(session.model))


def released(server, state, vectors, folder):
    collected = server.collect(state)
    from fedms.federated.client import Share
    for client, vector in vectors.items():
        collected.add(Share(client, vector))
    server.release(state, collected, server.ledger(folder))
    return collected.means.changes, server.ledger(folder).epsilon


def test_rewound_round_with_other_replies_draws_fresh_noise(tmp_path, configure):
    """Else the difference of two releases would show the difference of the replies without noise."""
    server, state = server_of(configure(*MODES["central"]))
    size = server.collect(state).sums.size
    zeros = {client: np.zeros(size, np.int32) for client in range(COUNT)}
    one = {**zeros, 2: np.eye(1, size, 7, np.int32)[0] * 100}
    first, once = released(server, state, zeros, tmp_path)
    again, still = released(server, state, zeros, tmp_path)
    other, twice = released(server, state, one, tmp_path)
    fewer, thrice = released(server, state, {client: zeros[client] for client in range(3)}, tmp_path)
    assert once == still < twice < thrice and len(read_ledger(tmp_path / "privacy.jsonl")) == 3
    for name, values in first.items():
        assert (values == again[name]).all()
        if values.size > 100:
            assert all(abs(np.corrcoef(values.ravel(), changes[name].ravel())[0, 1]) < 0.3 for changes in (other, fewer))


def test_noise_of_another_multiplier_is_not_the_same_noise_scaled(tmp_path, configure):
    """Else two runs with the same replies and different noise would give the replies away."""
    found = []
    for number, noise in enumerate((0.5, 1.0)):
        server, state = server_of(configure("privacy.mode=central", f"privacy.noise={noise}"))
        folder = tmp_path / str(number)
        folder.mkdir()
        size = server.collect(state).sums.size
        changes, _ = released(server, state, {0: np.zeros(size, np.int32)}, folder)
        found.append(np.concatenate([values.ravel() for values in changes.values()]))
    assert abs(np.corrcoef(*found)[0, 1]) < 0.05
    assert found[1].std() / found[0].std() == pytest.approx(2, rel=0.1)


def test_run_stops_before_its_budget_is_exceeded(tmp_path, configure):
    """Rounds that were rewound cost what they cost: the run ends early, and says so."""
    config = configure("privacy.mode=central", "privacy.epsilon=4")
    asked = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        run.run(config, tmp_path / "a", stop=lambda: next(asked))
    ledger = tmp_path / "a/privacy.jsonl"
    line = json.loads(ledger.read_text().splitlines()[0])
    with open(ledger, "a") as file:     # another release of round 1, of before a rewind
        file.write(json.dumps({**line, "tag": "0" * 64}) + "\n")
    with pytest.raises(BudgetSpent, match="stage2, round 1: releasing it would bring epsilon to .*, above privacy.epsilon = 4"):
        run.run(config, tmp_path / "a", resume=True)
    assert len(RunRecords.read(tmp_path / "a").rounds) == 2 and len(read_ledger(ledger)) == 3


# What is recorded

NUMBERS = ("n_train", "loss", "validation_accuracy", "validation_loss", "flops", "seconds", "peak_memory_bytes",
           "trained_params", "trained_percent", "simulated_seconds", "gate_mean", "gate_entropy")


@pytest.mark.parametrize("mode", MODES)
def test_no_number_of_a_single_client_in_records_and_progress(mode, tmp_path, configure):
    heard = Heard()
    run.run(configure(*MODES[mode]), tmp_path / "a", progress=heard)
    past = RunRecords.read(tmp_path / "a")
    assert past.clients == [] and past.visits
    for visit in (*past.visits, *heard.visits):
        assert all(visit.get(name) is None for name in NUMBERS)
    sizes = {(visit["stage"], visit["round"]): set() for visit in past.visits}
    for visit in past.visits:
        sizes[visit["stage"], visit["round"]].add((visit["bytes_up"], visit["bytes_down"]))
    assert all(len(each) == 1 for each in sizes.values())       # not even by the bytes
    assert all(r["loss"] is None and r["gate_mean"] is None and r["residual_norm"] is None for r in past.rounds)
    assert not [note for note in heard.notes if "client" in note]


def test_poisson_hides_who_took_part(tmp_path, configure):
    heard = Heard()
    sets = ["privacy.mode=central", "privacy.epsilon=6", "privacy.sampling=poisson", "clients.fraction=0.5", "stage1.rounds=4"]
    run.run(configure(*sets), tmp_path / "a", progress=heard)
    past = RunRecords.read(tmp_path / "a")
    assert past.visits == [] and all(visit == {"client": None} for visit in heard.visits)
    assert all(r["clients"] is None and r["bytes_up"] is None and r["bytes_down"] is None for r in past.rounds)
    assert past.summary["privacy"]["epsilon"] <= 6 and "Poisson" in past.summary["privacy"]["statement"]
    server, _ = server_of(configure(*sets))
    drawn = [len(server.sample("stage1", round)) for round in range(1, 400)]
    assert np.mean(drawn) == pytest.approx(2, abs=0.15) and {0, 4} <= set(drawn)
    assert server.noise.update < server_of(configure(*sets[:2], *sets[3:]))[0].noise.update


def test_epsilon_is_told_as_it_is_spent(tmp_path, configure):
    heard = Heard()
    run.run(configure("privacy.mode=central", "privacy.epsilon=8"), tmp_path / "a", progress=heard)
    spent = [metrics["epsilon"] for metrics in heard.rounds]
    assert spent == sorted(spent) and spent[-1] == pytest.approx(8, abs=1e-2) and spent[-1] <= 8
    told = RunRecords.read(tmp_path / "a").summary["privacy"]["statement"]
    for words in ("epsilon = 8 and delta = 1e-05", "the unit is a client", "PLD of dp-accounting over 3 releases",
                  "without amplification by sampling"):
        assert words in told
    page = render([RunRecords.read(tmp_path / "a")])
    assert page.index("differentially private with epsilon = 8") < page.index("</header>") and "not released" in page


# Every method under each mode

METHODS_BY_MODE = [(method, mode) for method in registry.methods() for mode in (MODES if "FEDMS_FULL" in os.environ else ["central"])]


@pytest.mark.parametrize("method, mode", METHODS_BY_MODE)
def test_every_method_works_or_is_refused_with_the_reason(method, mode, tmp_path, configure):
    sets = [*MODES[mode], f"run.method={method}", "stage1.rounds=1", "stage2.rounds=1", "data.max_samples=100"]
    if method in ("fedex_lora", "flexlora"):
        with pytest.raises(ConfigError, match="aggregate.rule: .(exact|svd). adds products of single updates"):
            configure(*sets)
        return
    if method in ("fedavg_prior", "fedms_plus") and mode != "secure":
        with pytest.raises(ConfigError, match="privacy.count_noise: .* class counts, which need noise of their own"):
            configure(*sets)
        sets.append("privacy.count_noise=10")
    run.run(configure(*sets), tmp_path / "a")
    past = RunRecords.read(tmp_path / "a")
    assert past.summary["privacy"]["mode"] == mode and past.summary["personalized_accuracy"]["mean"] is not None
    updates = [release.update for release in read_ledger(tmp_path / "a/privacy.jsonl")]
    if mode != "secure":
        sends = {"local": [], "fedavg_ft": [0.5], "feddpa": [0.5]}.get(method, [0.5, 0.5])
        assert updates == [*sends, None]


def test_prior_gets_the_classes_of_all_clients(tmp_path, configure):
    """Counts go through the sum once, each client's with norm 1."""
    sets = [*MODES["secure"], "run.method=fedavg_prior"]
    found = embedded(configure(*sets), tmp_path / "a")
    classes = found[1]["sums/class_counts"]
    assert float(classes.sum()) == pytest.approx(COUNT * 10, rel=1e-6) and bool((classes > 0).all())
    plain = embedded(configure("run.method=fedavg_prior"), tmp_path / "b")[1]["sums/class_counts"]
    assert torch.allclose(classes / classes.sum(), plain / plain.sum(), atol=0.02)


def test_scores_drive_the_activation_through_the_sum(tmp_path, configure):
    sets = [*MODES["secure"], "sal.schedule=capability_queue", "sal.queue=2", "sal.tau=1", "stage1.rounds=4", "stage2.rounds=0"]
    past = embedded(configure(*sets), tmp_path / "a")[0]
    assert all(0 <= r["validation_accuracy"] <= 1 for r in past["rounds"])
    assert any(r["event"] for r in past["rounds"]) and past["rounds"][-1]["depth"] > 1


def test_blocks_that_few_train_are_divided_by_how_many_are_expected(tmp_path, configure):
    sets = [*MODES["secure"], "sal.schedule=all",
            "clients.budgets=[{share = 0.5, max_depth = 1}, {share = 0.5, max_depth = 2}]"]
    server, state = server_of(configure(*sets))
    order, found = server.order, {}
    for name in state.tensors:
        if name in server.block_of:
            found.setdefault(order.index(server.block_of[name]) + 1, server.trainers(name))
    assert found[1] == 4 and found[2] == 2 and server.trainers("head/weight") == 4
    assert all(trainers == 0 for place, trainers in found.items() if place > 2)


# Servers that ask for more than was agreed

def test_node_refuses_another_run_file(tmp_path, configure, shards):
    """It was set up for a secure sum; without it, its update would be seen."""
    with pytest.raises(AllClientsFailed):
        deployed(configure(*MODES["secure"], "stage1.lr=0.001", engine="flower"), tmp_path / "a", shards("secure"))
    visits = RunRecords.read(tmp_path / "a").visits
    assert all("not the one that this node was set up for" in visit["reason"] for visit in visits)
    with pytest.raises(AllClientsFailed):
        deployed(configure(engine="flower"), tmp_path / "b", shards("secure"))
    assert {visit["reason"] for visit in RunRecords.read(tmp_path / "b").visits} == {"it could not be reached"}


def test_node_without_a_key_refuses_secure_sums(tmp_path, configure, shards):
    with pytest.raises(AllClientsFailed):
        deployed(configure(*MODES["secure"], engine="flower"), tmp_path / "a", shards("central"))
    visits = RunRecords.read(tmp_path / "a").visits
    assert all("for which this node has no key" in visit["reason"] for visit in visits)


def test_reason_that_depends_on_data_is_not_told(tmp_path, configure, shards, monkeypatch):
    def breaks(self, model, client, private, message):
        raise KeyError(f"sample 17 of client {client.id}")

    monkeypatch.setattr("fedms.methods.fedms.FedMS.client_step", breaks)
    with pytest.raises(AllClientsFailed):
        deployed(configure(*MODES["central"], engine="flower"), tmp_path / "a", shards("central"))
    visits = RunRecords.read(tmp_path / "a").visits
    assert {visit["reason"] for visit in visits} == {"the client says: it failed; the log of its node says why"}


@pytest.mark.parametrize("change, words", [
    (lambda steps: steps * 0 + 2**17, "longer than privacy.clip allows"), (lambda steps: steps[:-1], "buffers are not"),
    (lambda steps: steps * 0 + 2**15, "longer than privacy.clip allows")])
def test_vector_that_is_too_long_does_not_count(change, words, tmp_path, configure, shards):
    def fault(message, answer):
        head, parts = transport.read(answer(message).content)
        steps = np.frombuffer(parts["steps"], "<i4")
        return Message(transport.write(head, transport.buffers({"steps": change(steps).astype("<i4").tobytes()})), reply_to=message)

    sets = ["stage1.rounds=1", "stage2.rounds=0"]
    found, _, _ = deployed(configure(*MODES["central"], *sets, engine="flower"), tmp_path / "a", shards("central", *sets),
                           {("train", "stage1 1", 1): fault})
    assert found[0]["visits"][1]["status"] == "failed" and words in found[0]["visits"][1]["reason"]


# The table of fields against the messages

def leaves(head, prefix):
    for name, value in head.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}.{name}")
        elif value is not None:
            yield f"{prefix}.{name}"


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_clients_send_what_the_table_of_fates_says(mode, tmp_path, configure, shards):
    """Every answer of every client in a whole run, with its buffers."""
    from fedms.federated.fates import BOTH, DROPPED, FATES, NOISED, SUMMED_UP

    seen = set()

    def spy(kind):
        def fault(message, answer):
            came = answer(message)
            head, parts = transport.read(came.content)
            name = "problem" if "problem" in head else kind or ("joined" if "share" in head else "trained")
            seen.update(leaves(head, name))
            seen.update(f"buffer {part}" for part in parts)
            return came
        return fault

    faults = {(kind, None, client): spy(name) for client in range(COUNT) for kind, name in (
        ("query", "hello"), ("train", None), ("evaluate", "evaluated"), ("query.sum", "summed"))}
    sets = ["stage1.rounds=1", "stage2.rounds=0"]
    of = MODES.get(mode, [])
    if mode == "off":
        folder = tmp_path / "shards"
        write_shards(configure(*sets), folder, Progress())
        data = folder, {i: shard_about(folder / f"client-{i}")["clients"][0]["n_train"] for i in range(COUNT)}
    else:
        data = shards(mode, *sets)
    deployed(configure(*of, *sets, engine="flower"), tmp_path / "flower", data, faults)
    in_the_sum = (NOISED, SUMMED_UP, BOTH)
    allowed = {name for name, fate in FATES.items() if fate[mode] not in (DROPPED, *in_the_sum)}
    told = {"hello.n_train", "hello.n_validation"} if mode == "central" else set()     # of nodes without a run file of their own
    assert seen <= allowed | told, sorted(seen - allowed - told)
    kinds = {"off": {"trained", "evaluated"}, "central": {"joined"}}.get(mode, {"joined", "summed"})
    assert {name.partition(".")[0] for name in seen if "." in name} == {"hello", *kinds}


# Clients that count for themselves

def test_a_client_pays_once_for_a_sum_and_again_for_another(tmp_path):
    """A server that asks for a round's sum again gets the same bits or pays; what it gets is never more than was agreed."""
    terms = Terms("seed 0", "stage1", 1, 0, 3, ((5, 9),))
    held = Held(terms, np.zeros(5, np.int64), Price(1.4, None, None, 1e-5, "pld", 8.0), keys={i: bytes([i]) * 32 for i in range(4)})
    for _ in range(3):
        charge(tmp_path, held, (0, 1, 2))
    assert len(read_ledger(tmp_path / "privacy.jsonl")) == 1
    charge(tmp_path, held, (0, 1, 2, 3))
    with pytest.raises(BudgetSpent, match="stage1, round 1: releasing it would bring epsilon to .*, above privacy.epsilon = 8"):
        for attempt in range(1, 9):
            held.begin(dataclasses.replace(terms, attempt=attempt))
            charge(tmp_path, held, (0, 1, 2))
    assert 2 < len(read_ledger(tmp_path / "privacy.jsonl")) < 9
    charge(tmp_path, Held(terms, held.vector), (0, 1, 2))      # without noise there is nothing to count


@pytest.mark.parametrize("noise", ["privacy.noise=0.5", "privacy.epsilon=12"])
def test_sums_that_failed_after_their_last_question_count_at_the_clients(noise, tmp_path, configure, shards):
    """Two clients stay silent when the first sum is revealed; the others have answered, and have no budget left in the end."""
    sets, times = ["privacy.mode=distributed", noise, "stage1.rounds=2", "stage2.rounds=0"], {1: 0, 2: 0}

    def silent_once(client):
        def fault(message, answer):
            head, _ = transport.read(message.content)
            if head["phase"] == "reveal" and not times[client]:
                times[client] += 1
                return None
            return answer(message)
        return fault

    folder = tmp_path / "shards"
    config = configure(*sets)
    write_shards(config, folder, Progress())
    n_train = {i: shard_about(folder / f"client-{i}")["clients"][0]["n_train"] for i in range(COUNT)}
    with pytest.raises(AllClientsFailed, match="stage1, round 2: no secure sum came about"):
        deployed(configure(*sets, engine="flower"), tmp_path / "flower", (folder, n_train),
                 {("query.sum", "stage1 1", client): silent_once(client) for client in times})
    own = [[release.attempt for release in read_ledger(tmp_path / f"states/{client}/privacy.jsonl")] for client in range(COUNT)]
    assert own[0] == own[3] == [0, 1]      # rounds 1 and 1; nothing is left for round 2
    assert own[1][0] == own[2][0] == 1     # they were asked in the first attempt, and did not answer
