"""`Pairs`: the A parameters, or the B parameters, of a layer's experts."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Pairs(nn.ParameterDict):
    """Parameters by the name of the expert, always in float32 or float64.

    `model.half()`, `model.to(torch.bfloat16)` and loading a state dict in half precision may change their device and their
    values, but not their dtype to a narrower one than float32; `ExpertLinear` says why.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pairs:
        return super()._apply(lambda tensor: _at_least_float32(fn(tensor), tensor), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        upcast = {key: _at_least_float32(value, value) for key, value in state_dict.items()
                if key.startswith(prefix) and isinstance(value, Tensor)}
        super()._load_from_state_dict({**state_dict, **upcast}, prefix, *args)


def _at_least_float32(changed: Tensor, original: Tensor) -> Tensor:
    """Return `changed` if its dtype is at least float32, otherwise `original` in float32 on the device of `changed`."""
    if not changed.is_floating_point() or torch.promote_types(changed.dtype, torch.float32) == changed.dtype:
        return changed
    return original.to(changed.device, torch.float32)
