"""What the clients of one round add up: their updates, and what else the run needs of them, as one vector of integers.

Each part has a bound of its own on the norm of one client's share, and noise of its own:

    update      change of every tensor that this round trains, in all at most `clip` long
    score       validation score of the received model, in [0, 1]
    counts      class counts, scaled to norm 1
    accuracy    test accuracy of what the client has in the end, in [0, 1]

Whatever else a client knows stays with it.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedms.privacy.clipping import Layout, dequantize, quantize, unit_norm

SCALARS = ("score", "accuracy")


@dataclass(frozen=True)
class Section:
    """One part of the vector.

    Attributes:
        name: "update", "score", "counts" or "accuracy".
        length: Number of values.
        bound: The largest L2 norm of one client's share.
        noise: The noise multiplier, or None for no noise.
    """

    name: str
    length: int
    bound: float
    noise: float | None = None


@dataclass(frozen=True)
class Sums:
    """The vector of one round.

    Attributes:
        parts: Its parts, in order.
        layout: The place of each tensor in the part "update".
        bits: Logarithm to base 2 of the number of steps between 0 and a part's bound.
    """

    parts: tuple[Section, ...]
    layout: Layout
    bits: int

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(part.length for part in self.parts)

    @property
    def noise(self) -> tuple[float | None, float | None, float | None]:
        """The noise multipliers of the update, of the score or accuracy, and of the counts; None: not part of it, or none."""
        noise = {part.name: part.noise for part in self.parts}
        return noise.get("update"), noise.get("score") or noise.get("accuracy"), noise.get("counts")

    def sections(self, sharers: int = 1) -> tuple[tuple[int, int], ...]:
        """Return for each part its length and its noise in steps, rounded up to a whole number; 0 without noise.

        The noise is that of the sum, or one client's share of it if at least `sharers` clients add theirs.
        """
        return tuple((part.length, 0 if part.noise is None else math.ceil(part.noise * 2**self.bits / math.sqrt(sharers)))
                     for part in self.parts)

    def encode(self, update: Mapping[str, np.ndarray], score: float | None = None,
               counts: Sequence[float] | np.ndarray | None = None, accuracy: float | None = None) -> np.ndarray:
        """Return a client's vector (size,) int32: every part clipped to its bound and rounded toward zero.

        Args:
            update: The change of each tensor that the client trained. Tensors that are missing count as zeros.
            score, counts, accuracy: The client's values of the other parts; None counts as zeros.

        Raises:
            ValueError: If a value is NaN or infinite, or the update holds a tensor that is not in the layout.
        """
        values = {"score": [score or 0.0], "accuracy": [accuracy or 0.0]}
        vectors = [np.zeros(0, np.int32)]
        for part in self.parts:
            if part.name == "update":
                vector = self.layout.flatten(update)
            elif part.name == "counts":
                vector = np.zeros(part.length) if counts is None else unit_norm(counts)
            else:
                vector = np.clip(values[part.name], 0, 1)
            vectors.append(quantize(vector, part.bound, self.bits))
        return np.concatenate(vectors)

    def nothing(self) -> np.ndarray:
        """Return the vector (size,) int32 of a client that has nothing to add: zeros."""
        return np.zeros(self.size, np.int32)

    def split(self, total: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parts (length,) of a vector (size,), by name."""
        found, start = {}, 0
        for part in self.parts:
            found[part.name] = total[start:start + part.length]
            start += part.length
        return found

    def decode(self, total: np.ndarray, expected: Mapping[str, float], clients: float) -> Means:
        """Return the means over clients that a sum of their vectors, with its noise, stands for.

        Args:
            total: (size,) int64.
            expected: For each tensor, the number of clients that are expected to train it. It is known before the round:
                dividing by the number that did train it would reveal whether one client took part.
            clients: The number of clients that are expected.
        """
        found = {part.name: dequantize(values, part.bound, self.bits)
                 for part, values in zip(self.parts, self.split(total).values())}
        changes = {name: values / expected[name] for name, values in self.layout.split(found["update"]).items()
                   } if "update" in found else {}
        shares = {name: float(np.clip(found[name][0] / clients, 0, 1)) for name in SCALARS if name in found}
        counts = found.get("counts")
        return Means(changes, shares.get("score"), shares.get("accuracy"), None if counts is None else _distribution(counts))


@dataclass(frozen=True)
class Means:
    """What a round's sum says about its clients together.

    Attributes:
        changes: The mean change of each tensor, float64.
        score, accuracy: Means in [0, 1], or None if they are not part of the sum.
        classes: (C,) the share of each class, which sum to 1, or None if they are not part of the sum.
    """

    changes: Mapping[str, np.ndarray]
    score: float | None
    accuracy: float | None
    classes: np.ndarray | None


def _distribution(counts: np.ndarray) -> np.ndarray:
    """Return noisy counts (C,) as shares that sum to 1. Noise can make counts negative, and their total is arbitrary."""
    counts = np.maximum(counts, 0)
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(counts), 1 / len(counts))
