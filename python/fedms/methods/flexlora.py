"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): clients train pairs of the rank that suits their devices. The server
averages the products B A instead of A and B, and factors the mean anew; a client takes as many leading components as it can train,

    W = sum over clients of p_i B_i A_i = U S V^T,      B = U S,  A = V^T,  in the order of falling singular values.

A device's rank is `rank` in `[clients] budgets`; `[lora] rank` is the server's and the largest. Our choices: ranks share one scale
alpha / rank; S goes to B, so that a component that nobody has used yet begins as LoRA does, with B zero and A not; heads are averaged
as in FedAvg; clients answer with the whole rank. What a client does not train of a pair travels as zeros."""
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedms.federated.client import Client, Message, Participant, Private
from fedms.federated.lockstep import Visiting
from fedms.methods.fedavg import FedAvg
from fedms.tensors import is_a
from fedms.training.expert_model import ExpertModel


class FlexLoRA(FedAvg):
    """Federated averaging of products, with ranks by device (see the module); its row in the catalogue names the rule."""

    def received(self, name: str, tensor: Tensor, participant: Participant) -> Tensor:
        rank = participant.device.max_rank
        if rank is None or not name.startswith("expert/"):
            return tensor
        kept = tensor.clone()
        (kept if is_a(name) else kept.T)[rank:] = 0      # with both of a component zero, so are its gradients
        return kept

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        tensors = {name: self.received(name, tensor, client) for name, tensor in message.tensors.items()}
        return super().visit(model, client, private, replace(message, tensors=tensors))
