"""FedAvg, then each client's own class prior on top, with no further training:

    z(x) = z_global(x) + log p_client(y) - log p_all(y)

the shift that is right when clients differ in how often they see a class and in nothing else (logit adjustment: Menon
et al., arXiv 2007.07314). The counts of all clients are added up by the server; a deployment would use a secure sum.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import Prediction
from fedms.methods.fedavg import FedAvg
from fedms.methods.steps import class_counts
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel


class FedAvgPrior(FedAvg):
    """Federated averaging with the client's class prior on the logits (see the module)."""

    def statistics(self, classes: int) -> Tensors:
        return {"class_counts": torch.zeros(classes, dtype=torch.float64)}

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        reply, after = yield from super().visit(model, client, private, message)
        counts = class_counts(model, client.train)
        first = "class_counts" not in private.tensors
        return (replace(reply, statistics={"class_counts": counts} if first else {}),
                replace(after, tensors={**after.tensors, "class_counts": counts}))

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        shared = super().predict(model, part, private, final)
        if "class_counts" not in private.tensors:        # never visited: its classes were never counted
            return shared
        shift = log_prior(private.tensors["class_counts"]) - log_prior(final.statistics["class_counts"])
        return replace(shared, personalized=shared.global_ + self.settings.tau * shift.float().to(model.device))


def log_prior(counts: Tensor, smoothing: float = 1.0) -> Tensor:
    """log p(y) (C,) from class counts, each raised by `smoothing` (Laplace), so that a class never seen is rare, not
    impossible."""
    return ((counts + smoothing) / (counts.sum() + smoothing * len(counts))).log()
