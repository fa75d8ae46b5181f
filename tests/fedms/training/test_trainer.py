"""Whole runs on the digits: small, quick, and exact where two ways must agree."""
from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from fedms import data, methods, models
from fedms.config import ConfigError, load_config, registry
from fedms.data import TextInputs
from fedms.data.subset import Subset
from fedms.engines.local import LocalEngine
from fedms.federated import encoding
from fedms.federated.client import Client, ClientFailure, Private
from fedms.federated.local_training import Group, accumulate, clip_each, train
from fedms.federated.devices import Device, device_of
from fedms.federated.server import AllClientsFailed, Server
from fedms.progress import Progress
from fedms.runs import batch, run
from fedms.runs.run import SHARED
from fedms.storage.records import OPTIONAL, SUMMARY_FIELDS, RunRecords, comparable
from fedms.storage.run_folder import RunFolder
from fedms.training.both import both_opinions
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import own_loss_of
from fedms.training.streams import Stream

SMALL = ["run.method=fedms", "data.max_samples=300", "clients.count=3", "clients.unseen=1", "stage1.rounds=3", "stage2.rounds=2",
         "data.partition=iid", "run.threads=1"]


def config(*sets):
    return load_config("digits", [*SMALL, *sets])


class Session:
    """A run taken apart, so that tests can reach in."""

    def __init__(self, config, tmp_path):
        self.config = config
        foundation = models.load(config.model)
        self.dataset = data.load(config.data, foundation)
        self.model = ExpertModel(foundation, self.dataset, config)
        self.partition = data.partition(self.dataset, config.data, config.clients, config.run.seed)
        self.clients = [Client(split, config) for split in self.partition.clients]
        self.method = methods.create(config)
        self.server = Server(config, self.model.order, self.model.block_of, self.method,
                             self.method.statistics(len(self.dataset.classes)))
        self.folder = RunFolder.create(tmp_path / "session", config, overwrite=True)
        self.engine = LocalEngine(self.method, self.server, self.model, self.clients, Subset(self.partition.global_test),
                                  self.folder, Progress())

    def run(self):
        try:
            return self.engine.run(self.method.initial(self.model))
        finally:
            self.folder.close()

    @property
    def visits(self):
        return RunRecords.read(self.folder.path).visits


def trained(tmp_path, *sets):
    """The server's tensors after a run."""
    return Session(config(*sets), tmp_path).run().tensors


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sets", [
    ["run.method=fedms"],
    ["run.method=fedms_plus", "lora.dropout=0.2", "clients.fraction=0.7", "clients.optimizer=kept"],
    ["run.method=fedavg_prior", "data.partition=dirichlet"],
], ids=["fedms", "fedms-all-draws", "prior"])
def test_the_same_seed_gives_the_same_records(sets, tmp_path):
    records = []
    for name in ("first", "second"):
        run.run(config(*sets), tmp_path / name)
        records.append(comparable(RunRecords.read(tmp_path / name)))
    assert json.dumps(records[0]) == json.dumps(records[1])
    run.run(config(*sets, "run.seed=1"), tmp_path / "third")
    assert comparable(RunRecords.read(tmp_path / "third"))["rounds"] != records[0]["rounds"]


def test_a_run_is_the_same_alone_and_after_others(tmp_path):
    batch.compare(config(), ["local", "fedms"], [1, 0], tmp_path / "many")
    run.run(config("run.method=fedms"), tmp_path / "alone")
    many, alone = (comparable(RunRecords.read(p)) for p in (tmp_path / "many/fedms-seed0", tmp_path / "alone"))
    for of_run in (many["outcome"], many["summary"]):
        of_run["notes"].remove(SHARED)
    assert many == alone


@pytest.mark.parametrize("sets", [
    *[[f"run.method={m}"] for m in registry.method_names()],
    ["gate.mixing=layers", "gate.features=prefix"],
    ["gate.on=probabilities", "gate.features=prefix", "gate.temperature=2.0"],
    ["run.method=fedms_plus", "gate.mixing=layers", "gate.features=prefix"], ["stage2.keep=last", "stage2.own_loss=0"],
    ["sal.schedule=all"], ["sal.schedule=every", "sal.every=1", "sal.step=2", "sal.order=bottom_up"],
    ["sal.order=interleaved", "sal.queue=2", "sal.tau=1.0"], ["sal.order=[2, 4]", "sal.schedule=fixed"],
    ["stage1.micro_batch=5", "stage2.micro_batch=1"], ["stage1.rounds=0"], ["stage2.rounds=0"], ["clients.count=1", "clients.unseen=0"],
    ["sal.cache=off"], ["sal.cache_dtype=bf16"], ["sal.cache_dtype=int8", "lora.dropout=0.1"], ["sal.cache_bytes=20000"],
    ["lora.rslora=true", "lora.rank=1"],
    ["aggregate.weights=uniform", "data.global_test=0"], ["wire.dtype=bf16"], ["wire.dtype=int8"],
], ids=lambda sets: ",".join(sets))
def test_every_setting_runs_and_is_recorded(sets, tmp_path):
    c = config(*sets)
    summary = batch.BatchRunner()(batch.BatchRun(c, tmp_path / "run"), Progress(), lambda: False)   # shares model and data
    records = RunRecords.read(tmp_path / "run")
    assert set(summary) == set(SUMMARY_FIELDS) - OPTIONAL
    rounds = c.stage1.rounds + c.stage2.rounds
    assert len(records.rounds) == rounds and len(records.visits) == rounds * c.clients.count
    assert len(records.clients) == c.clients.count + c.clients.unseen
    assert all(v["status"] == "ok" and math.isfinite(v["loss"]) and v["seconds"] > 0 and v["flops"] > 0
               and v["peak_memory_bytes"] > 0 and v["trained_params"] > 0 for v in records.visits)
    for stage in ("stage1", "stage2"):
        assert sum(r["bytes_up"] for r in records.rounds if r["stage"] == stage) == sum(
            v["bytes_up"] for v in records.visits if v["stage"] == stage)
    accuracies = [v for c in records.clients for v in c["accuracy"].values() if v is not None]
    assert accuracies and all(0 <= v <= 1 for v in accuracies)


def test_local_sends_nothing_and_fedms_sends_the_gate_alone_in_stage_2(tmp_path):
    for method in ("local", "fedms"):
        run.run(config(f"run.method={method}"), tmp_path / method)
    assert all(v["bytes_up"] == v["bytes_down"] == 0 for v in RunRecords.read(tmp_path / "local").visits)
    session = Session(config(), tmp_path)
    gate = len(encoding.pack(session.model.read_gate()))
    stage2 = [v for v in RunRecords.read(tmp_path / "fedms").visits if v["stage"] == "stage2"]
    assert {v["bytes_up"] for v in stage2} == {gate}
    later = [v for v in stage2 if v["round"] > 1]
    assert {v["bytes_down"] for v in later} == {gate}


def test_traffic_follows_depth_and_encoding(tmp_path):
    sizes = {}
    for depth in (1, 4):
        for dtype in ("fp32", "bf16", "int8"):
            run.run(config("run.method=fedavg", "sal.schedule=fixed", f"sal.depth={depth}", f"wire.dtype={dtype}",
                           "stage1.rounds=1", "stage2.rounds=0"), tmp_path / "run", overwrite=True)
            visits = RunRecords.read(tmp_path / "run").visits
            (sizes[depth, dtype],) = {v["bytes_up"] for v in visits}
            assert {v["bytes_down"] for v in visits} == {sizes[depth, dtype]}
    head = 4 * (64 * 10 + 10)
    assert (sizes[1, "fp32"] - head) / (sizes[4, "fp32"] - head) == pytest.approx(1 / 4, rel=0.01)
    assert sizes[4, "bf16"] / sizes[4, "fp32"] < 0.54 and sizes[4, "int8"] / sizes[4, "fp32"] < 0.3


def test_federated_averaging_of_one_client_is_training_alone(tmp_path):
    sets = ["clients.count=1", "clients.unseen=0", "stage2.rounds=0", "stage2.keep=last"]
    shared = trained(tmp_path, "run.method=fedavg", *sets)
    alone = Session(config("run.method=local", *sets), tmp_path)
    alone.run()
    own = alone.engine.states[0].tensors
    assert own and all(torch.equal(own[name], shared[name]) for name in own)


def test_federated_averaging_is_the_mean_of_what_clients_train(tmp_path):
    session = Session(config("run.method=fedavg", "stage1.rounds=1", "stage2.rounds=0"), tmp_path)
    start = session.server.start(session.model.initial(0))
    message = session.server.message(start)
    replies = []
    for client in session.clients:
        session.model.clear()
        replies.append(session.method.client_step(session.model, client, Private(), message)[0])
    after = session.engine.run(start.tensors).tensors
    total = sum(r.n_train for r in replies)
    for name in replies[0].tensors:
        mean = sum(r.n_train / total * r.tensors[name].double() for r in replies)
        assert torch.allclose(after[name].double(), mean, atol=1e-7), name
        assert not torch.equal(after[name], start.tensors[name])
    untouched = set(after) - set(replies[0].tensors)
    assert untouched and all(torch.equal(after[n], start.tensors[n]) for n in untouched)


def test_activation_never_changes_the_function(tmp_path):
    session = Session(config("sal.schedule=every", "sal.every=1"), tmp_path)
    state = session.run()
    part, model = session.clients[0].test, session.model
    outputs = []
    for depth in (1, 2, 3):
        model.clear()
        model.load("local", state.tensors, depth=depth, applied_depth=3)
        outputs.append(model.opinions("local", part))
    assert all(torch.allclose(o, outputs[0], atol=1e-5) for o in outputs)


@pytest.mark.parametrize("sets, prefixes_agree", [([], True), (["sal.cache=off"], True), (["model.frozen=int8"], True),
                                                  ([], False)])
def test_both_streams_run_as_one_batch(tmp_path, monkeypatch, sets, prefixes_agree):
    session = Session(config(*sets), tmp_path)
    model, part = session.model, session.clients[0].test
    start = {n: t + 0.05 * torch.randn_like(t) for n, t in model.initial(0).items()}
    own = {n: t + 0.05 * torch.randn_like(t) if not prefixes_agree or n in trained_names(model, 1) else t
           for n, t in start.items()}
    model.load("global", start, depth=0, applied_depth=3)
    model.load("local", own, depth=1, applied_depth=3)
    apart = [model.opinions(e, part) for e in ("global", "local")]
    batches = []
    read = Stream.read
    monkeypatch.setattr(Stream, "read", lambda stream, part, rows, *rest: batches.append(len(rows)) or read(stream, part, rows, *rest))
    model.forget_opinions()        # answers are kept during a visit, and these were just given one by one
    together = both_opinions(model, part)
    assert sum(batches) == 2 * len(part) and len(batches) == (1 if prefixes_agree else 2) * len(model.chunks(part))
    for a, b in zip(apart, together):
        assert torch.allclose(a, b, atol=1e-5)
    assert not torch.allclose(*together, atol=1e-2)
    assert all(layer.segments is None for layer in model.layers.values())
    model.forget_opinions()
    model.meter.flops = 0
    both_opinions(model, part)
    two, model.meter.flops = model.meter.flops, 0
    model.forget_opinions()
    for expert in ("global", "local"):
        model.opinions(expert, part)
    assert two == model.meter.flops


def trained_names(model, depth):
    return {name for name, block in model.block_of.items() if block in model.order[:depth]}


def test_dropout_acts_in_training_alone(tmp_path):
    session = Session(config("lora.dropout=0.5"), tmp_path)
    model, part = session.model, session.clients[0].train
    model.load("global", {n: t + 0.1 for n, t in model.initial(0).items()}, depth=2, applied_depth=2)
    judged = [model.opinions("global", part) for _ in range(2)]
    trained = [model.opinion("global", part, torch.arange(len(part))).detach() for _ in range(2)]
    assert torch.equal(*judged) and not torch.allclose(*trained) and not torch.allclose(trained[0], judged[0])


def test_the_cache_changes_nothing(tmp_path):
    sets = ["sal.schedule=every", "sal.every=2"]
    with_cache, without = trained(tmp_path, *sets), trained(tmp_path, *sets, "sal.cache=off")
    assert with_cache.keys() == without.keys()
    for name in with_cache:
        assert (with_cache[name] - without[name]).norm() <= 1e-5 * without[name].norm(), name


@pytest.mark.parametrize("method", ["fedms", "fedms_plus", "apfl"])
def test_augmented_images_are_cached_for_their_step_alone(method, tmp_path):
    sets = [f"run.method={method}", 'data.augment=["flip", "shift"]', "lora.dropout=0.1", "stage1.micro_batch=16",
            "stage2.micro_batch=16", "stage1.rounds=1", "stage2.rounds=1"]
    session = Session(config(*sets), tmp_path)
    before, inputs = session.dataset.inputs.pixels.clone(), session.model.dataset.inputs
    tensors = session.run().tensors
    assert session.model.dataset.inputs is inputs and torch.equal(inputs.pixels, before)
    training = {client.train.key for client in session.clients}
    assert session.model.cache.entries and not training & {key[0] for key in session.model.cache.entries}
    assert equal(tensors, trained(tmp_path, *sets))                                # the seed draws the variations too
    assert not equal(tensors, trained(tmp_path, *sets[:1], *sets[2:]))


def test_texts_are_not_augmented():
    texts = TextInputs({"input_ids": torch.ones(4, dtype=torch.int64)}, torch.arange(5), {"input_ids": 0})
    dataset = data.make_dataset("notes", texts, torch.arange(4) % 2, ("a", "b"))
    with pytest.raises(ConfigError, match=r"data.augment: got \['flip'\], which is for images, and notes holds texts"):
        ExpertModel(None, dataset, config('data.augment=["flip"]'))


def test_a_run_says_that_augmented_images_are_not_cached(tmp_path):
    summary = run.run(config('data.augment=["shift"]', "stage1.rounds=1", "stage2.rounds=0"), tmp_path / "run")
    assert "training images are augmented (shift), so nothing that is computed of them is cached" in summary["notes"]


def test_without_a_change_augmented_training_is_training(tmp_path, monkeypatch):
    monkeypatch.setattr("fedms.data.inputs.ImageInputs.augmented",
                        lambda self, indices, _: replace(self, pixels=self.pixels[indices]))
    plain, varied = trained(tmp_path), trained(tmp_path, 'data.augment=["flip"]')
    for name in plain:
        assert (plain[name] - varied[name]).norm() <= 1e-5 * plain[name].norm(), name


def test_memory_disk_and_rebuilt_caches_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache/constants"

    def records(*sets):
        run.run(config(*sets), tmp_path / "run", overwrite=True)
        found = comparable(RunRecords.read(tmp_path / "run"))
        return json.dumps({name: found[name] for name in ("rounds", "visits", "clients", "summary")})

    in_memory = records()
    assert records("sal.cache=disk") == in_memory and len(list(folder.glob("*.constant"))) > 5
    assert records("sal.cache=disk") == in_memory                # read back
    for number, file in enumerate(sorted(folder.glob("*.constant"))):     # damaged or gone: computed again
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data if number % 3 else data[:-5])
        if number % 3 == 2:
            file.unlink()
    assert records("sal.cache=disk") == in_memory
    assert records("sal.cache=disk", "sal.cache_bytes=60000") != ""
    assert sum(file.stat().st_size for file in folder.glob("*.constant")) <= 60000


def test_the_gate_is_trained_on_samples_that_its_expert_has_not_seen(tmp_path):
    session = Session(config("run.method=fedms_plus", "plus.gate_on=held_out", "plus.held_out=0.25"), tmp_path)
    client, n = session.clients[0], len(session.clients[0].train)
    expert_rows, part, gate_rows = session.method._split(client)
    assert part is client.train and len(gate_rows) == n // 4
    assert sorted([*expert_rows.tolist(), *gate_rows.tolist()]) == list(range(n))
    again = session.method._split(client)
    assert torch.equal(again[0], expert_rows) and torch.equal(again[2], gate_rows)

    expert_rows, part, gate_rows = methods.create(config("run.method=fedms_plus", "plus.gate_on=validation"))._split(client)
    assert part is client.validation and gate_rows.tolist() == list(range(len(client.validation)))
    assert sorted(expert_rows.tolist()) == list(range(n))


def test_an_unvisited_client_falls_back_to_the_global_expert(tmp_path):
    session = Session(config(), tmp_path)
    state = session.run()
    final, part = session.server.message(state), session.clients[0].test
    session.model.clear()
    prediction = session.method.predict(session.model, part, Private(), final)
    assert prediction.weights is None and torch.equal(prediction.personalized, prediction.global_)


def test_a_mixture_of_two_equal_experts_is_that_expert(tmp_path):
    session = Session(config("stage2.rounds=0"), tmp_path)
    state = session.run()
    part, model = session.clients[0].test, session.model
    final = session.server.message(state)
    own = Private({n: t for n, t in state.tensors.items() if n.startswith(("expert/", "head/"))})
    for sets in (["gate.mixing=outputs"], ["gate.mixing=layers", "gate.features=prefix"], ["gate.on=probabilities"]):
        method = methods.create(config(*sets))
        model.config = method.config
        model.clear()
        final = session.server.__class__(method.config, model.order, model.block_of, method).message(state)
        # "done" is no stage: its message carries what stage 2 would.
        prediction = method.predict(model, part, own, final)
        shared, mixed = prediction.global_, prediction.personalized
        if sets[-1] == "gate.on=probabilities":
            shared = shared.log_softmax(1)
        assert torch.allclose(mixed, shared, atol=1e-4), sets


# What goes wrong

def poison(session, client):
    """Makes the images of one client NaN, behind the loader's back."""
    session.dataset.inputs.pixels[session.clients[client].train.indices] = math.nan


def test_a_client_that_diverges_is_left_out(tmp_path):
    session = Session(config("run.method=fedms", "sal.cache=off"), tmp_path)
    poison(session, 1)
    state = session.run()
    visits = session.visits
    assert {v["client"] for v in visits if v["status"] == "failed"} == {1}
    assert all("training diverged: loss nan" in v["reason"] for v in visits if v["client"] == 1)
    assert all(v["bytes_up"] == 0 for v in visits if v["client"] == 1)
    assert all(torch.isfinite(t).all() for t in state.tensors.values())
    assert session.engine.states[1] == Private()


def test_a_reply_that_is_not_finite_never_enters_the_average(tmp_path):
    session = Session(config("run.method=fedavg", "stage1.rounds=1", "stage2.rounds=0"), tmp_path)
    step = session.method.client_step

    def poisoned(model, client, private, message):
        reply, after = step(model, client, private, message)
        if client.id == 1:
            next(iter(reply.tensors.values())).view(-1)[0] = math.inf
        return reply, after

    session.method.client_step = poisoned
    state = session.run()
    failed = [v for v in session.visits if v["status"] == "failed"]
    assert [v["client"] for v in failed] == [1] and "holds NaN or infinity" in failed[0]["reason"]
    assert failed[0]["bytes_up"] == 0 and all(torch.isfinite(t).all() for t in state.tensors.values())


def test_a_run_in_which_all_clients_fail_stops(tmp_path):
    session = Session(config("run.method=fedavg", "stage1.lr=1e30"), tmp_path)
    with pytest.raises(AllClientsFailed, match="stage1, round 1"):
        session.run()


def test_clients_of_few_samples(tmp_path):
    session = Session(config("clients.count=4"), tmp_path)
    one, none = session.clients[0].split, session.clients[1].split
    session.clients[0] = Client(replace(one, train=one.train[:1], validation=one.test[:0], test=one.test[:1]), session.config)
    session.clients[1] = Client(replace(none, train=none.train[:0]), session.config)
    session.run()
    by_client = {c: list(v) for c, v in itertools.groupby(sorted(session.visits, key=lambda v: v["client"]),
                                                          key=lambda v: v["client"])}
    assert all(v["status"] == "ok" and v["validation_accuracy"] is None for v in by_client[0])
    assert all(v["status"] == "skipped" and v["reason"] == "no training samples" for v in by_client[1])


def test_a_class_that_a_client_never_sees(tmp_path):
    c = config("data.partition=dirichlet", "data.alpha=0.1", "data.max_samples=600", "run.method=fedavg_prior")
    summary = run.run(c, tmp_path / "run")
    assert any("lack at least one of the 10 classes" in note for note in summary["notes"])
    assert summary["personalized_accuracy"]["mean"] >= 0


def test_budgets_limit_what_a_client_trains(tmp_path):
    budgets = "clients.budgets=[{share = 0.5, max_depth = 1}, {share = 0.5, max_depth = 4}]"
    session = Session(config("sal.schedule=all", "clients.count=4", "clients.unseen=0", budgets), tmp_path)
    session.run()
    assert sorted(c.device.max_depth for c in session.clients) == [1, 1, 4, 4]
    for visit in session.visits:
        assert visit["depth"] == session.clients[visit["client"]].device.max_depth and visit["simulated_seconds"] is None
    sizes = {v["depth"]: v["bytes_up"] for v in session.visits if v["stage"] == "stage1"}
    assert sizes[1] < sizes[4]


def test_the_simulated_clock_follows_the_slowest_client(tmp_path):
    classes = ("clients.budgets=[{share = 0.5, flops = 1e9, bandwidth_up = '1kB', bandwidth_down = '1MB'}, "
               "{share = 0.5, flops = 4e9}]")
    session = Session(config("clients.count=4", "clients.unseen=0", "stage1.rounds=1", classes), tmp_path)
    session.run()
    records = RunRecords.read(session.folder.path)
    for visit in records.visits:
        device = session.clients[visit["client"]].device
        expected = visit["flops"] / device.flops
        if device.flops == 1e9:
            expected += visit["bytes_up"] / 1e3 + visit["bytes_down"] / 1e6
        assert visit["simulated_seconds"] == pytest.approx(expected, rel=1e-12)
    for number, record in enumerate(records.rounds):
        assert record["simulated_seconds"] == max(v["simulated_seconds"] for v in records.visits[4 * number:4 * number + 4])


def test_devices_of_a_class_differ_by_the_seed():
    sets = ("clients.count=40", "clients.unseen=0", "clients.budgets=[{share=1, flops=1e9, bandwidth_up=1000}]")
    assert {device_of(config(*sets), i) for i in range(40)} == {Device(None, 1e9, 1000.0, None)}
    devices = [device_of(config(*sets, "clients.spread=0.5"), i) for i in range(40)]
    assert devices == [device_of(config(*sets, "clients.spread=0.5"), i) for i in range(40)]
    speeds, links = ([math.log(value) for value in values] for values in
                     ([d.flops / 1e9 for d in devices], [d.bandwidth_up / 1000 for d in devices]))
    assert speeds != links and all(0.3 < torch.tensor(v).std() < 0.7 for v in (speeds, links))
    assert device_of(config(*sets, "clients.spread=0.5", "run.seed=1"), 0) != devices[0]
    assert Device().seconds(1, 1, 1) is None


def test_kept_optimizers_go_on_where_they_were(tmp_path):
    fresh = Session(config("run.method=fedavg", "clients.optimizer=fresh"), tmp_path)
    first = fresh.run().tensors
    kept = Session(config("run.method=fedavg", "clients.optimizer=kept"), tmp_path)
    second = kept.run().tensors
    assert not equal(first, second)
    assert not any("optimizer" in name for p in fresh.engine.states.values() for name in p.tensors)
    moments = kept.engine.states[0].tensors
    assert any(name.startswith("optimizer/stage1/") for name in moments)
    steps = {float(t) for name, t in moments.items() if name.startswith("optimizer/stage1/head") and name.endswith("/step")}
    per_visit = math.ceil(len(kept.clients[0].train) / kept.config.stage1.batch)
    assert steps == {float(per_visit * kept.config.stage1.rounds)}


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(tmp_path):
    session = Session(config(), tmp_path)
    model, client = session.model, session.clients[0]
    model.load("global", {n: t + 0.02 for n, t in model.initial(0).items()}, depth=2, applied_depth=2)
    params, loss_of = model.trainable("global"), own_loss_of(model, "global")(client.train)
    found = []
    for micro_batch in (13, 5, 1):
        loss = float(sum(accumulate(loss_of, torch.arange(13), micro_batch)))
        found.append((loss, torch.cat([p.grad.flatten() for p in params.values()])))
        for p in params.values():
            p.grad = None
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 1e-5


@pytest.mark.parametrize("most", [0.5, float("inf")])
def test_gradients_of_each_client_are_clipped_as_by_pytorch(most):
    draw = torch.Generator().manual_seed(3)
    clients = [[torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 33), (5,), (3, 2))] for _ in range(3)]
    for client, size in zip(clients, (0.001, 1.0, float("inf"))):
        for p in client[:-1]:       # the last one has no gradient
            p.grad = torch.randn(p.shape, generator=draw) * size
    alone = [[torch.nn.Parameter(p.detach().clone()) for p in client] for client in clients]
    for client, other in zip(clients, alone):
        for p, q in zip(client, other):
            q.grad = None if p.grad is None else p.grad.clone()
    norms = clip_each(clients, most)
    for client, other, norm in zip(clients, alone, norms):
        assert equal({"norm": norm}, {"norm": torch.nn.utils.clip_grad_norm_(other, most)})
        for p, q in zip(client[:-1], other):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
    assert all(client[-1].grad is None for client in clients)


def test_training_refuses_infinite_gradients(tmp_path):
    session = Session(config(), tmp_path)
    message = session.server.message(session.server.start(session.model.initial(0)))
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ClientFailure, match="gradient norm inf"):
        train(session.model, session.clients[0], message, Private(), [Group({"p": p}, 1.0)],
              lambda _: lambda rows: p.sqrt().sum())
