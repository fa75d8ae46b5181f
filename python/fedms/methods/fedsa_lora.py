"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A and B are trained, A alone is shared; it holds what clients have in
common, B what they do not. The linear head, which the paper does not train, stays with B (our choice)."""
from __future__ import annotations

from fedms.federated.method import BroadcastPolicy
from fedms.methods.fedper import FedPer
from fedms.tensors import is_a


class FedSALoRA(FedPer):
    """FedSA-LoRA (see the module): the A matrices are shared, B and the head are private."""

    personal = ("stage1", "stage2")

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        return BroadcastPolicy.EVERY_ROUND if is_a(name) else BroadcastPolicy.NEVER
