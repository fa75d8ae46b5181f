"""`ExpertLinear`: an `nn.Linear` with a frozen weight, joined by any number of LoRA experts."""
from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedms_ext.frozen_ops import frozen_linear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.quantised_weight import QuantisedWeight
from fedms_ext.ops import expert_linear


class PairState(str, enum.Enum):
    """What one LoRA pair (A, B) of one expert in one layer does (Sparsely Activated LoRA)."""

    OFF = "off"          # not applied: costs nothing
    FROZEN = "frozen"    # applied, not trained
    TRAINED = "trained"  # applied and trained


@dataclass(frozen=True)
class LoRA:
    """Shape and scale of one LoRA expert (Hu et al. 2021; rsLoRA: Kalajdzievski 2023).

    Args:
        rank: inner dimension r, at least 1.
        alpha: numerator of the scale, which is `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`.
        dropout: probability in [0, 1) of dropping an input of the LoRA branch while it is trained.
        rslora: rank-stabilised scale.

    Raises:
        ValueError: if a value lies outside its range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout must lie in [0, 1), got {self.dropout}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"LoRA alpha must be finite, got {self.alpha}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def check_experts(present: Mapping[str, LoRA], new: Mapping[str, LoRA]) -> None:
    """ValueError if a layer that has the experts `present` cannot take the `new` ones too."""
    for name in new:
        if name in present:
            raise ValueError(f"this layer already has an expert {name!r}; it has {sorted(present)}")
        # The names become attributes of a `ParameterDict`.
        if not name or "." in name or hasattr(nn.ParameterDict, name):
            raise ValueError(f"{name!r} cannot be an expert's name: it is empty, holds a dot, or belongs to PyTorch")
    dropouts = {name: lora.dropout for name, lora in (*present.items(), *new.items())}
    if len(set(dropouts.values())) > 1:
        raise ValueError(f"the experts of a layer share one dropout mask, so one dropout; got {dropouts}")


class ExpertLinear(nn.Linear):
    """`y = x W^T + b + sum over applied experts e of s_e * g_e * (x A_e^T) B_e^T`.

    A drop-in for `nn.Linear`: `weight` (N, K) and `bias` (N,) keep their names in the `state_dict` and never get
    a gradient. Expert `e` adds `lora_a[e]` (r_e, K), initialised as PEFT does (Kaiming uniform, a = sqrt 5), and
    `lora_b[e]` (N, r_e), which starts at zero, so that a new expert changes nothing.

    Each pair is off, frozen or trained (`PairState`). With every pair off the module is `F.linear`, bit for bit.
    Dropout is drawn only while one of the layer's pairs is trained and the module is in training mode; its seed
    comes from torch's default generator.

    `gate`, set by `fedms_ext.gated`, is a tensor (B, E) with one weight per sample and expert (E counts all
    experts of the layer, in the order of `experts`), or None for weight 1 everywhere. `segments`, set by
    `fedms_ext.segmented`, are E numbers of samples: the first of them take the first expert alone, and so on, and the
    gate is (B, 1); None: every sample takes all experts that are applied.

    After `fedms_ext.quantize`, `frozen` holds the weight and `weight` is None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, experts: Mapping[str, LoRA],
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._start_experts(experts)

    @classmethod
    def from_linear(cls, linear: nn.Linear, experts: Mapping[str, LoRA]) -> ExpertLinear:
        """An `ExpertLinear` on the very parameters of `linear`: nothing is copied.

        Raises:
            TypeError: if `linear` is not an `nn.Linear`, or is one of its subclasses with a forward of its own.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes a plain nn.Linear, got {type(linear).__name__}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self._start_experts(experts)
        return self

    def _start_experts(self, experts: Mapping[str, LoRA]) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.experts: dict[str, LoRA] = {}
        self.states: dict[str, PairState] = {}
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        self.block: int | None = None        # 1-based number of the transformer block this layer belongs to
        self.gate: Tensor | None = None
        self.segments: Sequence[int] | None = None
        self.merged: tuple[str, PairState, Tensor] | None = None   # what `merge` changed
        self.frozen: QuantisedWeight | None = None
        for name, lora in experts.items():
            self.add_expert(name, lora)

    def add_expert(self, name: str, lora: LoRA) -> None:
        """Adds an expert, frozen (which, with B = 0, changes nothing).

        Raises:
            ValueError: if the name is taken or unusable, or the dropout differs from that of the layer's other
                experts (the mask is one per layer, shared by its experts: definition, section 1).
        """
        check_experts(self.experts, {name: lora})
        weight = self.weight if self.frozen is None else self.frozen.scale
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        a = torch.empty(lora.rank, self.in_features, **like)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_a[name] = nn.Parameter(a, requires_grad=False)
        self.lora_b[name] = nn.Parameter(torch.zeros(self.out_features, lora.rank, **like), requires_grad=False)
        self.experts[name] = lora
        self.states[name] = PairState.FROZEN

    def set_state(self, expert: str, state: PairState | str) -> None:
        """Sets one pair's state; training follows `requires_grad`.

        Raises:
            KeyError: if the layer has no such expert.
            ValueError: if `state` is not off, frozen or trained.
            RuntimeError: if the expert is merged into the weight, so that to apply it would count it twice.
        """
        self._check_has(expert)
        try:
            state = PairState(state)
        except ValueError:
            raise ValueError(f"state is {state!r}, expected {', '.join(s.value for s in PairState)}") from None
        if self.merged is not None and self.merged[0] == expert and state is not PairState.OFF:
            raise RuntimeError(f"expert {expert!r} is merged into the weight; unmerge it before it is {state.value}")
        self.states[expert] = state
        for p in (self.lora_a[expert], self.lora_b[expert]):
            p.requires_grad_(state is PairState.TRAINED)
            if state is not PairState.TRAINED:
                p.grad = None

    def _check_has(self, expert: str) -> None:
        if expert not in self.experts:
            raise KeyError(f"no expert {expert!r} in this layer; it has {sorted(self.experts)}")

    @property
    def applied(self) -> list[str]:
        """Names of the experts that are applied (frozen or trained), in order."""
        return [name for name, state in self.states.items() if state is not PairState.OFF]

    def forward(self, x: Tensor) -> Tensor:
        # `_modules` and `_parameters` are what an attribute looks up in the end; all these take 20 us a call.
        modules: dict[str, Any] = self._modules
        frozen, active = modules.get("frozen"), [state is not PairState.OFF for state in self.states.values()]
        if not any(active):
            return F.linear(x, self.weight, self.bias) if frozen is None else frozen_linear(x, frozen, self.bias)
        dropout = next(iter(self.experts.values())).dropout
        drops = self.training and dropout > 0.0 and PairState.TRAINED in self.states.values()
        operator: Callable[..., Tensor] = expert_linear if frozen is None else frozen_linear
        weight = self.weight if frozen is None else frozen
        return operator(
            x, weight, self.bias,
            list(modules["lora_a"]._parameters.values()), list(modules["lora_b"]._parameters.values()),
            [lora.scale for lora in self.experts.values()],
            gate=None if self.gate is None else self._gate_of_rows(x),
            active=active,
            dropout_p=dropout if drops else 0.0,
            seed=int(torch.randint(2**63 - 1, ())) if drops else 0,
            segments=None if self.segments is None else self._segments_of_rows(x))

    def _gate_of_rows(self, x: Tensor) -> Tensor:
        gate = self.gate
        columns = len(self.experts) if self.segments is None else 1
        if gate.dim() != 2 or gate.shape[1] != columns or gate.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"gate must be (B, E) = ({x.shape[0]}, {columns}) for an input of shape "
                             f"{tuple(x.shape)}, got {tuple(gate.shape)}")
        return gate.reshape(gate.shape[0], *([1] * (x.dim() - 2)), gate.shape[1])

    def _segments_of_rows(self, x: Tensor) -> list[int]:
        samples, rows = self.segments, x.shape[:-1].numel()
        total = sum(samples)
        flattened = x.dim() == 2 and total > 0 and rows % total == 0      # (B T, K), as OPT gives it to its second half
        if len(samples) != len(self.experts) or x.dim() < 2 or (x.shape[0] != total and not flattened):
            raise ValueError(f"segments must be {len(self.experts)} numbers of samples, {x.shape[0]} in all, for an input "
                             f"of shape {tuple(x.shape)}, got {list(samples)}")
        return [count * (rows // total) if total else 0 for count in samples]

    def delta(self, expert: str) -> Tensor:
        """`s * B A` of one expert, (N, K), in the weight's dtype, computed in float32 or better."""
        wide = torch.promote_types(self.lora_a[expert].dtype, torch.float32)
        a, b = self.lora_a[expert].detach().to(wide), self.lora_b[expert].detach().to(wide)
        return self.experts[expert].scale * (b @ a)

    @torch.no_grad()
    def merge(self, expert: str) -> None:
        """Adds the expert into the weight and turns its pair off. The original weight is kept aside, so that
        `unmerge` restores the very same bits.

        Raises:
            KeyError: if the layer has no such expert.
            RuntimeError: if an expert is merged already, or the weight is quantised.
        """
        self._check_has(expert)
        if self.frozen is not None:
            raise RuntimeError("the weight is quantised, so nothing can be merged into it; call fedms_ext.dequantize "
                               "with the original weights first")
        if self.merged is not None:
            raise RuntimeError(f"expert {self.merged[0]!r} is merged already; unmerge it first")
        delta = self.delta(expert)
        self.merged = (expert, self.states[expert], self.weight.detach().clone())
        self.weight.copy_(self.weight.to(delta.dtype) + delta)
        self.set_state(expert, PairState.OFF)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight from before `merge`, bit for bit, and the pair's state.

        Raises:
            RuntimeError: if nothing is merged.
        """
        if self.merged is None:
            raise RuntimeError("no expert is merged into this layer")
        expert, state, weight = self.merged
        self.weight.copy_(weight)
        self.merged = None
        self.set_state(expert, state)

    def freeze(self, frozen: QuantisedWeight) -> None:
        """Takes a quantised weight (N, K) in the place of `weight`; see `fedms_ext.quantize`."""
        self.weight, self.frozen = None, frozen

    def thaw(self, weight: Tensor) -> None:
        """Takes a weight (N, K) in the place of the quantised one; see `fedms_ext.dequantize`."""
        self.weight, self.frozen = nn.Parameter(weight, requires_grad=False), None

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` on the same parameters, without the experts (merge first to keep one); a `FrozenLinear`
        if the weight is quantised."""
        if self.frozen is not None:
            return FrozenLinear(self.frozen, self.bias).train(self.training)
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        linear.training = self.training
        return linear

    def extra_repr(self) -> str:
        pairs = ", ".join(f"{e}: r={lora.rank} {self.states[e].value}" for e, lora in self.experts.items())
        return f"{super().extra_repr()}, experts=({pairs})"
