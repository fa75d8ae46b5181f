"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): A and B are averaged apart, and what that loses, the mean of the products
minus the product of the means, is added to the frozen weights.

It is FedAvg with the rule `exact`, which `[aggregate] rule` can give to other methods too. The residual travels whole, an
(N, K) tensor a layer; the paper sends factors of it, whose rank is that of all clients' pairs together."""
from __future__ import annotations

from fedms.methods.fedavg import FedAvg


class FedExLoRA(FedAvg):
    """Federated averaging; its row in the catalogue names the rule."""
