"""How much privacy the releases of a run have cost, by Google's `dp-accounting`.

Neighboring data sets differ in one client: all that it sends is replaced by zeros. A release is one noised sum; its noise
multiplier z is the noise's standard deviation divided by the largest norm of one client's part. The discrete Gaussian
costs what the continuous one costs: exactly so for the accountant `rdp`, and for `pld` up to terms far below the 15 digits of a
float, as the noise spans thousands of integers (Canonne et al., arXiv 2004.00010; Kairouz et al., arXiv 2102.06387).
"""
from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import dp_accounting as dp
from scipy.optimize import brentq

ACCOUNTANTS = ("pld", "rdp")


def combined(*multipliers: float | None) -> float:
    """Return the noise multiplier of one release of several sums, each with its own noise; None marks a sum that is not released.

    The cost of a Gaussian mechanism with multiplier z is proportional to 1 / z^2, and costs add up. The result is infinity if
    nothing is released.
    """
    cost = sum(z**-2 for z in multipliers if z is not None)
    return cost**-0.5 if cost else math.inf


def epsilon_of(multipliers: Iterable[float], delta: float, accountant: str = "pld", rate: float | None = None) -> float:
    """Return the epsilon that releases with these noise multipliers have cost; 0 without releases.

    Args:
        multipliers: One for each release, above 0; infinity for a release that costs nothing.
        delta: The delta of (epsilon, delta) differential privacy.
        accountant: "pld" (privacy loss distributions: tight) or "rdp" (Renyi differential privacy).
        rate: The probability with which each client took part in a release, independently and secretly (Poisson sampling), or
            None if all clients count as taking part in every release.
    """
    finite = [z for z in multipliers if math.isfinite(z)]
    if not finite:
        return 0.0
    if rate is None and accountant == "pld":
        return float(dp.get_epsilon_gaussian(combined(*finite), delta))     # the exact value, in no time
    with _quiet():
        ledger = dp.pld.PLDAccountant() if accountant == "pld" else dp.rdp.RdpAccountant()
        for z, count in sorted(Counter(finite).items()):
            event: dp.DpEvent = dp.GaussianDpEvent(z)
            ledger.compose(event if rate is None else dp.PoissonSampledDpEvent(rate, event), count)
        return float(ledger.get_epsilon(delta))


def multiplier_for(epsilon: float, others: Sequence[Sequence[float | None]], delta: float, accountant: str = "pld",
                   rate: float | None = None, beside: Sequence[float] = ()) -> float:
    """Return the least noise multiplier of the updates with which a planned run stays within an epsilon.

    Args:
        epsilon: The budget, above 0.
        others: For each planned release of an update, at least one, the given noise multipliers of what is released with it.
        delta, accountant, rate: See `epsilon_of`.
        beside: The given noise multipliers of planned releases without an update.

    Returns:
        The multiplier, rounded up to six digits, so that the budget holds.

    Raises:
        ValueError: If what is released beside the updates uses up the budget alone.
    """
    def cost(z: float) -> float:
        return epsilon_of([*beside, *(combined(z, *other) for other in others)], delta, accountant, rate)

    alone = cost(math.inf)
    if alone >= epsilon:
        raise ValueError(f"what is released beside the updates costs epsilon = {alone:.4g} alone, and the budget is {epsilon:g}")
    def excess(logarithm: float) -> float:
        return math.log(max(cost(math.exp(logarithm)), 1e-9) / epsilon)

    low, high = 0.0, 0.0
    while excess(high) > 0:
        low, high = high, high + 1
    while excess(low) < 0:
        low, high = low - 1, low
    multiplier = math.exp(brentq(excess, low, high, xtol=1e-7))
    while cost(rounded := float(f"{multiplier:.6g}")) > epsilon:        # the root is found from either side
        multiplier *= 1 + 2e-6
    return rounded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's warnings about orders that it leaves out, which only make its bound less tight."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
