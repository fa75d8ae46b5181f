"""A client's visit of every method on a GPU that is not there: no tensor may be left on the CPU, none may leave the GPU but
in replies and in what a client keeps."""
from __future__ import annotations

import inspect
import os
import textwrap

import pytest
import torch
from fake_device import CPU, CUDA, DeviceMismatch, FakeCuda

from fedms import data, methods, models
from fedms.config import load_config, registry
from fedms.federated import local_training
from fedms.federated.client import Client, Private, visit
from fedms.federated.evaluation import evaluate_client
from fedms.federated.server import Server
from fedms.methods.apfl import APFL
from fedms.methods.fedms_plus import FedMSPlus
from fedms.training import expert_model
from fedms.training.expert_model import ExpertModel
from fedms_ext.sparse import surgery

SETS = ["data.max_samples=24", 'model.targets=["v_proj", "fc1"]', "clients.count=1", "clients.unseen=0", "stage1.rounds=1",
        "stage2.rounds=1", "lora.rank=2", "sal.schedule=fixed", "sal.depth=2", "stage1.batch=16", "stage2.batch=16",
        "clients.optimizer=kept", "lora.dropout=0.1", "run.threads=1"]


FULL = "FEDMS_FULL" in os.environ       # without it a few methods and mutants: each is two short trainings
METHODS = registry.method_names() if FULL else ["local", "fedavg", "fedms", "fedms_plus"]


class TestFakeCuda:
    def test_refuses_tensors_of_two_devices_and_lets_single_numbers_pass(self):
        with FakeCuda() as fake:
            there, here = torch.ones(3, device="cuda"), torch.ones(3)
            assert there.device == CUDA and here.device == CPU and there.is_cuda and fake.lies_on_it(there + 1)
            with pytest.raises(DeviceMismatch):
                there + here
            assert fake.lies_on_it(there * torch.tensor(2.0))
            assert fake.lies_on_it(here.to("cuda")) and not fake.lies_on_it(there.cpu()) and fake.lies_on_it(there.to(torch.float64))
            assert fake.lies_on_it(there[torch.tensor([0, 1])])     # an index may come from the CPU

    def test_refuses_numpy_and_a_generator_of_the_cpu(self):
        with FakeCuda():
            there = torch.ones(3, device="cuda")
            with pytest.raises(TypeError, match="numpy"):
                there.numpy()
            with pytest.raises(RuntimeError, match="generator"):
                there.uniform_(generator=torch.Generator())
            with pytest.raises(RuntimeError, match="generator"):
                torch.randn(3, generator=torch.Generator(), device="cuda")

    def test_backward_is_watched_too(self):
        class Mixes(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad + torch.ones(3)

        with FakeCuda():
            x = torch.ones(3, device="cuda").requires_grad_()
            with pytest.raises(DeviceMismatch):
                Mixes.apply(x).sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_leaves_nothing_on_the_cpu(method):
    with FakeCuda() as fake:
        found = rounds_on("cuda", method, lies_on_gpu=fake.lies_on_it)
    for there, here in zip(found, rounds_on("cpu", method), strict=True):
        assert there.keys() == here.keys()
        for name, tensor in there.items():
            torch.testing.assert_close(tensor, here[name], rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")


# A place where a tensor changes its device, what would be there without that, and a method that passes by.
MUTANTS = [
    (expert_model.ExpertModel, "inputs", "tensor.to(self.device)", "tensor", "fedavg"),
    (expert_model.ExpertModel, "targets", ".to(self.device)", "", "fedavg"),
    (expert_model.ExpertModel, "_no_shifts", ", device=self.device", "", "fedavg"),
    (expert_model.ExpertModel, "in_chunks", ", device=self.device", "", "fedavg"),
    (expert_model, "_copies", '.to("cpu", copy=True)', ".clone()", "fedavg"),
    (local_training, "moments_of", '.to("cpu", copy=True)', ".clone()", "fedavg"),
    (local_training, "load_moments", ".to(p.device, copy=True)", ".clone()", "fedavg"),
    (APFL, "_train_own", ".to(model.device)", ".clone()", "apfl"),
    (FedMSPlus, "_shift", ".to(model.device)", ".clone()", "fedms_plus"),
    (surgery, "reset_expert", "device=generator.device", "device=a.device", "fedavg"),
]
TRIED = [m for m in MUTANTS if FULL or m[1] in ("_copies", "_shift")]   # one that leaves the GPU, one that stays on the CPU


def source_of(owner, name):
    return textwrap.dedent(inspect.getsource(getattr(owner, name)))


def test_what_the_mutants_change_is_there():
    assert [m[1] for m in MUTANTS if source_of(m[0], m[1]).count(m[2]) != 1] == []


@pytest.mark.parametrize("owner, name, there, mutated, method", TRIED, ids=[f"{m[1]}-{m[4]}" for m in TRIED])
def test_a_tensor_left_behind_is_found(owner, name, there, mutated, method, monkeypatch):
    made: dict = {}
    exec(source_of(owner, name).replace(there, mutated), inspect.unwrap(getattr(owner, name)).__globals__, made)
    monkeypatch.setattr(owner, name, made[name])
    if owner is surgery:
        monkeypatch.setattr(expert_model, name, made[name])
    with FakeCuda() as fake, pytest.raises(Exception, match="on the same device|on the GPU|generator"):
        rounds_on("cuda", method, "stage1.rounds=2", lies_on_gpu=fake.lies_on_it)


def rounds_on(device, method, *sets, lies_on_gpu=lambda tensor: False):
    """A round of each stage with one client, and its evaluation. Returns the tensors of its replies, and those that it keeps."""
    config = load_config("digits", [*SETS, f"run.method={method}", *sets])
    foundation = models.load(config.model)
    dataset = data.load(config.data, foundation)
    model = ExpertModel(foundation, dataset, config, device=device)
    assert all(lies_on_gpu(p) == (device == "cuda") for p in foundation.module.parameters())
    made = methods.create(config)
    server = Server(config, model.order, model.block_of, made, made.statistics(len(dataset.classes)))
    client = Client(data.partition(dataset, config.data, config.clients, 0).clients[0], config)
    state, private = server.start(made.initial(model)), Private()
    model.start()
    replies = []
    while state.stage != "done":
        message, collected = server.message(state), server.collect(state)
        came, private = visit(made.client_step, model, client, private, message)
        assert came.reply is not None, came.reason
        assert (came.peak_memory_bytes == FakeCuda.MEMORY) == (device == "cuda")
        replies.append(came.reply.tensors)
        for name, tensor in {**came.reply.tensors, **came.reply.statistics, **private.tensors}.items():
            assert not lies_on_gpu(tensor), f"{name} would be sent or kept on the GPU"
        server.admit(came.reply, message, client, collected)
        state, _ = server.step(state, collected)
    record = evaluate_client(made, model, client, private, server.message(state))
    assert record["accuracy"]["personalized"] is not None
    return [*replies, private.tensors]
