"""What a run with differential privacy would cost in noise, before it is run."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedms.privacy.accounting import multiplier_for


@dataclass(frozen=True)
class PrivacyPlan:
    """The noise of a planned run.

    Attributes:
        epsilon, delta: The guarantee.
        rounds: Number of releases.
        clients: Expected number of clients in a round.
        parameters: Number of values in a client's update.
        multiplier: The noise multiplier z of the updates.
    """

    epsilon: float
    delta: float
    rounds: int
    clients: float
    parameters: int
    multiplier: float

    @property
    def noise_to_clip(self) -> float:
        """Expected norm of the noise in the mean update, as a multiple of the clip C: z sqrt(d) / m.

        No client's update is longer than C, so above 1 the noise is longer than the mean can be.
        """
        return self.multiplier * math.sqrt(self.parameters) / self.clients

    @property
    def clients_needed(self) -> int:
        """The least number of clients in a round for which the noise is at most as long as the clip."""
        return math.ceil(self.multiplier * math.sqrt(self.parameters))

    @property
    def verdict(self) -> str:
        """What utility to expect, in a sentence."""
        if self.noise_to_clip > 1:
            return (f"the noise is {self.noise_to_clip:.3g} times as long as the longest mean update, so expect little to be "
                    f"learned; {self.clients_needed} clients a round would bring it to 1")
        return (f"the noise is {self.noise_to_clip:.3g} times as long as the longest mean update; at a tenth or less, expect "
                "nearly the accuracy of a run without noise")


def plan(epsilon: float, delta: float, accountant: str, others: Sequence[Sequence[float | None]], clients: float,
         parameters: int, rate: float | None = None, beside: Sequence[float] = ()) -> PrivacyPlan:
    """Plan the noise with which a run stays within an epsilon.

    Args:
        epsilon, delta, accountant, others, rate, beside: See `fedms.privacy.accounting.multiplier_for`.
        clients: Expected number of clients in a round.
        parameters: Number of values in a client's update.

    Raises:
        ValueError: If no noise suffices.
    """
    multiplier = multiplier_for(epsilon, others, delta, accountant, rate, beside)
    return PrivacyPlan(epsilon, delta, len(others), clients, parameters, multiplier)
