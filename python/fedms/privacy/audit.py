"""Attacks on what a run sends, to see whether its privacy holds: a lower bound beside the accountant's upper one.

Distinguishing: an attacker who knows everything but whether one client took part compares what it sees with the client's
vector, many times with and many times without the client. From how often it is right follows an epsilon that the
mechanism cannot be below (Jagielski, Ullman and Oprea, NeurIPS 2020, arXiv 2006.07709; Nasr et al., IEEE S&P 2021, arXiv
2101.04535).

Inversion: the change of a linear layer's weights under one sample is the outer product of the output's gradient and the
sample's input, so its singular vectors point at inputs (Phong et al., IEEE TIFS 2018; Geiping et al., NeurIPS 2020, arXiv
2003.14053). The attacker takes those directions for inputs of the layer and asks which of many samples they fit best.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta


@dataclass(frozen=True)
class Distinguished:
    """How well an attacker can tell whether a client took part.

    Attributes:
        accuracy: Share of right answers at the threshold that is best on the first half of the trials; 0.5 is guessing.
        epsilon: Lower bound of the mechanism's epsilon, with 95 % confidence. The number of trials limits it.
        largest_epsilon: The bound that a perfect attacker would have shown in as many trials.
    """

    accuracy: float
    epsilon: float
    largest_epsilon: float


def distinguish(seen_with: np.ndarray, seen_without: np.ndarray, delta: float, confidence: float = 0.95) -> Distinguished:
    """Judge an attacker by its scores in trials with and without the client; higher scores mean "it took part".

    Args:
        seen_with, seen_without: (n,) scores each. The threshold is chosen on the first half, and everything else is computed from
            the second half, so that the bound is valid.
        delta: The delta of the guarantee that is audited.
        confidence: The confidence of the bound.
    """
    half = len(seen_with) // 2
    choices = np.unique(np.concatenate([seen_with[:half], seen_without[:half]]))
    choices = choices[:: max(1, len(choices) // 500)]
    bounds = [_epsilon(seen_with[:half], seen_without[:half], t, delta, confidence) for t in choices]
    right = [(seen_with[:half] >= t).mean() + (seen_without[:half] < t).mean() for t in choices]
    for_bound, for_accuracy = choices[int(np.argmax(bounds))], choices[int(np.argmax(right))]
    later_with, later_without = seen_with[half:], seen_without[half:]
    accuracy = float((later_with >= for_accuracy).mean() + (later_without < for_accuracy).mean()) / 2
    perfect = _epsilon(np.ones(len(later_with)), np.zeros(len(later_with)), 0.5, delta, confidence)
    return Distinguished(accuracy, _epsilon(later_with, later_without, for_bound, delta, confidence), perfect)


def _epsilon(seen_with: np.ndarray, seen_without: np.ndarray, threshold: float, delta: float, confidence: float) -> float:
    """Return the least epsilon that fits the error rates at a threshold, with a Clopper-Pearson bound of each rate."""
    n, m = len(seen_with), len(seen_without)
    hits, false_alarms = int((seen_with >= threshold).sum()), int((seen_without >= threshold).sum())
    tail = (1 - confidence) / 2
    pairs = ((hits, n, false_alarms, m), (m - false_alarms, m, n - hits, n))
    found = [0.0]
    for good, of, bad, among in pairs:
        least = beta.ppf(tail, good, of - good + 1) if good else 0.0
        most = beta.ppf(1 - tail, bad + 1, among - bad) if bad < among else 1.0
        if least > delta:
            found.append(math.log((least - delta) / most))
    return max(found)


def trials(release: Callable[[bool, int], np.ndarray], target: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of an attacker that looks for a client's vector in what is released.

    Args:
        release: `release(present, trial)` returns what the attacker sees (d,), with all that it knows subtracted.
        target: (d,) the client's vector.
        count: Number of trials of each kind.

    Returns:
        Scores with and without the client, (count,) each: the component along the client's vector.
    """
    direction = target / max(float(np.linalg.norm(target)), 1e-300)
    with_it, without = (np.array([release(present, trial) @ direction for trial in range(count)]) for present in (True, False))
    return with_it, without


@dataclass(frozen=True)
class Inverted:
    """How well an attacker finds a client's samples from the change of a layer's weights.

    Attributes:
        found: Share of the recovered directions whose best fitting sample belongs to the client.
        chance: The same share for an attacker that guesses: the share of the client's samples among all samples.
        cosine: Largest absolute cosine of a recovered direction with a sample of the client.
        cosine_others: The same with the samples of others.
    """

    found: float
    chance: float
    cosine: float
    cosine_others: float


def invert(change: np.ndarray, own: np.ndarray, others: np.ndarray, directions: int = 4) -> Inverted:
    """Attack the change of one linear layer's weights.

    Args:
        change: (outputs, inputs) the change that the attacker sees.
        own: (n, inputs) inputs of the layer for the client's samples.
        others: (m, inputs) inputs of the layer for samples of others.
        directions: Number of singular vectors that are taken for inputs.
    """
    center = np.concatenate([own, others]).mean(0)
    _, _, right = np.linalg.svd(change, full_matrices=False)
    guesses = right[:directions]
    own_fit, others_fit = (np.abs(_normalized(guesses) @ _normalized(samples - center).T) for samples in (own, others))
    return Inverted(float((own_fit.max(1) > others_fit.max(1)).mean()), len(own) / (len(own) + len(others)),
                    float(own_fit.max()), float(others_fit.max()))


def _normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
