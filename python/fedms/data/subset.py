"""Some samples of a data set, such as one client's training part."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Subset:
    """indices: (n,) int64 samples of the data set. `key` names their set in caches."""

    indices: Tensor

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.indices.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)
