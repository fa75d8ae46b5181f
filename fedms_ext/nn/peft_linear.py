"""PEFT's LoRA linear layer with its forward and backward computed by this package's operator."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from fedms_ext.nn.linear import class_name, passed_by, replaced_forward, unplain
from fedms_ext.operators import expert_linear


def _hooks_everywhere() -> bool:
    """Whether hooks on all modules, which the layer's parts have too, are set."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


class PeftLinear(lora.Linear):
    """`peft.tuners.lora.Linear` that computes `W x + b + sum over active adapters of s B A dropout(x)` by
    `fedms_ext.expert_linear`. Everything else is PEFT's: parameters and their names, adapters, merging, saving.

    A layer becomes one by a change of its class (see `fedms_ext.accelerate`), so nothing is copied. What the operator
    does not compute is left to PEFT call by call: see `obstacle`.
    """

    def obstacle(self) -> str | None:
        """Why PEFT computes this layer with the adapters that are active now; None if we do."""
        base, adapters = self.base_layer, self._adapters()
        if reason := replaced_forward(self):
            return reason
        if type(base) is not nn.Linear:
            return f"its base layer is a {type(base).__module__}.{type(base).__name__}, not a torch.nn.Linear"
        if reason := passed_by(base) or unplain(base):
            return f"its base layer has to be called: {reason}"
        if base.weight is None or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return "its base weight is trained"
        for name in adapters:
            if name in self.lora_variant:
                return f"adapter {name!r} is no plain LoRA ({type(self.lora_variant[name]).__name__})"
            pair = (self.lora_A[name], self.lora_B[name])
            if type(pair[0]) is not nn.Linear or type(pair[1]) is not nn.Linear:
                return f"adapter {name!r} is a {class_name(pair[0])} and a {class_name(pair[1])}, not a torch.nn.Linear each"
            for part in (*pair, self.lora_dropout[name]):
                if reason := passed_by(part) or unplain(part):
                    return f"a part of adapter {name!r} has to be called: {reason}"
            if self.lora_B[name].bias is not None:
                return f"adapter {name!r} has a bias"
            if type(self.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
                return f"adapter {name!r} has a dropout of its own kind ({type(self.lora_dropout[name]).__name__})"
        if len({self.lora_A[name].weight.dtype for name in adapters}) > 1:
            return "its adapters differ in dtype"
        if len(adapters) > 1 and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in adapters):
            return "several adapters with dropout are active, each of which has a mask of its own"
        return None

    def _adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self._adapters()
        if not adapters or args or kwargs or self.disable_adapters or self.merged or _hooks_everywhere() or self.obstacle() is not None:
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
            seed=int(torch.randint(2**63 - 1, ())) if p > 0 else None,
        )  # fmt: skip
