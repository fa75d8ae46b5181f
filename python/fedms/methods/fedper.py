"""FedPer (Arivazhagan et al., arXiv 1912.00818): a shared body, a private head, trained jointly. Here the body is the
LoRA expert, and the head a client's own from its first visit on. Needs the linear head."""
from __future__ import annotations

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Method, Prediction
from fedms.methods.steps import shared_expert, shared_visit
from fedms.training.expert_model import ExpertModel


class FedPer(Method):
    """FedPer (see the module): shared LoRA pairs, private head."""

    personal = ("stage1", "stage2")

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        return BroadcastPolicy.NEVER if name.startswith(("head/", "gate/")) else BroadcastPolicy.EVERY_ROUND

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        return shared_visit(model, client, private, message, start=model.initial(self.config.run.seed))

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        """A client that was never visited has the head that all begin with."""
        start, shared = model.initial(self.config.run.seed), shared_expert(model, final, self.config)
        model.load("global", {**start, **private.tensors, **shared}, depth=final.depth,
                   applied_depth=final.applied_depth)
        return Prediction(model.opinions("global", part))
