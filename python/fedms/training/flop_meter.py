"""Operations of a run, and the constants that it has paid for."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor

from fedms_ext import ConstantCache, DiskCache, Ragged

Key = tuple[str | int, ...]
Constant = TypeVar("Constant", Tensor, Ragged)


class FlopMeter:
    """flops: operations on the clients' devices so far. paid: names of the constants that are counted already."""

    def __init__(self) -> None:
        self.flops = 0
        self.paid: set[str] = set()

    def restart(self) -> None:
        """The start of a run: nothing is counted yet."""
        self.flops, self.paid = 0, set()

    def add(self, flops: int) -> None:
        self.flops += flops

    def constant(self, cache: ConstantCache | DiskCache, key: Key, compute: Callable[[], Constant],
                 flops: Callable[[], int]) -> Constant:
        """A value that depends on its key alone, from the cache or computed now.

        A client's device computes each once in a run, so that is what the run is charged: whatever this process
        still has from another run, has had to drop, or must compute again after a restart.
        """
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        due = name not in self.paid
        if due:
            self.paid.add(name)
            self.flops += flops()
        counted = self.flops
        value = cast(Constant, cache.get(key, compute))     # what was computed under the key
        if not due and value.nbytes > cache.max_bytes:      # too large to be kept: computed every time
            counted += flops()
        self.flops = counted
        return value
