"""A client's whole update as a vector of integers whose norm is bounded.

All tensors of an update together are one vector, in float64, with zeros where the client trained nothing. Scaled to an L2
norm of at most C and rounded toward zero on a grid of C / 2^bits, it is a vector of integers with a norm of at most 2^bits.
Rounding toward zero never raises the norm, so the bound that the privacy guarantee rests on holds exactly, and sums of
integers do not depend on the order of the clients.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedms.errors import FedMSError

# The rounding errors of the norm and of the product stay far below this relative margin (float64 has 2^-53), so that the
# clipped vector cannot exceed the bound by rounding.
MARGIN = 2.0**-40


class NotFinite(FedMSError, ValueError):
    """An update that holds NaN or infinity."""


@dataclass(frozen=True)
class Layout:
    """The place of each tensor in the vector.

    Args:
        shapes: (name, shape) of each tensor, in the vector's order.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> Layout:
        """Return the layout of named arrays, in the order of their names."""
        return cls(tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors)))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The range of each tensor's values in the vector, by name."""
        found, start = {}, 0
        for name, shape in self.shapes:
            found[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return found

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the vector (size,) float64 of these arrays; a tensor that is missing counts as zeros.

        Raises:
            ValueError: If a tensor is not in the layout, or has another shape.
        """
        shapes = dict(self.shapes)
        vector = np.zeros(self.size)
        for name, values in tensors.items():
            if name not in shapes:
                raise ValueError(f"{name}: not part of this update, which holds {', '.join(shapes) or 'nothing'}")
            if tuple(values.shape) != shapes[name]:
                raise ValueError(f"{name}: shape {tuple(values.shape)}, expected {shapes[name]}")
            vector[self.slices[name]] = np.asarray(values, np.float64).reshape(-1)
        return vector

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return the named arrays of a vector (size,): the inverse of `flatten`."""
        return {name: vector[self.slices[name]].reshape(shape) for name, shape in self.shapes}


def quantize(vector: np.ndarray, clip: float, bits: int) -> np.ndarray:
    """Clip a vector to an L2 norm of at most `clip` and round it toward zero to multiples of `clip / 2**bits`.

    Args:
        vector: (d,) finite floats.
        clip: The largest norm C, above 0.
        bits: Logarithm to base 2 of the number of steps between 0 and C, from 1 to 20.

    Returns:
        (d,) int32, the multiples. The sum of their squares is at most `4**bits`, exactly.

    Raises:
        NotFinite: If a value is NaN or infinite.
    """
    norm = float(np.sqrt(np.add.reduce(np.square(vector, dtype=np.float64))))
    if not math.isfinite(norm):
        raise NotFinite("the update holds NaN or infinity, so it has no norm to clip")
    shrink = 1.0 if norm <= clip else clip / norm
    steps = vector * (shrink * (1 - MARGIN)) * (2.0**bits / clip)
    return np.trunc(steps).astype(np.int32)


def dequantize(total: np.ndarray, clip: float, bits: int) -> np.ndarray:
    """Return the float64 values of a vector (d,) of multiples of `clip / 2**bits`."""
    return total * (clip / 2.0**bits)


def within_bound(steps: np.ndarray, bits: int) -> bool:
    """Return whether a vector (d,) of integers has a norm of at most `2**bits`. The answer is exact for any integers."""
    values = steps.astype(np.int64)
    if len(values) and max(int(values.max()), -int(values.min())) > 2**bits:
        return False
    # Sums of 2^20 squares of up to 2^40 each stay below 2^63.
    return sum(int(np.square(values[i:i + 2**20]).sum()) for i in range(0, len(values), 2**20)) <= 4**bits


def unit_norm(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return nonnegative values (n,) scaled to an L2 norm of 1; zeros stay zeros."""
    values = np.maximum(np.asarray(values, np.float64), 0)
    norm = float(np.sqrt(np.add.reduce(np.square(values))))
    return values / norm if norm > 0 else values
