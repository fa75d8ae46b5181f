"""FedMS with what validation data asked for. Each piece is a setting of `[plus]`; docs/method/fedms.md says what each gains.

The clients' class priors. Clients differ most in how often they see a class. The shift log p_client(y) - log p_all(y) is
added to both experts' logits, so that the local expert need not spend its few samples on learning it (balanced softmax:
Ren et al., arXiv 2007.10740; logit calibration: Zhang et al., 2209.00189). The class counts of all clients are added up by
the server; a deployment would use a secure sum.

A gate on samples that no expert has seen. On the expert's own training samples the gate learns to trust an expert that
knows them by heart. Here, once the expert of the visit is trained and chosen, the gate alone is trained on the client's
validation samples, or on a share of the training samples that is kept from the expert.

Confidences. Which expert is right shows in how sure each is: the gate sees that beside the features.

A global expert that goes on. In stage 2 each visit first trains the global expert as in stage 1, so that it has had as many
rounds at the end as federated averaging alone, and the mixture need not make up for those it missed.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, Group, Loss, LossOn, Message, Private, Reply, train, validate
from fedms.methods.fedavg_prior import log_prior
from fedms.methods.fedms import FedMS
from fedms.methods.steps import Prediction, class_counts, keep_better, train_shared
from fedms.seeds import generator
from fedms.tensors import Tensors
from fedms.training.expert_model import EXPERTS, ExpertModel

COUNTS = "class_counts"


class FedMSPlus(FedMS):
    name = "fedms_plus"

    @property
    def _uses_prior(self) -> bool:
        return self.config.task.kind == "classification"

    def statistics(self, classes: int) -> Tensors:
        return {} if not self._uses_prior else {COUNTS: torch.zeros(classes, dtype=torch.float64)}

    def broadcast_policy(self, stage: str, name: str) -> str | None:
        if self.config.plus.global_in_stage2 and not name.startswith("gate/"):
            return "round"
        return super().broadcast_policy(stage, name)

    def initial(self, model: ExpertModel) -> Tensors:
        side = {"gate/side.weight": torch.zeros(len(EXPERTS), 2 * len(EXPERTS))} if self.config.plus.confidences else {}
        return {**super().initial(model), **side}

    def client_step(self, model: ExpertModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        counts = class_counts(model, client.train)
        known = {COUNTS: counts} if self._uses_prior else {}
        statistics = {} if COUNTS in private.tensors else known
        first, kept = None, Private()
        if message.stage == "stage2" and self.config.plus.global_in_stage2:
            self._shift(model, "stage1", counts, message.statistics)
            as_before = replace(message, stage="stage1", round=self.config.stage1.rounds + message.round)
            first, kept = train_shared(model, client, private, as_before)
        self._shift(model, message.stage, counts, message.statistics)
        reply, after = super().client_step(model, client, private, message)
        if first is not None:
            size = first.metrics["trained_params"] + reply.metrics["trained_params"]
            reply = replace(reply, tensors={**first.tensors, **reply.tensors},
                            metrics={**reply.metrics, "trained_params": size})
        return replace(reply, statistics=statistics), Private({**kept.tensors, **after.tensors, **known})

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        if COUNTS in private.tensors:                    # a client that was never visited has no counts
            self._shift(model, "stage2", private.tensors[COUNTS], final.statistics)
        return super().predict(model, part, private, final)

    def _shift(self, model: ExpertModel, stage: str, counts: Tensor, statistics: Tensors) -> None:
        """Adds the client's class prior to its experts' logits. Before the first sum has come, all classes count alike."""
        if not self._uses_prior:
            return
        plus = self.config.plus
        everyone = statistics.get(COUNTS, torch.zeros_like(counts))
        shift = (log_prior(counts, plus.smoothing) - log_prior(everyone, plus.smoothing)).float().to(model.device)
        none = torch.zeros_like(shift)
        on_global = plus.prior_in_stage1 if stage == "stage1" else plus.prior != "off"
        on_local = stage != "stage1" and plus.prior == "both"
        model.shifts = {"global": shift if on_global else none, "local": shift if on_local else none}

    def _weights(self, model: ExpertModel, features: Tensor, shared: Tensor | None = None,
                 own: Tensor | None = None) -> Tensor:
        if self.config.gate.weight is not None or not self.config.plus.confidences:
            return super()._weights(model, features, shared, own)
        sure = model.task.confidences
        return model.gate(features, torch.cat([sure(shared), sure(own.detach())], 1))

    def _fit(self, model: ExpertModel, client: Client, private: Private, message: Message, expert: Group,
             gate: Group) -> tuple[float, Tensors, Tensors]:
        if self.config.plus.gate_on == "training":
            return super()._fit(model, client, private, message, expert, gate)
        rows, part, gate_rows = self._split(client)
        own_before, before = validate(model, client, "local"), model.read_applied("local")
        loss, moments = train(model, client, message, private, [expert], self._loss(model), rows=rows)
        kept, _ = keep_better(model, client, message, before, own_before)
        if gate.params and len(gate_rows):
            _, gate_moments = train(model, client, message, private, self._gate_groups(gate), self._gate_loss(model), part,
                                    gate_rows, self.config.plus.gate_epochs)
            moments = {**moments, **gate_moments}
        return loss, kept, moments

    def _gate_groups(self, gate: Group) -> list[Group]:
        """Hundreds of features need small steps, a handful of confidences larger ones."""
        side = {name: p for name, p in gate.params.items() if name.startswith("gate/side.")}
        rest = {name: p for name, p in gate.params.items() if name not in side}
        return [Group(rest, gate.lr), *([Group(side, self.config.plus.confidence_lr)] if side else [])]

    def _split(self, client: Client) -> tuple[Tensor, Subset, Tensor]:
        """Rows of the training part for the local expert; the part that the gate is trained on, and its rows there. The
        same at every visit."""
        rows = torch.randperm(len(client.train), generator=generator(self.config.run.seed, "held-out", client.id))
        if self.config.plus.gate_on == "validation":
            return rows, client.validation, torch.arange(len(client.validation))
        held_out = int(self.config.plus.held_out * len(rows))
        return rows[held_out:], client.train, rows[:held_out]

    def _gate_loss(self, model: ExpertModel) -> LossOn:
        """Mean over a batch of the mixture's loss, with both experts constant."""
        def on(part: Subset) -> Loss:
            mixture, own = self._mixture_of(model, part), model.opinions("local", part)
            return lambda rows: model.task.loss(mixture(rows, own[model.units(part, rows)]), model.targets(part, rows))
        return on
