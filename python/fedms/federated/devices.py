"""What the clients' devices can do: classes of devices, spread over the clients by the run's seed, and their clock.

The clock is simulated: a visit takes the time in which its device would receive, compute and send what the visit did,
one after the other. So a run on one machine tells how long it would take on many slow ones, the same at every repeat.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from fedms.config import RunConfig
from fedms.seeds import derive_seed, generator


class Fitting(NamedTuple):
    """What the cost model says about a run, see `fedms.federated.visit_costs.fitting_of`.

    Attributes:
        depths: Largest number of blocks that fit the memory of each class of devices; None for a class without a memory limit.
            Empty without classes.
        work: Operations of a visit of stage 1 at each depth from 1 on, of the client with the most data. Empty if the run file sets
            no budget for visits.
    """

    depths: Sequence[int | None] = ()
    work: Sequence[int] = ()


@dataclass(frozen=True)
class Device:
    """The device of one client. None means no limit, or no simulated time.

    Attributes:
        max_depth: Largest number of blocks that it trains, in any round.
        flops: Operations per second.
        bandwidth_up, bandwidth_down: Bytes per second from and to the client.
        max_rank: Largest part of each pair's rank that it trains.
        work: See `Fitting`.
        visit_flops, visit_seconds: The budget of a visit, which limits the number of blocks that are trained.
        load, seed: How much its speed varies from round to round, and the seed of that.
        keeps_ahead: Whether its cache makes provision for later rounds: not if its memory is limited, as all of that is planned for
            the largest depth.
    """

    max_depth: int | None = None
    flops: float | None = None
    bandwidth_up: float | None = None
    bandwidth_down: float | None = None
    max_rank: int | None = None
    work: tuple[int, ...] = ()
    visit_flops: float | None = None
    visit_seconds: float | None = None
    load: float = 0.0
    seed: int | None = None
    keeps_ahead: bool = True

    def now(self, stage: str, round: int) -> Device:
        """Return the same device with its speed in a round, in which it also does other work."""
        if self.flops is None or self.seed is None:
            return self
        deviation = torch.randn(1, generator=generator(self.seed, stage, round)).item()
        return replace(self, flops=self.flops * math.exp(self.load * deviation))

    @property
    def depth(self) -> int | None:
        """Most blocks that it trains at its present speed; None for any number. One is always trained."""
        budgets = [self.visit_flops, None if None in (self.visit_seconds, self.flops) else self.visit_seconds * self.flops]
        budget = min((each for each in budgets if each is not None), default=None)
        depths = [self.max_depth, max(1, sum(flops <= budget for flops in self.work)) if self.work and budget is not None else None]
        return min((each for each in depths if each is not None), default=None)

    def seconds(self, flops: int, bytes_up: int, bytes_down: int) -> float | None:
        """Simulated time of a visit; None for a device of unknown speed and link."""
        times = [amount / rate for amount, rate in ((flops, self.flops), (bytes_up, self.bandwidth_up),
                                                    (bytes_down, self.bandwidth_down)) if rate is not None]
        return sum(times) if times else None


def device_of(config: RunConfig, client: int, fitting: Fitting = Fitting()) -> Device:
    """Return the device of a client. Ids count participating and unseen clients alike."""
    budgets, sal = config.clients.budgets, config.sal
    common = Device(work=tuple(fitting.work), visit_flops=sal.visit_flops, visit_seconds=sal.visit_seconds)
    if not budgets:
        return common
    number = _class_of(config, client)
    tier, load = budgets[number], config.clients.load
    depths = [depth for depth in (tier.max_depth, *fitting.depths[number:number + 1]) if depth is not None]
    deviations = torch.randn(2, generator=generator(config.run.seed, "devices", client)).tolist()
    speed, link = (math.exp(config.clients.spread * deviation) for deviation in deviations)
    return replace(common, max_depth=min(depths, default=None), max_rank=tier.rank, flops=tier.flops and tier.flops * speed,
                   bandwidth_up=tier.bandwidth_up and tier.bandwidth_up * link,
                   bandwidth_down=tier.bandwidth_down and tier.bandwidth_down * link, load=load,
                   seed=derive_seed(config.run.seed, "load", client) if load else None, keeps_ahead=tier.memory is None)


def _class_of(config: RunConfig, client: int) -> int:
    """Return the class of a client. Classes are spread over the clients by their shares."""
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
