"""FedMS with extensions that were chosen on validation data.

Each is a setting in `[plus]`; docs/method/fedms.md gives what each gains.

The clients' class priors. Clients differ most in how often they see a class. The shift log p_client(y) - log p_all(y) is
added to both experts' logits, so that the local expert need not spend its few samples on learning it (balanced softmax:
Ren et al., arXiv 2007.10740; logit calibration: Zhang et al., 2209.00189). The class counts of all clients are added up by
the server; a deployment would use a secure sum.

Half and half. Both experts weigh the same, since no gate has been shown to choose better (docs/evidence/mixture.md): nothing is
trained, sent or held out for a mixture.

A gate, where one is asked for, on samples that no expert has seen. On the expert's own training samples the gate learns to trust
an expert that knows them by heart. Here, once the expert of the visit is trained and chosen, the gate alone is trained on the
client's validation samples, or on a share of the training samples that is kept from the expert. It sees how sure both experts are,
and has a bias. The frozen model's features, which the gate of `fedms` sees, it sees only where it is asked to: a client has a few
dozen samples to fit a gate on, too few for the ten thousand weights behind them.

A global expert that goes on. In stage 2 each visit first trains the global expert as in stage 1, so that it has had as many
rounds at the end as federated averaging alone, and the mixture need not make up for those it missed.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private, validate
from fedms.federated.local_training import Group, train
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Prediction
from fedms.methods.fedavg_prior import log_prior
from fedms.methods.fedms import FedMS
from fedms.methods.mixing import Fitted, Mixture, is_few, train_mixture, train_together
from fedms.methods.steps import BestEpoch, class_counts, shared_visit
from fedms.seeds import generator
from fedms.tensors import Tensors
from fedms.training.expert_model import EXPERTS, ExpertModel

COUNTS = "class_counts"


class FedMSPlus(FedMS):
    """FedMS with extensions, each with a setting in `[plus]` (see the module)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        by_outputs = config.gate.mixing == "outputs"
        self.mixture = replace(self.mixture, sees_confidences=self.settings.confidences and by_outputs,
                               sees_features=self.settings.features or not by_outputs)

    @property
    def restarts_depth(self) -> bool:
        """Whether the depth begins again in stage 2. It does not if the global expert is trained on."""
        return not self.settings.global_in_stage2

    @property
    def _uses_prior(self) -> bool:
        return self.config.task.kind == "classification"

    def statistics(self, classes: int) -> Tensors:
        return {COUNTS: torch.zeros(classes, dtype=torch.float64)} if self._uses_prior else {}

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        goes_on = self.settings.global_in_stage2 and not name.startswith("gate/")
        return BroadcastPolicy.EVERY_ROUND if goes_on else super().broadcast_policy(stage, name)

    def most_training(self, name: str) -> tuple[float, int]:
        lr, epochs = super().most_training(name)
        if is_few(name):
            lr = max(lr, self.settings.confidence_lr)
        return lr, max(epochs, self.settings.gate_epochs) if name.startswith("gate/") else epochs

    def initial(self, model: ExpertModel) -> Tensors:
        side = {"gate/side.weight": torch.zeros(len(EXPERTS), 2 * len(EXPERTS))} if self.mixture.sees_confidences else {}
        return {**super().initial(model), **side}

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        counts = class_counts(model, client.train)
        known = {COUNTS: counts} if self._uses_prior else {}
        reply, after = yield from self._visit(model, client, private, message, counts)
        return (replace(reply, statistics={} if COUNTS in private.tensors else known),
                Private({**after.tensors, **known}))

    def _visit(self, model: ExpertModel, client: Client, private: Private, message: Message,
               counts: Tensor) -> Visiting:
        """A visit without its statistics: federated averaging in stage 1; in stage 2 the same if the global expert is trained on, then the
        mixture."""
        shared, after_shared = None, Private()
        if message.stage == "stage1" or self.settings.global_in_stage2:
            self._shift(model, "stage1", counts, message.statistics)
            as_stage1 = message if message.stage == "stage1" else replace(
                message, stage="stage1", round=self.config.stage1.rounds + message.round)
            shared, after_shared = yield from shared_visit(model, client, private, as_stage1)
        if message.stage == "stage1":
            return shared, after_shared
        self._shift(model, "stage2", counts, message.statistics)
        self.mixture.load(model, private, message, client.trained_depth(message), self._new_gate(model))
        fit = self._train_gate_after if self.trains_gate and self.settings.gate_on != "training" else train_together
        reply, after = train_mixture(self.mixture, model, client, private, message, fit)
        if shared is not None:
            size = shared.metrics["trained_params"] + reply.metrics["trained_params"]
            reply = replace(reply, tensors={**shared.tensors, **reply.tensors},
                            metrics={**reply.metrics, "trained_params": size})
        return reply, Private({**after_shared.tensors, **after.tensors})

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        if COUNTS in private.tensors:                    # a client that was never visited has no counts
            self._shift(model, "stage2", private.tensors[COUNTS], final.statistics)
        return super().predict(model, part, private, final)

    def _shift(self, model: ExpertModel, stage: str, counts: Tensor, statistics: Tensors) -> None:
        """Add the client's class prior to the logits of its experts. It is uniform until the server has sent the first sum."""
        if not self._uses_prior:
            return
        plus, shift = self.settings, self._prior(counts, statistics).to(model.device)
        none = torch.zeros_like(shift)
        on_global = plus.prior_in_stage1 if stage == "stage1" else plus.prior != "off"
        on_local = stage != "stage1" and plus.prior == "both"
        model.shifts = {"global": shift if on_global else none, "local": shift if on_local else none}

    def own_shift(self, private: Private, final: Message) -> Tensor | None:
        if COUNTS not in private.tensors or self.settings.prior != "both":
            return None
        return self._prior(private.tensors[COUNTS], final.statistics)

    def _prior(self, counts: Tensor, statistics: Tensors) -> Tensor:
        """Return the log-prior (C,) float32 of a client's classes relative to those of all clients."""
        everyone, smoothing = statistics.get(COUNTS, torch.zeros_like(counts)), self.settings.smoothing
        return (log_prior(counts, smoothing) - log_prior(everyone, smoothing)).float()

    def _train_gate_after(self, mixture: Mixture, model: ExpertModel, client: Client, private: Private, message: Message,
                          expert: Group, gate: Group) -> Fitted:
        """Train the local expert, keep the best one, and then train the gate on samples that the expert has not seen."""
        rows, part, gate_rows = self._split(client)
        best = BestEpoch(model, client, validate(model, client, "local"))
        loss, moments, _ = train(model, client, message, private, [expert], mixture.joint_loss(model), rows=rows,
                                 after_epoch=best.after_epoch)
        best.load(message)
        if len(gate_rows):
            _, gate_moments, _ = train(model, client, message, private, self._gate_groups(gate), mixture.gate_loss(model), part,
                                       gate_rows, self.settings.gate_epochs)
            moments = {**moments, **gate_moments}
        return Fitted(loss, best.kept, moments)

    def _gate_groups(self, gate: Group) -> list[Group]:
        """Return the gate's parameters in two groups: those behind the features, and the few others with a larger learning rate."""
        few = {name: p for name, p in gate.params.items() if is_few(name)}
        return [Group({name: p for name, p in gate.params.items() if name not in few}, gate.lr),
                Group(few, self.settings.confidence_lr)]

    def _split(self, client: Client) -> tuple[Tensor, Subset, Tensor]:
        """Return the rows of the training samples for the local expert, the subset for the gate, and the gate's rows of it.

        They are the same at every visit.
        """
        rows = torch.randperm(len(client.train), generator=generator(self.config.run.seed, "held-out", client.id))
        if self.settings.gate_on == "validation":
            return rows, client.validation, torch.arange(len(client.validation))
        held_out = int(self.settings.held_out * len(rows))
        return rows[held_out:], client.train, rows[:held_out]
