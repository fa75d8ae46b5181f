"""FedAvg on LoRA (FedIT: Zhang et al., arXiv 2305.05644): one expert, trained by all, averaged every round."""
from __future__ import annotations

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import BroadcastPolicy, Method, Prediction
from fedms.methods.steps import shared_expert, shared_visit
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class FedAvg(Method):
    """Federated averaging of the expert and its head (see the module)."""

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        return BroadcastPolicy.NEVER if name.startswith("gate/") else BroadcastPolicy.EVERY_ROUND

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        return shared_visit(model, client, private, message)

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        model.load("global", shared_expert(model, final, self.config), depth=final.depth,
                   applied_depth=final.applied_depth)
        opinion = model.opinions("global", part)
        return Prediction(opinion, global_=opinion)

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        model.load("global", shared_expert(model, final, self.config), depth=0, applied_depth=final.applied_depth)
        return Speaker(("global",))
