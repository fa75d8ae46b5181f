"""A task that this package does not have, in one file: several labels a sample, each of them there or not."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedms import data, methods, models
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.engines.local import LocalEngine
from fedms.federated.client import Client
from fedms.federated.server import Server
from fedms.progress import Progress
from fedms.storage.run_folder import RunFolder
from fedms.tasks import Task
from fedms.training.expert_model import ExpertModel

SETS = ["data.max_samples=160", "clients.count=2", "clients.unseen=0", "data.partition=iid", "stage1.rounds=3", "stage2.rounds=1",
        "stage1.lr=0.003", "stage1.epochs=4", "run.threads=1"]


class MultiLabel(Task):
    """An opinion is a logit for each label, (U, C); targets (U, C) are 1 where a label is there, else 0."""

    def __init__(self, width: int, labels: int) -> None:
        self.width, self.columns = width, labels

    def new_head(self) -> nn.Module:
        return nn.Linear(self.width, self.columns)

    def reset_head(self, head: nn.Module, generator: torch.Generator) -> None:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)

    def opinion(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        return head(features)

    def mix(self, weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
        if on == "logits":
            return weights[:, :1] * shared + weights[:, 1:] * own
        return torch.logit(weights[:, :1] * shared.sigmoid() + weights[:, 1:] * own.sigmoid(), eps=1e-6)

    def loss(self, opinion: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(opinion, targets)

    def right(self, opinion: Tensor, targets: Tensor) -> Tensor:
        return ((opinion > 0) == (targets > 0.5)).all(1)

    def accuracy(self, opinion: Tensor, targets: Tensor) -> float:
        return float(self.right(opinion, targets).float().mean())

    def confidences(self, opinion: Tensor) -> Tensor:
        sure = opinion.sigmoid().sub(0.5).abs()
        return torch.stack([sure.mean(1), sure.amin(1)], 1)


@pytest.mark.parametrize("method", ["local", "fedavg", "fedavg_ft", "apfl", "ditto", "fedms"])
def test_methods_engine_and_records_need_to_know_nothing_of_it(method, tmp_path):
    config = load_config("digits", [*SETS, f"run.method={method}", "gate.on=probabilities"])
    foundation = models.load(config.model)
    digits = data.load(config.data, foundation)
    is_there = torch.stack([digits.labels % 2 == 0, digits.labels > 4, digits.labels % 3 == 0], 1).float()
    dataset = replace(digits, values=is_there)
    model = ExpertModel(foundation, dataset, config, task=MultiLabel(foundation.feature_dim, 3))
    partition = data.partition(dataset, config.data, config.clients, 0)
    made = methods.create(config)
    server = Server(config, model.order, model.block_of, made, made.statistics(len(dataset.classes)))
    folder = RunFolder.create(tmp_path / "run", config)
    engine = LocalEngine(made, server, model, [Client(split, config) for split in partition.clients],
                         Subset(partition.global_test), folder, Progress())
    state = engine.run(made.initial(model))
    found = [evaluation.record for evaluation in engine.evaluate(engine.final_message(state), True)]
    folder.close()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert min(losses[1:]) < losses[0]
    assert all(0 <= record["accuracy"]["personalized"] <= 1 for record in found)
