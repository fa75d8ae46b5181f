"""Ditto (Li et al., arXiv 2012.04221): beside the FedAvg model w, each client trains a private one v, pulled to it,

    min over v of  CE(v) + lambda/2 * ||v - w_received||^2;

w is sent, v predicts. Both are trained at every visit, in both stages, so a visit costs two."""
from __future__ import annotations

from dataclasses import replace

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import Prediction
from fedms.methods.fedavg import FedAvg
from fedms.methods.steps import private_prediction, private_speaker, private_visit, proximal, shared_expert, shared_visit
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class Ditto(FedAvg):
    """Ditto (see the module): shared expert, and a private one that is pulled toward it."""

    personal = ("stage1", "stage2")

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        shared = shared_expert(model, message, self.config)
        reply, private = yield from shared_visit(model, client, private, message)
        own, private = yield from private_visit(model, client, private, message, start=shared,
                                                penalty=proximal(self.settings.pull, shared, model.device))
        size = reply.metrics["trained_params"] + own.metrics["trained_params"]
        return replace(reply, metrics={**own.metrics, "trained_params": size}), private

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        if not private.has_expert:                          # never visited: no model of its own
            return super().predict(model, part, private, final)
        return private_prediction(model, part, private, final, self.config)

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        if not private.has_expert:
            return super().speaker(model, private, final)
        return private_speaker(model, private, final, shared_expert(model, final, self.config))
