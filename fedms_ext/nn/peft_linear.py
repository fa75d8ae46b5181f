"""PEFT's LoRA linear layer with its forward and backward computed by this package's operator."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from fedms_ext.nn.linear import class_name, passed_by, replaced_forward, unplain
from fedms_ext.nn.seeds import draw_seed
from fedms_ext.operators import expert_linear


def _hooks_everywhere() -> bool:
    """Return whether global hooks are registered, which PyTorch would also call on the layer's submodules."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


class PeftLinear(lora.Linear):
    """A `peft.tuners.lora.Linear` whose forward and backward pass are computed by `fedms_ext.expert_linear`.

    It computes `W x + b + sum over active adapters of s B A dropout(x)`. Parameters and their names, adapters, merging and
    saving are inherited from PEFT. `fedms_ext.accelerate` changes the class of existing layers, so nothing is copied. A
    call that the operator cannot compute is left to PEFT; `obstacle` gives the reason.
    """

    def obstacle(self) -> str | None:
        """Return why PEFT has to compute this layer with its active adapters, or None if the operator can."""
        base, adapters = self.base_layer, self._adapters()
        if reason := replaced_forward(self):
            return reason
        if type(base) is not nn.Linear:
            return f"its base layer is a {type(base).__module__}.{type(base).__name__}, not a torch.nn.Linear"
        if reason := passed_by(base) or unplain(base):
            return f"its base layer cannot be replaced by the operator: {reason}"
        if base.weight is None or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return "its base weight is trained"
        for name in adapters:
            if name in self.lora_variant:
                return f"adapter {name!r} is a variant of LoRA ({type(self.lora_variant[name]).__name__})"
            pair = (self.lora_A[name], self.lora_B[name])
            if type(pair[0]) is not nn.Linear or type(pair[1]) is not nn.Linear:
                found = f"{class_name(pair[0])} and a {class_name(pair[1])}"
                return f"adapter {name!r} consists of a {found}, expected two torch.nn.Linear"
            for part in (*pair, self.lora_dropout[name]):
                if reason := passed_by(part) or unplain(part):
                    return f"a module of adapter {name!r} cannot be replaced by the operator: {reason}"
            if self.lora_B[name].bias is not None:
                return f"adapter {name!r} has a bias"
            dropout = type(self.lora_dropout[name])
            if dropout not in (nn.Identity, nn.Dropout):
                return f"adapter {name!r} has a {dropout.__name__} as its dropout, expected torch.nn.Dropout"
        if len({self.lora_A[name].weight.dtype for name in adapters}) > 1:
            return "its adapters differ in dtype"
        if len(adapters) > 1 and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in adapters):
            return "several active adapters have dropout, and PEFT draws a separate mask for each"
        return None

    def _adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self._adapters()
        by_peft = not adapters or args or kwargs or self.disable_adapters or self.merged or _hooks_everywhere()
        if by_peft or self.obstacle() is not None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapters[0]]
        p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        base: Any = self.base_layer
        down: Any = self.lora_A
        up: Any = self.lora_B
        return expert_linear(
            x, base.weight, base.bias,
            [down[name].weight for name in adapters], [up[name].weight for name in adapters],
            [self.scaling[name] for name in adapters], dropout_p=p,
            seed=draw_seed(x) if p > 0 else None,
        )  # fmt: skip
