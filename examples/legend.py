"""LEGEND (Liu et al., arXiv 2412.20004) as a method of one's own: federated averaging in which pairs near the output have higher
ranks, and each device trains as many blocks from the output on as it has time for.

    FEDMS_PLUGINS=legend PYTHONPATH=examples fedms compare digits --methods fedavg,legend --set sal.schedule=all

The depth of each device is a setting of every method: `sal.schedule = "all"`, with `sal.visit_seconds` and `flops` in
`clients.budgets`. Of the paper the abstract was at hand. Our choices: the rank of block l of L is `lora.rank` times l / L, rounded,
at least 1; all pairs are scaled by alpha / `lora.rank`. The rest of a pair is zero in A and in B, so it has no gradient and stays
zero; it travels as zeros.
"""
from __future__ import annotations

from fedms import register_method
from fedms.methods.fedavg import FedAvg
from fedms.tensors import is_a


def rank_of(block: int, blocks: int, rank: int) -> int:
    """Return the rank of a block, of which the first is 1: it rises in a straight line to `rank` at the last one."""
    return max(1, round(rank * block / blocks))


class LEGEND(FedAvg):
    """Federated averaging with ranks that rise towards the output (see the module)."""

    def initial(self, model):
        found, blocks = super().initial(model), max(model.block_of.values())
        for name in filter(model.block_of.get, found):
            rank = rank_of(model.block_of[name], blocks, self.config.lora.rank)
            found[name] = found[name].clone()
            (found[name] if is_a(name) else found[name].T)[rank:] = 0
        return found


register_method("legend", LEGEND, "federated averaging with higher ranks near the output",
                trained="as fedavg, with ranks that rise towards the output", sent="all of it", color="#0d9488")
