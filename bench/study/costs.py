"""Methods at the same operations and at the same bytes, from what the records of the study have of each round."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from bench.study.findings import StudyRecord, table
from fedms.config import registry

EXPLAINED = """\
Equal rounds cost different numbers of operations and bytes. Here each run is read at its last round that keeps within what the cheapest
method spends in the same seed on the whole run, in operations or in bytes that all clients send and receive. Accuracies are of the
clients' validation samples, since test samples are used once, at the end. They are of what a client has at that time: its own expert
or mixture where the method has one already, else the model that it received, which is the model after the round before. So
compare them with the columns of whole runs: methods that keep the best epoch by validation look better there than they test.
`fedavg_prior` is left out, since it adds its prior at the end only.
"""
_WITHOUT = ("fedavg_prior",)
_Lines = Sequence[Mapping[str, Any]]


def costs_part(done: Sequence[StudyRecord]) -> list[str]:
    """Return the part of the page with a table for each setting whose records have the costs of their rounds."""
    parts = []
    for setting in dict.fromkeys(run.setting for run, _ in done):
        lines = [line for run, line in done if run.setting == setting and run.id in registry.methods()]
        if lines and all(line.get("round_flops") for line in lines):
            parts += [f"**{setting.title}**", _setting_table([line for line in lines if line["id"] not in _WITHOUT])]
        elif lines:
            parts.append(f"**{setting.title}**: its records do not have the costs of single rounds.")
    return ["## Equal operations, equal bytes", EXPLAINED, *parts] if any("|" in part for part in parts) else []


def within_cost(line: Mapping[str, Any], cost: str, budget: float) -> tuple[int, float] | None:
    """Return the last round of a run that keeps within a budget, from 1, and the validation accuracy in it; None if no round does.

    Args:
        line: A record of the study.
        cost: `round_flops` or `round_bytes`.
        budget: The most that all rounds up to it may cost together.
    """
    rounds = sum(total <= budget for total in accumulate(line[cost]))
    return (rounds, line["validation"][rounds - 1]) if rounds else None


def _setting_table(lines: _Lines) -> str:
    rows = []
    for method in dict.fromkeys(line["id"] for line in lines):
        own = [line for line in lines if line["id"] == method]
        cells = [method, f"{100 * _mean(line['personalized_accuracy']['mean'] for line in own):.1f}",
                 f"{100 * _mean(line['validation'][-1] for line in own):.1f}",
                 *(f"{_mean(sum(line[cost]) for line in own) / unit:.3g}" for cost, unit in (("round_flops", 1e12), ("round_bytes", 1e6)))]
        for cost in ("round_flops", "round_bytes"):
            found = [within_cost(line, cost, _budget(lines, line["seed"], cost)) for line in own if sum(line[cost])]
            known = [each for each in found if each is not None]
            cells += ([f"{_mean(each[0] for each in known):.1f}", f"{100 * _mean(each[1] for each in known):.1f}"]
                      if known and len(known) == len(own) else ["–", "–"])
        rows.append(cells)
    return table(["method", "whole run: test %", "validation %", "TFLOP", "MB", "at equal operations: round", "validation %",
                  "at equal bytes: round", "validation %"], rows)


def _budget(lines: _Lines, seed: int, cost: str) -> float:
    """Return what the cheapest of the methods that spend anything spends on a whole run of a seed."""
    return min(total for line in lines if line["seed"] == seed and (total := sum(line[cost])))


def _mean(values: Any) -> float:
    return statistics.fmean(values)
