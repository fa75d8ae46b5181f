"""Tests of difference between methods, paired over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedms.report.numbers import by_method, field_of, focus_method, participants
from fedms.storage.records import RunRecords


@dataclass(frozen=True)
class Difference:
    """The focus method minus another: mean gap of the personalized accuracy over clients that both have, how many are
    better and worse off, the p-value of Wilcoxon's signed-rank test, and the one corrected for all comparisons."""

    against: str
    gap: float
    pairs: int
    better: int
    worse: int
    p: float
    corrected: float


def differences(runs: Sequence[RunRecords]) -> list[Difference]:
    """The focus method against every other, in the order of the methods; empty where there is nothing to pair.

    A pair is one client of one seed. Seeds draw clients anew from the same data, so pairs of different seeds are not
    quite independent, and p-values a little too small.
    """
    from scipy.stats import wilcoxon

    groups = by_method([run for run in runs if run.summary])
    if len(groups) < 2:
        return []
    focus = focus_method(groups)
    own = _accuracies(groups[focus])
    found = []
    for method, group in groups.items():
        theirs = _accuracies(group)
        gaps = [own[pair] - theirs[pair] for pair in sorted(own.keys() & theirs.keys())]
        if method != focus and gaps:
            p = float(wilcoxon(gaps, zero_method="zsplit").pvalue) if any(gaps) else 1.0
            found.append((method, gaps, p))
    corrected = holm([p for _, _, p in found])
    return [Difference(method, sum(gaps) / len(gaps), len(gaps), sum(g > 0 for g in gaps), sum(g < 0 for g in gaps), p, c)
            for (method, gaps, p), c in zip(found, corrected)]


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the i-th smallest times the number of those not smaller, never
    below the one before. SciPy has no such correction, and statsmodels would be needed for these lines alone."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def _accuracies(runs: Sequence[RunRecords]) -> dict[tuple[int, int], float]:
    return {(run.seed, client["id"]): accuracy for run in runs for client in participants(run)
            if (accuracy := field_of(client, "accuracy", "personalized")) is not None}
