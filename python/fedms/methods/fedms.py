"""FedMS: federated fine-tuning with a Mixture of Foundation Models (arXiv 2312.15926; IEEE TMC 2024).

Stage 1 trains a global LoRA expert by federated averaging, its blocks activated one after the other. In stage 2 that
expert is frozen; each client trains a private local expert, which starts as its copy, together with the gate adapter

    z(x) = G_0(x) z_global(x) + G_1(x) z_local(x),      G = softmax(gate(features(x)) / temperature)

on CE(z) + own_loss * CE(z_local), and sends the gate adapter alone. Our choices where the abstracts are silent: the
mixture is taken on logits, and the local expert has a loss of its own (the mixture's alone leaves it weak).

Its ablations are settings: a gate that each client keeps to itself (`[gate] training`), a fixed weight in the gate's place
(`[gate] weight`), the order and schedule of activation (`[sal]`).
"""
from __future__ import annotations

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Method, Prediction
from fedms.methods.mixing import Mixture, train_mixture, train_together
from fedms.methods.steps import shared_visit
from fedms.tensors import Tensors
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class FedMS(Method):
    """The two-stage mixture of a global and a local expert (see the module)."""

    personal = ("stage2",)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.mixture = Mixture(config)

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        if name.startswith("gate/"):
            shared = stage != "stage1" and self.mixture.shares_gate and self.mixture.trains(name)
            return BroadcastPolicy.EVERY_ROUND if shared else BroadcastPolicy.NEVER
        return BroadcastPolicy.EVERY_ROUND if stage == "stage1" else BroadcastPolicy.ONCE

    @property
    def trains_gate(self) -> bool:
        return self.mixture.trains_gate

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        if message.stage == "stage1":
            return (yield from shared_visit(model, client, private, message))
        self.mixture.load(model, private, message, client.trained_depth(message), self._new_gate(model))
        return train_mixture(self.mixture, model, client, private, message, train_together)

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        return self.mixture.predict(model, part, private, final, self._new_gate(model))

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        return self.mixture.speaker(model, private, final, self._new_gate(model))

    def _new_gate(self, model: ExpertModel) -> Tensors:
        """Return the initial tensors of the gate if clients are not sent all of them, otherwise nothing."""
        return self.initial(model) if self.mixture.keeps_gate or not self.mixture.sees_features else {}
