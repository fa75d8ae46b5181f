"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays as it was drawn, B is trained and averaged. The mean of the products
is then the product of the means, so nothing is lost by averaging. All draw the same A from the run's seed.

It is FedAvg with the rule `freeze_a`, which `[aggregate] rule` can give to other methods too. The linear head is trained
and averaged as in FedAvg."""
from __future__ import annotations

from fedms.methods.fedavg import FedAvg


class FFALoRA(FedAvg):
    """Federated averaging; its row in the catalogue names the rule."""
