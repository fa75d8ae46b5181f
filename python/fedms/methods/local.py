"""Local training: every client trains a private expert on its own data, and nothing travels."""
from __future__ import annotations

from fedms.federated.client import Client, Message, Private, Reply
from fedms.methods.steps import Method, Prediction, train_private
from fedms.training.expert_model import ResidentModel, Subset


class Local(Method):
    name = "local"
    personal = ("stage1", "stage2")

    def broadcast_policy(self, stage: str, name: str) -> str | None:
        return None

    def client_step(self, model: ResidentModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        return train_private(model, client, private, message, start=model.initial(self.config.run.seed))

    def predict(self, model: ResidentModel, part: Subset, private: Private, final: Message) -> Prediction:
        start = model.initial(self.config.run.seed)
        model.load("local", {**start, **private.tensors}, depth=final.depth, applied_depth=final.applied_depth)
        logits = model.all_logits("local", part)
        return Prediction(logits, local=logits)
