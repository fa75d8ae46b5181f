"""FedAvg, then fine-tuning: in stage 2 every client goes on training a private copy of the shared expert."""
from __future__ import annotations

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Method, Prediction
from fedms.methods.steps import private_visit, shared_expert, shared_visit
from fedms.training.answering import Speaker
from fedms.training.both import both_opinions
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
        shared = shared_expert(model, final, self.config)
        model.load("global", shared, depth=final.depth, applied_depth=final.applied_depth)
        model.load("local", {**shared, **private.tensors}, depth=final.depth, applied_depth=final.applied_depth)
        ours, own = both_opinions(model, part)
        return Prediction(own, global_=ours, local=own)

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        shared = shared_expert(model, final, self.config)
        model.load("local", {**shared, **private.tensors}, depth=0, applied_depth=final.applied_depth)
        return Speaker(("local",))
