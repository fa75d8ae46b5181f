"""FedAvg on LoRA (FedIT: Zhang et al., arXiv 2305.05644): one expert, trained by all, averaged every round."""
from __future__ import annotations

from fedms.client import Client, Message, Private, Reply
from fedms.methods.base import Method, Prediction, train_shared
from fedms.resident import Part, ResidentModel


class FedAvg(Method):
    name = "fedavg"

    def carries(self, stage: str, name: str) -> str | None:
        return "round" if name.startswith(("expert/", "head/")) else None

    def client_step(self, model: ResidentModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        return train_shared(model, client, private, message)

    def predict(self, model: ResidentModel, part: Part, private: Private, final: Message) -> Prediction:
        model.load("global", final.tensors, depth=final.depth, applied_depth=final.applied_depth)
        logits = model.all_logits("global", part)
        return Prediction(logits, global_=logits)
