"""Fair timing on a noisy machine: candidates take turns in one process, and only their ratios are to be trusted.

On a machine that others use too, set OMP_NUM_THREADS=1: with one thread its own CPU time is measured, which does not
count the time that others take. Several threads wait for one another, and then only the clock on the wall will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile over the turns: of seconds a call, or of a ratio."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p20:.2f}-{self.p80:.2f})"


def interleaved(
    candidates: dict[str, Callable[[], object]],
    seconds: float = 2.0,
    least_turns: int = 7,
    seconds_per_turn: float = 2e-3,
) -> dict[str, np.ndarray]:
    """Seconds a call of every candidate at every turn. A turn calls each in sequence, often enough to be measurable.

    Turns are taken for so many `seconds`, but at least `least_turns` and at most 101 of them.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, call in candidates.items():
        start = clock()
        call()
        once = clock() - start
        # What takes long need not be repeated, however warm. Of the rest one slow call would say that one a turn is enough.
        for _ in range(5 if once < 50 * seconds_per_turn else 0):
            start = clock()
            call()
            once = min(once, clock() - start)
        repeats[name] = max(1, round(seconds_per_turn / max(once, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for turn in range(101):
        if turn >= least_turns and time.perf_counter() > end:
            break
        for name, call in candidates.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            taken[name].append((clock() - start) / repeats[name])
    return {name: np.array(values) for name, values in taken.items()}


def summarize(values: np.ndarray) -> Spread:
    return Spread(float(np.median(values)), float(np.percentile(values, 20)), float(np.percentile(values, 80)))


def ratio(seconds: np.ndarray, base: np.ndarray) -> Spread:
    """Of `seconds` over `base`, turn by turn: above 1 is slower than the base."""
    return summarize(seconds / base)
