"""What the clients' devices can do: classes of devices, spread over the clients by the run's seed, and their clock.

The clock is simulated: a visit takes the time in which its device would receive, compute and send what the visit did,
one after the other. So a run on one machine tells how long it would take on many slow ones, the same at every repeat.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fedms.config import RunConfig
from fedms.seeds import generator


@dataclass(frozen=True)
class Device:
    """One client's device; None: no limit, and no time.

    max_depth:      most blocks that it trains.
    max_rank:       most of each pair's rank that it trains.
    flops:          operations a second.
    bandwidth_up, bandwidth_down: bytes a second from and to the client.
    """

    max_depth: int | None = None
    max_rank: int | None = None
    flops: float | None = None
    bandwidth_up: float | None = None
    bandwidth_down: float | None = None

    def seconds(self, flops: int, bytes_up: int, bytes_down: int) -> float | None:
        """Simulated time of a visit; None for a device of unknown speed and link."""
        times = [amount / rate for amount, rate in ((flops, self.flops), (bytes_up, self.bandwidth_up),
                                                    (bytes_down, self.bandwidth_down)) if rate is not None]
        return sum(times) if times else None


def device_of(config: RunConfig, client: int, fitting: Sequence[int | None] = ()) -> Device:
    """The device of a client.

    Args:
        client: its id; participating and unseen clients are counted alike.
        fitting: most blocks that fit each class's memory (`fedms.federated.visit_costs.fitting_depths`); empty: none is limited by it.
    """
    budgets = config.clients.budgets
    if not budgets:
        return Device()
    number = _class_of(config, client)
    tier = budgets[number]
    depths = [depth for depth in (tier.max_depth, *fitting[number:number + 1]) if depth is not None]
    deviations = torch.randn(2, generator=generator(config.run.seed, "devices", client)).tolist()
    speed, link = (math.exp(config.clients.spread * deviation) for deviation in deviations)
    return Device(min(depths, default=None), tier.rank, tier.flops and tier.flops * speed,
                  tier.bandwidth_up and tier.bandwidth_up * link, tier.bandwidth_down and tier.bandwidth_down * link)


def _class_of(config: RunConfig, client: int) -> int:
    """Classes are spread over the clients by their shares."""
    total = config.clients.count + config.clients.unseen
    place, reached = (_ranks(config.run.seed, total)[client] + 0.5) / total, 0.0
    for number, tier in enumerate(config.clients.budgets):
        reached += tier.share
        if place < reached:
            return number
    return len(config.clients.budgets) - 1


@lru_cache(maxsize=1)
def _ranks(seed: int, total: int) -> list[int]:
    return torch.randperm(total, generator=generator(seed, "budgets")).tolist()
