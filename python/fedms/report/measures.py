"""What a report compares methods and clients by: language models by their perplexity, other models by their accuracy.

Both compare numbers of which the larger is the better, see :func:`fedms.report.numbers.merit`, and differ in how these are written
and drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

from fedms.progress import LARGEST_NATS, perplexity
from fedms.report import formats
from fedms.report.intervals import Interval
from fedms.report.numbers import Stat, field_of, merits, worst_tenth
from fedms.storage.records import RunRecords


class Accuracy:
    """Compares by the accuracy on clients' own test samples. Differences are in points.

    Attributes:
        title: What it is called above a table or beside an axis.
        validation: The field of a round that it is followed by.
        validation_title: What that is called beside an axis.
        percent: Whether charts show it in percent.
        unit: How the sentence begins that says how far methods are apart.
        best: A sentence's part with the best method's value.
        worst_clients: The same with the value of the worst 10 % of clients.
        column: Title of a column of differences.
        against: What a chart of differences to a method says of its axis.
        personalized: What the column "personalized" of a table means.
        below: What a client that is better off alone does.
    """

    title = "test accuracy (%)"
    validation = "validation_accuracy"
    validation_title = "validation accuracy (%)"
    percent = True
    unit = "In points"
    best = "clients answer {} of their own test data right on average"
    worst_clients = "scores {}"
    column = "points"
    against = "points ahead of {} (right of 0) or behind it (left)"
    personalized = "mean test accuracy over clients, each on its own test split"
    below = "whose accuracy is lower than in the run of local"
    signed = staticmethod(formats.signed)
    size = staticmethod(formats.points)
    interval = staticmethod(formats.interval)

    @staticmethod
    def of(run: RunRecords) -> Optional[float]:
        """Return the number that decides, the larger the better; None if the run has none."""
        return field_of(run.summary, "personalized_accuracy", "mean")

    @staticmethod
    def of_worst(run: RunRecords) -> Optional[float]:
        """Return that number of the worst 10 % of clients, or None."""
        return field_of(run.summary, "personalized_accuracy", "worst10")

    @staticmethod
    def value(stat: Stat) -> str:
        """Return a method's value as words have it."""
        return f"{formats.percent(stat)} %"

    @staticmethod
    def number(merit: Optional[float]) -> str:
        """Return a value without its unit, as tables and charts have it; a dash for None."""
        return formats.percent(merit)

    @staticmethod
    def shown(merit: float) -> float:
        """Return where a value lies on the axis of a chart."""
        return merit

    @staticmethod
    def lead(gap: float) -> float:
        """Return where another method lies on the axis of a chart, of which the one in focus is ahead by so much."""
        return -100 * gap

    @staticmethod
    def apart(focus: str, rival: str, gap: Stat) -> str:
        """Return how far two methods are apart, as the beginning of a sentence: names, difference over seeds, its interval."""
        return (f"{focus} is {formats.points(gap.mean)} {'ahead of' if gap.mean > 0 else 'behind'} {rival} "
                f"({formats.ends(gap.interval)})")

    @staticmethod
    def beside(gap: float, other: str) -> str:
        """Return where a method is beside another one from which it differs by so much."""
        return f"{formats.points(gap)} {'above' if gap > 0 else 'below'} {other}"

    @staticmethod
    def before(runs: Sequence[RunRecords]) -> str:
        """Return a sentence about the model before training; empty here, since tables show it."""
        return ""


class Perplexity(Accuracy):
    """Compares language models by the perplexity of their clients' own test answers. Differences are in percent of perplexity.

    The number x that decides is the mean log-likelihood of a token, so the larger is the better here, too. The perplexity is
    exp(-x).
    """

    title = "perplexity (lower is better)"
    validation = "validation_loss"      # its logarithm: means over seeds are taken of it
    validation_title = "validation loss (nats a token)"
    percent = False
    unit = "In perplexity"
    best = "the answers in clients' own test data have a perplexity of {}"
    worst_clients = "has a perplexity of {}"
    column = "perplexity"
    against = "perplexity above that of {} (right of 0) or below it (left), in %"
    personalized = ("share of the tokens of test answers that the model holds to be the most probable ones, mean over clients; what counts "
                    "is the perplexity")
    below = "whose perplexity is higher than in the run of local"

    @staticmethod
    def of(run: RunRecords) -> Optional[float]:
        """Return the mean log-likelihood of a token, minus the nats; None if the run has none."""
        nats = field_of(run.summary, "language", "nats")
        return None if nats is None else -nats

    @staticmethod
    def of_worst(run: RunRecords) -> Optional[float]:
        """Return that of the worst 10 % of clients, or None."""
        values = merits(run, "personalized")
        return worst_tenth(values) if values else None

    @classmethod
    def value(cls, stat: Stat) -> str:
        """Return the perplexity of a mean over seeds."""
        return cls.number(stat.mean)

    @classmethod
    def number(cls, merit: Optional[float]) -> str:
        """Return the perplexity of a log-likelihood, as tables have it; a dash for None."""
        return "–" if merit is None else f"{cls.shown(merit):.1f}"

    @staticmethod
    def shown(merit: float) -> float:
        """Return the perplexity of a log-likelihood."""
        return perplexity(-merit)

    @staticmethod
    def lead(gap: float) -> float:
        """Return by how many percent another perplexity is higher than the one in focus, which is ahead by `gap` nats."""
        return 100 * math.expm1(min(gap, LARGEST_NATS))

    @classmethod
    def signed(cls, gap: float) -> str:
        """Return the change of the perplexity in percent, with its sign, of a method that is ahead by `gap` nats."""
        return f"{cls.lead(-gap):+.1f} %".replace("-", "−")

    @classmethod
    def size(cls, gap: float) -> str:
        """Return the size of that change."""
        return cls.signed(-abs(gap)).lstrip("+")

    @classmethod
    def interval(cls, found: Interval) -> str:
        """Return the ends of an interval in percent, the least perplexity first; a dash where there is no interval."""
        return "–" if math.isinf(found.half) else " to ".join(cls.signed(found.mean + side * found.half) for side in (1, -1))

    @classmethod
    def apart(cls, focus: str, rival: str, gap: Stat) -> str:
        """Return how far the perplexities of two methods are apart, as the beginning of a sentence."""
        return (f"The perplexity of {focus} is {cls.beside(gap.mean, f'that of {rival}')} "
                f"(95 % interval {cls.interval(gap.interval)} over {gap.n} seeds)")

    @classmethod
    def beside(cls, gap: float, other: str) -> str:
        """Return where a perplexity is beside another one, in percent of that."""
        return f"{cls.signed(gap).lstrip('+−')} {'below' if gap > 0 else 'above'} {other}"

    @staticmethod
    def before(runs: Sequence[RunRecords]) -> str:
        """Return a sentence about the perplexity before training; empty where it is unknown."""
        nats = Stat.of(field_of(r.summary, "language", "nats_zero_shot") for r in runs)
        return f" Before training it is {Perplexity.number(-nats.mean)}." if nats else ""


Measure = type[Accuracy]


def measure_of(runs: Sequence[RunRecords]) -> Measure:
    """Return what runs are compared by: the perplexity if all of them have one, or will have one when they end."""
    perplexities = [Perplexity.of(run) is not None if run.summary else field_of(run.config, "task", "kind") == "causal_lm" for run in runs]
    return Perplexity if runs and all(perplexities) else Accuracy
