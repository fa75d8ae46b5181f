"""FedAvg, then fine-tuning: in stage 2 every client goes on training a private copy of the shared expert."""
from __future__ import annotations

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Method, Prediction
from fedms.methods.steps import private_prediction, private_speaker, private_visit, shared_expert, shared_visit
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class FedAvgFT(Method):
    """Federated averaging, then private fine-tuning in stage 2 (see the module)."""

    personal = ("stage2",)

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        if name.startswith("gate/"):
            return BroadcastPolicy.NEVER
        return BroadcastPolicy.EVERY_ROUND if stage == "stage1" else BroadcastPolicy.ONCE

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        if message.stage == "stage1":
            return shared_visit(model, client, private, message)
        return private_visit(model, client, private, message, start=shared_expert(model, message, self.config))

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        return private_prediction(model, part, private, final, self.config)

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        return private_speaker(model, private, final, shared_expert(model, final, self.config))
