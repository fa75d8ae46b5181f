"""Count the operations of a run, including those for cached values."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

from torch import Tensor

from fedms_ext import ConstantCache, DiskCache, Ragged

Key = tuple[str | int, ...]
Constant = TypeVar("Constant", Tensor, Ragged)


class FlopMeter:
    """Counts operations on the clients' devices.

    Attributes:
        flops: Operations so far.
        paid: Names of the cached values whose operations are counted already.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.paid: set[str] = set()

    def restart(self) -> None:
        """Reset the counters at the start of a run."""
        self.flops, self.paid = 0, set()

    def add(self, flops: int) -> None:
        self.flops += flops

    def constant(self, cache: ConstantCache | DiskCache, key: Key, compute: Callable[[], Constant],
                 flops: Callable[[], int], with_it: Callable[[], Iterable[Key]] = tuple) -> Constant:
        """Return a value that depends only on its key, from the cache or by calling `compute`.

        A client's device would compute each value once in a run, so its operations are counted once, even if this process
        has the value from an earlier run, or has to compute it again after dropping it or after a restart.

        Args:
            cache: The cache.
            key: The key.
            compute: Computes the value.
            flops: Returns the operations that this takes, and counts by itself the constants that the value is computed from.
            with_it: Returns keys of further values that these operations give and that are kept too, so that they are paid for.
        """
        name = _name(key)
        due = name not in self.paid
        if due:
            self.paid |= {name, *map(_name, with_it())}
            self._add(flops)
        counted = self.flops
        value = cast(Constant, cache.get(key, compute))     # what was computed under the key
        self.flops = counted
        if not due and value.nbytes > cache.max_bytes:      # too large to be kept: computed every time
            self._add(flops)
        return value

    def _add(self, flops: Callable[[], int]) -> None:
        own = flops()       # before the sum is read, as it may count constants
        self.flops += own


def _name(key: Key) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]
