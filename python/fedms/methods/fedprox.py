"""FedProx (Li et al., arXiv 1812.06127): FedAvg whose clients are held near what they received,

    min over w of  CE(w) + mu/2 * ||w - w_received||^2        over the pairs and the head that a client trains.
"""
from __future__ import annotations

from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.methods.fedavg import FedAvg
from fedms.methods.steps import proximal, shared_visit
from fedms.training.expert_model import ExpertModel


class FedProx(FedAvg):
    """FedProx (see the module): federated averaging, held near what a client received."""

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        return shared_visit(model, client, private, message,
                            penalty=proximal(self.settings.mu, message.tensors, model.device))
