"""The outcome in a few sentences, the verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

from fedms.report.formats import is_zero, percent
from fedms.report.measures import Accuracy, Measure, Perplexity, measure_of
from fedms.report.numbers import Stat, by_method, client_gap, field_of, focus_method, paired_gap
from fedms.storage.records import RunRecords

ONE_SEED = "One seed: a difference of a few points may be chance."


def headline(runs: Sequence[RunRecords]) -> str:
    """Return the outcome in a few sentences.

    The first says which method is best, where the method in focus stands, and whether a difference between them is shown; the
    second, how much lies between them. The last says how far the other methods are apart. Language models are compared by their
    perplexity, other models by their accuracy.
    """
    ended = [r for r in runs if r.summary]
    measure = measure_of(ended)
    methods = by_method(ended)
    found = {m: Stat.of(map(measure.of, group)) for m, group in methods.items()}
    scores = {m: stat for m, stat in found.items() if stat}
    if not scores:
        shared = Stat.of(field_of(r.summary, "global_test_accuracy") for r in ended)
        if shared is None:
            return "No run here has ended, so there is no outcome yet."
        return (f"The shared expert reaches {percent(shared)} % on the common test set. The clients' accuracies were not released: "
                "privacy.score_noise was off.")
    focus = focus_method(scores)
    if len(scores) == 1:
        return _alone(measure, focus, methods[focus])
    gaps = {m: paired_gap(methods[focus], methods[m], measure.of) or Stat(scores[focus].mean - scores[m].mean, None)
            for m in scores if m != focus}      # without a spread if they have no seed in common
    one_seed = " " + ONE_SEED if any(gap.std is None for gap in gaps.values()) else ""
    return (f"{_verdict(measure, focus, scores, gaps)}{measure.before(methods[focus])} {measure.unit}, {focus} is {_groups(measure, gaps)}."
            f"{one_seed}")


def _verdict(measure: Measure, focus: str, scores: Mapping[str, Stat], gaps: Mapping[str, Stat]) -> str:
    """Return who is best, where the method in focus stands, and whether the gap between it and the best other is shown."""
    own, rival = scores[focus], max(gaps, key=lambda m: scores[m].mean)
    other, gap = scores[rival], gaps[rival]
    best = measure.best.format(measure.value(max(own, other, key=lambda each: each.mean)))
    if own.mean == other.mean:
        return f"{focus} and {rival} are level and best of {len(scores)} methods: {best}."
    first, second = (focus, rival) if own.mean > other.mean else (rival, focus)
    place = _ordinal(1 + sum(each.mean > scores[second].mean for each in scores.values()))
    outcome = f"{first}, best of {len(scores)} methods, {best}; {second} is {place} with {measure.value(scores[second])}"
    if gap.std is None:
        return f"With {outcome}, {measure.size(gap.mean)} behind, which may be chance."
    apart = measure.apart(focus, rival, gap)
    return f"No difference shown: with {outcome}. {apart}." if gap.may_be_zero else f"With {outcome}, more than chance explains. {apart}."


def _alone(measure: Measure, focus: str, runs: Sequence[RunRecords]) -> str:
    """Return the outcome of runs of a single method."""
    own = percent(Stat.of(map(Accuracy.of, runs)))
    perplexity = Stat.of(map(Perplexity.of, runs)) if measure is Perplexity else None
    reached = f"a perplexity of {Perplexity.value(perplexity)}" if perplexity else f"{own} % mean personalized accuracy"
    gaps = {label: Stat.of(client_gap(r, "personalized", name) for r in runs)
            for name, label in (("zero_shot", "zero-shot"), ("global", "its own global expert"))}
    parts = [measure.beside(gap.mean, label) for label, gap in gaps.items() if gap and not is_zero(gap.mean)]
    text = f"{focus} reaches {reached}" + (", " + _listing(parts) if parts else "")
    return (text + (f"; {own} % of the tokens are the most probable ones" if perplexity else "") + "."
            + (" " + ONE_SEED if len(runs) == 1 else ""))


def _groups(measure: Measure, gaps: Mapping[str, Stat]) -> str:
    """Return the methods that the one in focus is behind, not clearly apart from, level with, and ahead of."""
    groups: dict[str, list[str]] = {"behind ": [], "not clearly apart from ": [], "level with ": [], "ahead of ": []}
    for m in sorted(gaps, key=lambda m: gaps[m].mean):
        gap = gaps[m]
        if gap.may_be_zero:
            groups["not clearly apart from "].append(f"{m} ({measure.signed(gap.mean)} ± {100 * (gap.std or 0):.1f})")
        elif is_zero(gap.mean):
            groups["level with "].append(m)
        else:
            groups["ahead of " if gap.mean > 0 else "behind "].append(f"{m} ({measure.signed(gap.mean)})")
    return "; ".join(words + _listing(_first(each, 2)) for words, each in groups.items() if each)


def _first(items: Sequence[str], count: int) -> list[str]:
    """Return the first items, and how many more there are; all of them where only one would be left out."""
    return list(items) if len(items) <= count + 1 else [*items[:count], f"{len(items) - count} more"]


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
