"""Visits of clients of every method on small models, and whether two ways to carry them out come to the same."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from saved_models import WORDS, save

from fedms import data, methods, models
from fedms.data import ClientSplit
from fedms.federated.client import Client, Private, visit
from fedms.federated.lockstep import together
from fedms.federated.server import Server
from fedms.training.constants import new_cache
from fedms.training.expert_model import ExpertModel

# Query and key are left out: their gradients are so small here that rounding turns the sign of AdamW's steps.
IMAGES = ["data.max_samples=40", 'model.targets=["v_proj","o_proj","fc1","fc2"]', "lora.rank=2", "clients.count=3", "clients.unseen=0",
          "data.partition=iid", "sal.schedule=fixed", "sal.depth=2", "stage1.batch=4", "stage2.batch=4", "run.threads=1", "run.device=cpu"]
SIZES = (11, 4, 7)     # of the clients: each has another number of batches and another last batch


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


def sentences(folder, length=None):
    """Settings of a run on a tiny BERT and sentences, both written into a folder: of `length` words, or of 1 to 9."""
    draw = torch.Generator().manual_seed(5)
    chosen = [torch.randint(len(WORDS), (length or 1 + n % 9,), generator=draw) for n in range(80)]
    lines = [" ".join(WORDS[i] for i in words) + (",good" if n % 2 else ",bad") for n, words in enumerate(chosen)]
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
