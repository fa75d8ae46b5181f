"""FedMS with the gate trained on samples that the local expert has not seen.

On the expert's own training samples the gate learns to trust an expert that knows them by heart, and its weight drifts
to the local one. Here a share of each client's training samples (`[gate] held_out`) is kept from the local expert; once
the expert of the visit is trained and chosen, the gate alone is trained on them.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.client import Client, Group, Message, Private, train, validate
from fedms.methods.base import keep_better
from fedms.methods.fedms import FedMS
from fedms.resident import ResidentModel, Tensors
from fedms.rng import generator


class FedMSPlus(FedMS):
    name = "fedms_plus"

    def _fit(self, model: ResidentModel, client: Client, private: Private, message: Message, expert: Group,
             gate: Group) -> tuple[float, Tensors, Tensors]:
        expert_rows, gate_rows = self._split(client)
        own_before, before = validate(model, client, "local"), model.read_applied("local")
        loss, moments = train(client, message, private, [expert], self._loss(model, client), expert_rows)
        kept, _ = keep_better(model, client, message, before, own_before)
        if len(gate_rows) and gate.params:
            _, gate_moments = train(client, message, private, [gate], self._gate_loss(model, client), gate_rows)
            moments = {**moments, **gate_moments}
        return loss, kept, moments

    def _split(self, client: Client) -> tuple[Tensor, Tensor]:
        """Rows of the training part for the local expert, and those for the gate; the same at every visit."""
        rows = torch.randperm(len(client.train), generator=generator(self.config.run.seed, "held-out", client.id))
        held_out = int(self.config.gate.held_out * len(rows))
        return rows[held_out:], rows[:held_out]

    def _gate_loss(self, model: ResidentModel, client: Client) -> Callable[[Tensor], Tensor]:
        """Mean over a batch of CE(mixture), with both experts constant."""
        part = client.train
        mixture, own = self._mixture_of(model, part), model.all_logits("local", part)
        return lambda rows: F.cross_entropy(mixture(rows, own[rows]), model.labels(part, rows))
