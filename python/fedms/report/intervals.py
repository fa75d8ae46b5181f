"""Intervals and ranks over seeds: what a comparison of methods shows.

Clients of one seed share the global expert, the gate and the partition, so they are not independent; seeds are. A difference is
averaged over the clients of a seed first, and its interval is that of the seeds' means.
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean difference of two methods, clustered by seed.

    Attributes:
        mean: Mean over the seeds' mean differences.
        half: Half the width of its 95 % interval (Student's t); infinite for a single seed.
        seeds: Number of seeds.
    """

    mean: float
    half: float
    seeds: int

    @property
    def shows(self) -> str:
        """The verdict in words."""
        if math.isinf(self.half):
            return "one seed"
        return "no difference shown" if abs(self.mean) <= self.half else "better" if self.mean > 0 else "worse"


def half_width(deviation: float | None, seeds: int) -> float:
    """Return half the width of the 95 % interval of a mean (Student's t); infinite for a single value.

    Args:
        deviation: Sample standard deviation of the values, or None for a single one.
        seeds: Their number.
    """
    if deviation is None or seeds < 2:
        return math.inf
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, seeds - 1)) * deviation / math.sqrt(seeds)


def by_seed(gaps: Mapping[tuple[int, int], float]) -> Interval | None:
    """Return the interval of differences.

    Args:
        gaps: Difference by (seed, client).

    Returns:
        None where there are none.
    """
    seeds: dict[int, list[float]] = {}
    for (seed, _), gap in gaps.items():
        seeds.setdefault(seed, []).append(gap)
    if not seeds:
        return None
    means = [statistics.fmean(each) for each in seeds.values()]
    deviation = statistics.stdev(means) if len(means) > 1 else None
    return Interval(statistics.fmean(means), half_width(deviation, len(means)), len(means))


@dataclass(frozen=True)
class Ranks:
    """Average ranks of methods over blocks, 1 being best (Demsar, JMLR 7, 2006).

    Attributes:
        mean: Average rank by method, the best one first.
        critical: Nemenyi's critical difference: methods whose ranks are closer are not shown to differ.
        p: p-value of Friedman's test that all methods are alike.
        blocks: Number of blocks, such as settings and seeds.
    """

    mean: Mapping[str, float]
    critical: float
    p: float
    blocks: int

    def alike(self, method: str) -> Collection[str]:
        """Return the other methods that are not shown to differ from this one."""
        return [other for other, rank in self.mean.items()
                if other != method and abs(rank - self.mean[method]) <= self.critical]


def average_ranks(blocks: Sequence[Mapping[str, float]]) -> Ranks | None:
    """Rank methods in each block by their scores, higher being better, ties sharing a rank.

    Args:
        blocks: Score by method. Methods that a block lacks are left out of all.

    Returns:
        None for fewer than two blocks, or fewer than three methods that all of them have.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    methods = [name for name in blocks[0] if all(name in block for block in blocks)] if blocks else []
    if len(blocks) < 2 or len(methods) < 3:
        return None
    ranks = [rankdata([-block[name] for name in methods]) for block in blocks]
    mean = {name: float(statistics.fmean(rank[i] for rank in ranks)) for i, name in enumerate(methods)}
    k = len(methods)
    critical = float(studentized_range.ppf(LEVEL, k, math.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * len(blocks)))
    p = float(friedmanchisquare(*([block[name] for block in blocks] for name in methods)).pvalue)
    return Ranks(dict(sorted(mean.items(), key=lambda item: item[1])), critical, p, len(blocks))
