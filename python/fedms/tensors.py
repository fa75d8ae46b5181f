"""Named tensors, which are sent between server and clients and kept by clients.

Their names are `expert/<layer>.lora_a`, `expert/<layer>.lora_b`, `head/<name>`, `gate/<name>`, and with exact aggregation
`correction/<layer>`.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

Tensors = dict[str, Tensor]


def is_a(name: str) -> bool:
    """Return whether the name of a tensor is that of the A of a pair."""
    return name.endswith(".lora_a")


def freeze_none(name: str) -> bool:
    """Return False: no tensor is kept from training."""
    return False


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of the values of tensors on any device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy())  # type: ignore[arg-type]  # numpy's stubs: a buffer from 3.12 on
    return digest.hexdigest()


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
