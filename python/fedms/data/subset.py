"""Some samples of a data set, such as one client's training part."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Subset:
    """Some samples of a data set.

    Attributes:
        indices: (n,) int64, the samples of the data set.
    """

    indices: Tensor

    @cached_property
    def key(self) -> str:
        """A name for this set of samples in caches."""
        return hashlib.sha256(self.indices.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)
