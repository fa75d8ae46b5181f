"""Tests of difference between methods, paired over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedms.report.intervals import Interval, by_seed
from fedms.report.numbers import by_method, focus_method, merit, participants
from fedms.storage.records import RunRecords


@dataclass(frozen=True)
class Difference:
    """The comparison of the method in focus with another one, whose values are subtracted (see :func:`fedms.report.numbers.merit`).

    Attributes:
        against: The other method.
        pairs: Number of pairs of a client and a seed that both have.
        gap: Mean difference.
        better: Number of pairs that are better off.
        worse: Number of pairs that are worse off.
        p: p-value of Wilcoxon's signed-rank test.
        corrected: The p-value, corrected for all comparisons by Holm's method.
        interval: The 95 % interval of the mean difference, by seed.
    """

    against: str
    gap: float
    pairs: int
    better: int
    worse: int
    p: float
    corrected: float
    interval: Interval


def differences(runs: Sequence[RunRecords]) -> list[Difference]:
    """Compare the method in focus with every other, in the order of the methods.

    A pair is one client of one seed. Clients of one seed share an expert and a partition, so p-values over pairs are too small;
    what counts is the interval, which takes seeds as independent and not clients.

    Returns:
        The comparisons; none where there is nothing to pair.
    """
    from scipy.stats import wilcoxon

    groups = by_method([run for run in runs if run.summary])
    if len(groups) < 2:
        return []
    focus = focus_method(groups)
    own = _merits(groups[focus])
    found = []
    for method, group in groups.items():
        theirs = _merits(group)
        paired = {pair: own[pair] - theirs[pair] for pair in sorted(own.keys() & theirs.keys())}
        interval, gaps = by_seed(paired), list(paired.values())
        if method != focus and interval is not None:
            p = float(wilcoxon(gaps, zero_method="zsplit").pvalue) if any(gaps) else 1.0
            found.append((method, gaps, p, interval))
    corrected = holm([p for _, _, p, _ in found])
    return [Difference(method, sum(gaps) / len(gaps), len(gaps), sum(g > 0 for g in gaps), sum(g < 0 for g in gaps), p, c, interval)
            for (method, gaps, p, interval), c in zip(found, corrected)]


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method (Scandinavian Journal of Statistics 6, 1979).

    The i-th smallest is multiplied by the number of those that are not smaller, and is never below the one before it. SciPy has
    no such correction.
    """
    corrected, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def _merits(runs: Sequence[RunRecords]) -> dict[tuple[int, int], float]:
    return {(run.seed, client["id"]): value for run in runs for client in participants(run) if (value := merit(client)) is not None}
