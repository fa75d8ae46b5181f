"""PEFT's LoRA linear layer with its forward and backward computed by this package's operator."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from fedms_ext.backends.device import ON_GPU
from fedms_ext.nn.linear import class_name, passed_by, replaced_forward, unplain
from fedms_ext.nn.seeds import draw_seed
from fedms_ext.nn.siblings import SharesInput
from fedms_ext.operators import expert_linear
from fedms_ext.operators.planned import Plans, planned_linear
from fedms_ext.operators.siblings import Sibling


def _hooks_everywhere() -> bool:
    """Return whether global hooks are registered, which PyTorch would also call on the layer's submodules."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


class PeftLinear(lora.Linear, SharesInput):
    """A `peft.tuners.lora.Linear` whose forward and backward pass are computed by `fedms_ext.expert_linear`.

    It computes `W x + b + sum over active adapters of s B A dropout(x)`. Parameters and their names, adapters, merging and
    saving are inherited from PEFT. `fedms_ext.accelerate` changes the class of existing layers, so nothing is copied. A
    call that the operator cannot compute is left to PEFT; `obstacle` gives the reason.

    Attributes:
        plans: What the CUDA kernels keep for this layer, or None before its first call on a GPU.
    """

    plans: Plans | None = None
    # Name, scale and rank of the adapters of the last call on a GPU, and the tuple of their scales.
    _last: tuple[tuple[object, ...], tuple[float, ...]] = (), ()

    def obstacle(self) -> str | None:
        """Return why PEFT has to compute this layer with its active adapters, or None if the operator can."""
        return self._obstacle(self._adapters())

    def _obstacle(self, adapters: list[str]) -> str | None:
        base = self.base_layer
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

    def _ours(self) -> list[str]:
        """Return the active adapters, or none if PEFT has to compute this layer. A call asks once and hands them on."""
        adapters = self._adapters()
        if self.disable_adapters or self.merged or _hooks_everywhere() or (adapters and self._obstacle(adapters) is not None):
            return []
        return adapters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [] if args or kwargs else self._ours()
        if not adapters:
            return super().forward(x, *args, **kwargs)
        if self.siblings is not None and not torch.compiler.is_compiling():
            together = self.siblings.output(self, x)
            if together is not None:
                return together
        found = self._operands(adapters)
        weight, bias, a, b, scale, _, p, _ = found
        seed = draw_seed(x) if p > 0 else None
        if type(x) is Tensor and getattr(x, ON_GPU) and not torch.compiler.is_compiling():
            y = self._planned(x, adapters, found, 0 if seed is None else seed)
            if y is not None:
                return y
        return expert_linear(x, weight, bias, a, b, scale, dropout_p=p, seed=seed)

    def forget_plans(self) -> None:
        """Drop what calls on a GPU have kept."""
        for name in ("plans", "_last"):
            self.__dict__.pop(name, None)

    def _planned(self, x: Tensor, adapters: list[str], operands: Sibling, seed: int | Tensor) -> Tensor | None:
        """Return the output, computed with the plans of this layer, or None if the call cannot use them; see `planned_linear`."""
        weight, bias, a, b, scale, _, p, _ = operands
        if any([isinstance(value, Tensor) for value in scale]):
            return None
        applied = tuple(zip(adapters, scale, map(len, a)))
        if self._last[0] != applied:
            self._last = applied, tuple(scale)
        if self.plans is None:
            self.plans = Plans()
        # A plan is used again without a look at the adapters if it is given this very tuple again.
        return planned_linear(self.plans, x, weight, bias, a, b, self._last[1], None, p, seed)

    def _operands(self, adapters: list[str]) -> Sibling:
        base: Any = self.base_layer
        dropout = self.lora_dropout[adapters[0]]
        a, b = ([held[name].weight for name in adapters] for held in (self.lora_A, self.lora_B))
        p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        return Sibling(base.weight, base.bias, a, b, [self.scaling[name] for name in adapters], None, p, 0)

    def as_sibling(self, x: Tensor) -> Sibling | None:
        """See `SharesInput`. The layer has to be called if PEFT computes it, if hooks run before it, or if a scale is a tensor."""
        adapters = [] if self._forward_pre_hooks else self._ours()
        if not adapters:
            return None
        found = self._operands(adapters)
        return None if any([isinstance(scale, Tensor) for scale in found.scale]) else found

    def sibling_kind(self) -> tuple[object, ...]:
        """See `SharesInput`."""
        return self.training, len(self.merged_adapters), self.disable_adapters, *self.active_adapters

    def sibling_state(self) -> tuple[list[Tensor | None], tuple[object, ...]]:
        """See `SharesInput`. Only of a layer that is not left to PEFT."""
        weight: Any
        weight, bias, a, b, scale, _, p, _ = self._operands(self._adapters())
        return [weight, bias, *a, *b], (*scale, p, [pair.requires_grad for pair in (*a, *b)])
