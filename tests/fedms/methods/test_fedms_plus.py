"""The pieces of fedms_plus: each does what it says, and without them it is fedms."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from fedms import methods
from fedms.config import load_config
from fedms.federated.local_training import Group
from fedms.federated.method import BroadcastPolicy
from fedms.methods.fedavg_prior import log_prior
from fedms.runs import run
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords, comparable
from fedms.tasks.classification import Classification
from fedms_ext import GateAdapter

SMALL = ["data.max_samples=300", "clients.count=3", "clients.unseen=1", "stage1.rounds=2", "stage2.rounds=2",
         "run.threads=1"]
OFF = ["plus.prior=off", "plus.gate_on=training", "plus.confidences=false", "plus.global_in_stage2=false", "plus.features=true"]
OTHER = ["plus.prior_in_stage1=true", "plus.gate_on=held_out", "gate.training=private", "gate.weight=0.3"]
GATE = "plus.gate_on=held_out"


def config(*sets):
    return load_config("digits", [*SMALL, *sets])


def test_without_its_pieces_it_is_fedms(tmp_path):
    records = []
    for sets in (["run.method=fedms"], ["run.method=fedms_plus", *OFF]):
        run.run(config(*sets), tmp_path / sets[0])
        found = comparable(RunRecords.read(tmp_path / sets[0]))
        del found["config"]
        found["summary"].pop("method")
        for line in (*found["rounds"], *found["visits"], found["summary"]):
            line.pop("bytes_up"), line.pop("bytes_down")            # plus sends each client's class counts, once
        records.append(json.dumps(found))
    assert records[0] == records[1]


@pytest.mark.parametrize("sets", [*OFF, *OTHER])
def test_each_piece_can_be_switched(sets, tmp_path):
    summary = run.run(config("run.method=fedms_plus", sets), tmp_path / "run")
    assert summary["personalized_accuracy"]["mean"] is not None


def test_without_a_gate_both_experts_weigh_the_same_and_nothing_of_a_mixture_travels(tmp_path):
    """It is fedms with the weight 0.5 and the other pieces, bit for bit."""
    def told(name, *sets):
        run.run(config(*sets), tmp_path / name)
        snapshot, _ = CheckpointFolder(tmp_path / name / "checkpoint").load()
        sent = {key for key in snapshot.tensors if key.startswith("tensors/gate/") and snapshot.tensors[key].any()}
        return sent, [client["accuracy"] for client in RunRecords.read(tmp_path / name).clients], RunRecords.read(tmp_path / name)

    sent, found, records = told("plus", "run.method=fedms_plus")
    assert {line["gate_mean"] for line in records.clients} == {0.5, None} and records.summary["gate"]["collapsed"] is None
    method = methods.create(config("run.method=fedms_plus"))
    assert method.broadcast_policy("stage2", "gate/out.bias") is BroadcastPolicy.NEVER
    assert found == told("half", "run.method=fedms_plus", "gate.weight=0.5")[1]
    off = [piece for piece in OFF if "gate_on" not in piece]
    assert told("off", "run.method=fedms_plus", *off)[1] == told("fedms", "run.method=fedms", "gate.weight=0.5")[1]
    assert told("other", "run.method=fedms_plus", "gate.weight=0.2")[2].clients[0]["gate_mean"] == pytest.approx(0.2)


def test_a_gate_is_trained_on_samples_that_the_expert_goes_without():
    client = SimpleNamespace(train=range(20), validation=range(5), id=3)
    for sets, kept, held in ((GATE,), 16, 4), (("plus.gate_on=validation",), 20, 5):
        rows, part, gate_rows = methods.create(config("run.method=fedms_plus", *sets))._split(client)
        assert (len(rows), len(gate_rows)) == (kept, held), sets
        assert part is client.train or held == 5
        assert part is client.validation or sorted([*rows.tolist(), *gate_rows.tolist()]) == list(range(20))


def test_the_shift_is_the_clients_prior_over_everybodys():
    counts, everyone = torch.tensor([8.0, 2.0, 0.0]), torch.tensor([20.0, 30.0, 50.0])
    expected = torch.tensor([9 / 13, 3 / 13, 1 / 13]).log() - torch.tensor([21 / 103, 31 / 103, 51 / 103]).log()
    for sets, stage, shifted in [
            ((), "stage1", ()), ((), "stage2", ("global", "local")), (("plus.prior=global",), "stage2", ("global",)),
            (("plus.prior=off",), "stage2", ()), (("plus.prior_in_stage1=true",), "stage1", ("global",))]:
        model = SimpleNamespace(device="cpu", shifts={"global": torch.ones(3), "local": torch.ones(3)})       # of what came before
        method = methods.create(config("run.method=fedms_plus", *sets))
        method._shift(model, stage, counts, {"class_counts": everyone})
        for expert, shift in model.shifts.items():
            assert torch.allclose(shift, expected if expert in shifted else torch.zeros(3)), (sets, stage, expert)


def test_the_global_expert_goes_on_in_stage2(tmp_path):
    """It ends as that of federated averaging with as many rounds, bit for bit, more blocks being activated on the way; without this
    piece as stage 1 left it."""
    def expert(name, *sets):
        run.run(config("sal.queue=2", "sal.tau=1.0", *sets), tmp_path / name)
        snapshot, _ = CheckpointFolder(tmp_path / name / "checkpoint").load()
        return {name: tensor.numpy().tobytes() for name, tensor in snapshot.tensors.items()
                if name.startswith(("tensors/expert/", "tensors/head/"))}

    averaged = {rounds: expert(f"fedavg-{rounds}", "run.method=fedavg", f"stage1.rounds={rounds}", "stage2.rounds=0")
                for rounds in (2, 4)}
    assert averaged[2] and averaged[2] != averaged[4]
    assert expert("on", "run.method=fedms_plus") == averaged[4]
    assert expert("off", "run.method=fedms_plus", "plus.global_in_stage2=false") == averaged[2]


def test_smoothing_bounds_a_class_that_was_never_seen():
    counts = torch.tensor([10.0, 0.0])
    assert torch.allclose(log_prior(counts, 0.5), torch.tensor([10.5 / 11, 0.5 / 11]).log())
    assert log_prior(counts, 0.1)[1] < log_prior(counts, 1.0)[1]


def test_confidences_are_the_best_log_probability_and_its_lead():
    found = Classification.confidences(None, torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    best = torch.tensor([2.0, 0.0, 1.0]).log_softmax(0)[0]
    assert torch.allclose(found, torch.tensor([[float(best), 1.0], [-float(torch.tensor(3.0).log()), 0.0]]))


def test_a_gates_further_inputs_move_its_weights_by_a_linear_map():
    gate = GateAdapter(4, 2, side=2)
    features, side = torch.randn(5, 4), torch.randn(5, 2)
    assert torch.equal(gate(features, side), torch.full((5, 2), 0.5))       # zero at first
    gate.side.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(gate(features, side), torch.softmax(side, 1))
    assert "side.weight" not in GateAdapter(4, 2).state_dict()


def test_a_gate_that_decides_before_there_are_outputs_sees_no_confidences():
    for sets, sees in (((), True), (("gate.mixing=layers", "gate.features=prefix"), False), (("plus.confidences=false",), False)):
        assert methods.create(config("run.method=fedms_plus", GATE, *sets)).mixture.sees_confidences == sees


def test_features_and_confidences_have_rates_of_their_own():
    method = methods.create(config("run.method=fedms_plus", GATE, "plus.confidence_lr=0.5"))
    gate = GateAdapter(4, 2, side=4)
    groups = method._gate_groups(Group({f"gate/{n}": p for n, p in gate.named_parameters()}, 1e-3))
    assert [group.lr for group in groups] == [1e-3, 0.5] and set(groups[1].params) == {"gate/side.weight", "gate/out.bias"}
    assert len(groups[0].params) + 2 == len(list(gate.parameters()))


def test_a_gate_without_features_trains_and_sends_a_handful_of_numbers(tmp_path):
    run.run(config("run.method=fedms_plus", GATE, "data.split=[0.4, 0.2, 0.4]"), tmp_path / "run")
    snapshot, _ = CheckpointFolder(tmp_path / "run/checkpoint").load()
    tensors = {name.removeprefix("tensors/"): tensor for name, tensor in snapshot.tensors.items()}
    method = methods.create(config("run.method=fedms_plus", GATE))
    sent = {name for name in tensors if method.broadcast_policy("stage2", name) is BroadcastPolicy.EVERY_ROUND and "gate/" in name}
    assert sent == {"gate/out.bias", "gate/side.weight"} and all(tensors[name].abs().max() > 0.01 for name in sent)
    assert not tensors["gate/out.weight"].any()
    told = [line["gate_mean"] for line in RunRecords.read(tmp_path / "run").rounds if line["stage"] == "stage2"]
    assert max(abs(mean - 0.5) for mean in told) > 0.02, "the gate does not move"
