"""Random numbers: every draw of a run is derived from its seed and from a name.

A draw is named by what it is for (`"sample-clients", stage, round`), never by when it happens, so that clients may be
visited in any order, on any machine, and a resumed run draws what the undisturbed one would have drawn.
"""
from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the draw called `names` in the run with this seed."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a new CPU generator for the draw called `names`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
