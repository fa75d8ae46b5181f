"""The outcome in a few sentences, the verdict first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Optional

from fedms.report.numbers import Stat, by_method, client_gap, field_of, focus_method, paired_gap
from fedms.report.wording import ends, is_zero, percent, points, signed
from fedms.storage.records import RunRecords

ONE_SEED = "One seed: a difference of a few points may be chance."

_Methods = Mapping[str, Sequence[RunRecords]]


class _Accuracy:
    """Compares methods by the mean accuracy of clients on their own test samples. Differences are in points.

    Attributes:
        unit: How the sentence begins that says how far methods are apart.
        best: A sentence's part with the best method's value.
    """

    unit = "In points"
    best = "clients answer {} of their own test data right on average"
    signed = staticmethod(signed)
    size = staticmethod(points)

    @staticmethod
    def of(run: RunRecords) -> Optional[float]:
        """Return the number that decides, the larger the better; None if the run has none."""
        return field_of(run.summary, "personalized_accuracy", "mean")

    @staticmethod
    def value(stat: Stat) -> str:
        return f"{percent(stat)} %"

    @staticmethod
    def apart(focus: str, rival: str, gap: Stat) -> str:
        return f"{focus} is {points(gap.mean)} {'ahead of' if gap.mean > 0 else 'behind'} {rival} ({ends(gap.interval)})"

    @staticmethod
    def before(runs: Sequence[RunRecords]) -> str:
        """Return a sentence about the model before training; empty here, since tables show it."""
        return ""


class _Perplexity(_Accuracy):
    """Compares language models by the perplexity of their clients' own test answers. Differences are in percent of perplexity.

    The number x that decides is the mean log-likelihood of a token, so the larger is the better here, too. The perplexity is
    exp(-x).
    """

    unit = "In perplexity"
    best = "the answers in clients' own test data have a perplexity of {}"

    @staticmethod
    def of(run: RunRecords) -> Optional[float]:
        nats = field_of(run.summary, "language", "nats")
        return None if nats is None else -nats

    @staticmethod
    def value(stat: Stat) -> str:
        return f"{math.exp(-stat.mean):.1f}"

    @staticmethod
    def signed(gap: float) -> str:
        return f"{100 * math.expm1(-gap):+.1f} %".replace("-", "−")

    @classmethod
    def size(cls, gap: float) -> str:
        return cls.signed(-abs(gap)).lstrip("+")

    @classmethod
    def apart(cls, focus: str, rival: str, gap: Stat) -> str:
        low, high = (cls.signed(gap.mean + side * gap.interval.half) for side in (1, -1))
        size = f"{cls.signed(gap.mean).lstrip('+−')} {'below' if gap.mean > 0 else 'above'}"
        return f"The perplexity of {focus} is {size} that of {rival} (95 % interval {low} to {high} over {gap.n} seeds)"

    @staticmethod
    def before(runs: Sequence[RunRecords]) -> str:
        before = _zero_shot(runs)
        return f" Before training it is {before.mean:.1f}." if before else ""


def headline(runs: Sequence[RunRecords]) -> str:
    """Return the outcome in a few sentences.

    The first says which method is best, where the method in focus stands, and whether a difference between them is shown; the
    second, how much lies between them. The last says how far the other methods are apart. Language models are compared by their
    perplexity, other models by their accuracy.
    """
    ended = [r for r in runs if r.summary]
    measure = _Perplexity if ended and all(_Perplexity.of(r) is not None for r in ended) else _Accuracy
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
        return _alone(focus, methods)
    gaps = {m: paired_gap(methods[focus], methods[m], measure.of) or Stat(scores[focus].mean - scores[m].mean, None)
            for m in scores if m != focus}      # without a spread if they have no seed in common
    one_seed = " " + ONE_SEED if any(gap.std is None for gap in gaps.values()) else ""
    return (f"{_verdict(measure, focus, scores, gaps)}{measure.before(methods[focus])} {measure.unit}, {focus} is {_groups(measure, gaps)}."
            f"{one_seed}")


def _verdict(measure: type[_Accuracy], focus: str, scores: Mapping[str, Stat], gaps: Mapping[str, Stat]) -> str:
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


def _alone(focus: str, methods: _Methods) -> str:
    """Return the outcome of runs of a single method."""
    own = Stat.of(map(_Accuracy.of, methods[focus]))
    text = f"{focus} reaches {percent(own)} % mean personalized accuracy"
    if found := _language(methods[focus]):
        text = f"{focus} reaches {found}; {percent(own)} % of the tokens are the most probable ones"
    gaps = {label: Stat.of(client_gap(r, "personalized", name) for r in methods[focus])
            for name, label in (("zero_shot", "zero-shot"), ("global", "its own global expert"))}
    parts = [f"{points(gap.mean)} {'above' if gap.mean > 0 else 'below'} {label}"
             for label, gap in gaps.items() if gap and not is_zero(gap.mean)]
    return text + (", " + _listing(parts) if parts else "") + "." + (" " + ONE_SEED if len(methods[focus]) == 1 else "")


def _zero_shot(runs: Sequence[RunRecords]) -> Optional[Stat]:
    """Return the perplexity of a language model before training; None for other tasks."""
    return Stat.of(field_of(r.summary, "language", "perplexity_zero_shot") for r in runs)


def _language(runs: Sequence[RunRecords]) -> str:
    """Return the perplexity of a language model, with the one before training; empty for other tasks."""
    perplexity = Stat.of(field_of(r.summary, "language", "perplexity") for r in runs)
    before = _zero_shot(runs)
    if not perplexity:
        return ""
    return f"a perplexity of {perplexity.mean:.1f}" + (f", zero-shot has {before.mean:.1f}" if before else "")


def _groups(measure: type[_Accuracy], gaps: Mapping[str, Stat]) -> str:
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
