"""Fair timing on a noisy machine: candidates take turns in one process, and only their ratios are to be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20th and 80th percentile over the turns."""

    median: float
    p20: float
    p80: float


def interleaved(
    candidates: dict[str, Callable[[], object]], turns: int = 31, seconds_per_turn: float = 2e-3
) -> dict[str, np.ndarray]:
    """Seconds a call of every candidate at every turn. A turn calls each in sequence, often enough to be measurable."""
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds_per_turn / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(values) for name, values in seconds.items()}


def summarise(seconds: np.ndarray) -> Timing:
    return Timing(float(np.median(seconds)), float(np.percentile(seconds, 20)), float(np.percentile(seconds, 80)))


def ratio(seconds: np.ndarray, base: np.ndarray) -> float:
    """The median over the turns of `seconds` over `base`: above 1 is slower than the base."""
    return float(np.median(seconds / base))
