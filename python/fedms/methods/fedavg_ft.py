"""FedAvg, then fine-tuning: in stage 2 every client goes on training a private copy of the shared expert."""
from __future__ import annotations

from fedms.client import Client, Message, Private, Reply
from fedms.methods.base import Method, Prediction, train_private, train_shared
from fedms.resident import Part, ResidentModel


class FedAvgFT(Method):
    name = "fedavg_ft"

    def carries(self, stage: str, name: str) -> str | None:
        if not name.startswith(("expert/", "head/")):
            return None
        return "round" if stage == "stage1" else "once"

    def client_step(self, model: ResidentModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        if message.stage == "stage1":
            return train_shared(model, client, private, message)
        return train_private(model, client, private, message, start=message.constants)

    def predict(self, model: ResidentModel, part: Part, private: Private, final: Message) -> Prediction:
        depths = {"depth": final.depth, "applied_depth": final.applied_depth}
        model.load("global", final.constants, **depths)
        model.load("local", {**final.constants, **private.tensors}, **depths)
        shared, own = model.all_logits("global", part), model.all_logits("local", part)
        return Prediction(own, global_=shared, local=own)
