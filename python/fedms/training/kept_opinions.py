"""Opinions of experts that are kept until the expert changes."""
from __future__ import annotations

from typing import cast

from torch import Tensor

from fedms.training.flop_meter import Key
from fedms_ext import ConstantCache

MAX_BYTES = 32 * 1024**2        # of the opinions that outlast a visit


class KeptOpinions:
    """Keeps the opinions of experts on whole subsets.

    A visit validates the same expert several times, which costs a client's device one pass. It also often begins with the expert
    that the visit before ended with. The device is not asked to remember that one's opinion: here it is found again, and the
    caller counts its operations once more.

    Args:
        outlast: Whether opinions outlast a visit, the most recently used ones up to `MAX_BYTES`.

    Attributes:
        visit: The opinions (U, K) of the visit under way, by expert, subset and hash of the expert's tensors.
    """

    def __init__(self, outlast: bool) -> None:
        self.visit: dict[Key, Tensor] = {}
        self._run = ConstantCache(MAX_BYTES if outlast else 0)

    def find(self, key: Key) -> Tensor | None:
        """Return the opinion (U, K) with this key that any visit has kept, or None if there is none.

        Args:
            key: Subset, hash of the expert's tensors, and number of blocks in the constant prefix, on which the bits depend.
        """
        return cast("Tensor | None", self._run.find(key))

    def keep(self, key: Key, opinion: Tensor) -> None:
        """Keep an opinion (U, K) that `find` has not found."""
        self._run.keep(key, opinion)
