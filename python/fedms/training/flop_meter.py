"""Count the operations of a run, including those for cached values."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor

from fedms_ext import ConstantCache, DiskCache, Ragged

Key = tuple[str | int, ...]
Constant = TypeVar("Constant", Tensor, Ragged)


@dataclass(frozen=True)
class Elsewhere:
    """What a part of a visit, which another run may have made, has cost there; see `fedms.federated.shared_visits`.

    Attributes:
        seconds: What to add to the time that passed here: its duration, less the time to wait for it and to read it.
        peak_memory_bytes: The most memory in use during it, 0 if it was made here.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0


class FlopMeter:
    """Counts operations on the clients' devices.

    Attributes:
        flops: Operations so far.
        paid: Names of the cached values whose operations are counted already.
        asked: Names of the cached values that were asked for; whoever wants to know empties it before.
        elsewhere: Of the visit under way, the part that runs can share, or None if it has none.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Reset the counters at the start of a run."""
        self.flops = 0
        self.paid: set[str] = set()
        self.asked: set[str] = set()
        self.elsewhere: Elsewhere | None = None

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
        self.asked.add(name)
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
