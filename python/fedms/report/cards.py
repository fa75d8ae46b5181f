"""The figures at the top of the page: three large ones about the outcome, the costs small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from fedms.report.formats import duration, is_zero, percent, signed, size
from fedms.report.numbers import Stat, field_of
from fedms.storage.records import RunRecords

LARGE = 3


@dataclass(frozen=True)
class Card:
    """A figure at the top of the page.

    Attributes:
        name: What it is.
        value: The figure.
        beside: What it is to be seen beside, such as the same figure of the best other method; may be empty.
    """

    name: str
    value: str
    beside: str = ""


def outcome_cards(focus: str, rows: Sequence[dict[str, Any]]) -> list[Card]:
    """Return the figures that say how good the method in focus is, the first ones of those that are known.

    Args:
        focus: The method.
        rows: What :func:`fedms.report.numbers.comparison` returned.
    """
    own = next(row for row in rows if row["method"] == focus)
    others = [row for row in rows if row["method"] != focus]

    def share(name: str, key: str, higher: bool = True) -> Optional[Card]:
        if not (stat := own.get(key)):
            return None
        known = [(row[key].mean, row["method"]) for row in others if row.get(key)]
        if not known:
            return Card(name, f"{percent(stat)} %")
        best, method = (max if higher else min)(known, key=lambda each: each[0])
        gap = stat.mean - best
        beside = "level with" if is_zero(gap) else f"{signed(gap)} points from"
        return Card(name, f"{percent(stat)} %", f"{beside} {method}, the best other")

    def perplexity() -> Optional[Card]:
        if not (stat := own.get("perplexity")):
            return None
        known = [(row["perplexity"].mean, row["method"]) for row in others if row.get("perplexity")]
        least, method = min(known, default=(0.0, ""))
        beside = f"{least:.2f} before training" if method == "zero-shot" else f"{method} has {least:.2f}, the best other"
        return Card("perplexity", f"{stat.mean:.2f}", beside if known else "")

    if language := perplexity():
        found = [language, _better_off_alone(own), share("tokens held to be the most probable ones", "personalized")]
    else:
        found = [share("mean accuracy of clients", "personalized"), share("accuracy of the worst 10 % of clients", "worst10"),
                 _better_off_alone(own), share("global test", "global_test"), share("clients that did not train", "unseen"),
                 share("macro F1", "macro_f1")]
    return [card for card in found if card][:LARGE]


def _better_off_alone(own: dict[str, Any]) -> Optional[Card]:
    if not (stat := own.get("below_local")):
        return None
    return Card("clients better off training alone", f"{percent(stat, 0)} %", "compared with the runs of local")


def cost_cards(runs: Sequence[RunRecords]) -> list[Card]:
    """Return what the runs of one method cost, means over seeds."""
    ended = [r for r in runs if r.summary]

    def card(name: str, show: Callable[[float], str], key: str) -> Optional[Card]:
        stat = Stat.of(field_of(r.summary, key) for r in ended)
        return Card(name, show(stat.mean)) if stat else None

    found = (card("parameters trained", lambda v: f"{v:.2f} %", "trainable_percent"), card("sent by clients", size, "bytes_up"),
             card("operations", lambda v: f"{v / 1e12:.3g} TFLOP", "flops"), card("time", duration, "seconds"),
             card("time on the clients' devices, simulated", duration, "simulated_seconds"),
             card("peak memory of the process", size, "peak_memory_bytes"))
    return [each for each in found if each]
