"""Local training: every client trains a private expert on its own data, and nothing travels."""
from __future__ import annotations

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Method, Prediction
from fedms.methods.steps import private_speaker, private_visit
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class Local(Method):
    """Each client trains alone; nothing is sent (see the module)."""

    personal = ("stage1", "stage2")

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        return BroadcastPolicy.NEVER

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        return private_visit(model, client, private, message, start=model.initial(self.config.run.seed))

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        start = model.initial(self.config.run.seed)
        model.load("local", {**start, **private.tensors}, depth=final.depth, applied_depth=final.applied_depth)
        opinion = model.opinions("local", part)
        return Prediction(opinion, local=opinion)

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        return private_speaker(model, private, final, model.initial(self.config.run.seed))
