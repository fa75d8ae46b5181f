"""`Pairs`: the A, or the B, of a layer's experts."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Pairs(nn.ParameterDict):
    """Tensors by the expert's name, in float32 or float64 whatever happens to the model around them.

    `model.half()`, `model.to(torch.bfloat16)` and a state dict of half precision change their device and their values, but
    never make them narrower than float32; see `ExpertLinear`.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pairs:
        return super()._apply(lambda tensor: _wide(fn(tensor), tensor), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        wide = {key: _wide(value, value) for key, value in state_dict.items()
                if key.startswith(prefix) and isinstance(value, Tensor)}
        super()._load_from_state_dict({**state_dict, **wide}, prefix, *args)


def _wide(changed: Tensor, original: Tensor) -> Tensor:
    """`changed`, or, where that is narrower than float32, the original on its device in float32."""
    if not changed.is_floating_point() or torch.promote_types(changed.dtype, torch.float32) == changed.dtype:
        return changed
    return original.to(changed.device, torch.float32)
