"""`ExpertLinear`: an `nn.Linear` with a frozen weight and any number of LoRA experts."""
from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext.backends.device import ON_GPU
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.linear import class_name, obstacle, unplain
from fedms_ext.nn.lora import STATES, Experts, LoRA, PairState, check_experts, saved_pair
from fedms_ext.nn.pairs import Pairs
from fedms_ext.nn.seeds import draw_seed
from fedms_ext.nn.siblings import SharesInput, Siblings
from fedms_ext.operators import expert_linear
from fedms_ext.operators.planned import Plans, planned_linear
from fedms_ext.operators.siblings import Sibling


@dataclass(eq=False)
class Route:
    """Which experts each row of a layer's input uses, as set by `fedms_ext.gated` and `fedms_ext.segmented`."""

    gate: Tensor | None = None
    segments: Sequence[int] | None = None


_EVERYWHERE = Route()


class _Here(threading.local):
    """The routes that the calling thread has set, by layer: two threads can run the same layers with different ones. torch.compile traces
    the attributes of a `threading.local`, but no `ContextVar`."""

    def __init__(self) -> None:     # in each thread
        self.routes: Mapping[nn.Module, Route] = {}


HERE = _Here()


class ExpertLinear(FrozenLinear, SharesInput):
    """`y = x W^T + b + sum over applied experts e of s_e * g_e * (x A_e^T) B_e^T`.

    A drop-in replacement for `nn.Linear`. `weight` (N, K) and `bias` (N,) keep their names in the `state_dict` and never
    get a gradient. Expert `e` adds two parameters: `lora_a[e]` (r_e, K), initialized as in PEFT (Kaiming uniform with
    a = sqrt(5)), and `lora_b[e]` (N, r_e), initialized to zero, so that a new expert does not change the output. (One
    exception: on a CPU with AVX2 or AVX-512 and up to 4 rows in float32, another kernel computes the frozen product, and
    the rounding may change.)

    Both parameters are float32, whatever the dtype of the weight is or becomes (`half()`, a bfloat16 state dict,
    quantization), because the steps of an optimizer round to nothing or overflow in half precision. With a float64 weight
    they are float64.

    Each pair has a state: off, frozen or trained (`PairState`). An applied pair is trained if its parameters require a
    gradient, so `states` and `requires_grad` always agree. If every pair is off, the output equals that of `F.linear` bit
    for bit. Dropout applies only if the module is in training mode and one of its pairs is trained; its seed is drawn
    from torch's default generator (see `fedms_ext.nn.seeds`).

    For each expert the `state_dict` also holds `pairs.<name>`, a float64 tensor (5,): rank, alpha, dropout, rslora (0 or
    1) and state (0 off, 1 frozen, 2 trained). Loading a state dict restores them, so that the layer computes what the
    saved layer computed.

    Attributes:
        experts: Shape of each expert, by name, in the order in which they were added.
        gate: Weights (B, E), one for each sample and each of the layer's E experts, or None if all weights are 1. Set by
            `fedms_ext.gated`, for the calling thread.
        segments: E numbers of samples, or None. With segments, the first `segments[0]` samples use only the first expert,
            the next `segments[1]` samples only the second one, and so on, and the gate has the shape (B, 1). Without
            segments every sample uses all applied experts. Set by `fedms_ext.segmented`, for the calling thread.
        frozen: The quantized weight after `fedms_ext.quantize`, otherwise None; see `FrozenLinear`.
        siblings: The layers that share their input with this one, or None. Set by `fedms_ext.group`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, experts: Mapping[str, LoRA],
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.plain, self.frozen = nn.Linear, None
        self._start_experts(experts)

    @classmethod
    def from_linear(cls, linear: nn.Linear, experts: Mapping[str, LoRA]) -> ExpertLinear:
        """Return an `ExpertLinear` that shares the parameters of `linear`. Nothing is copied, and `linear` is not changed.

        Raises:
            TypeError: If `linear` is not a linear layer whose weight is a parameter; see `fedms_ext.nn.linear.obstacle`.
        """
        if reason := obstacle(linear):
            raise TypeError(f"from_linear takes an nn.Linear; this is a {class_name(linear)}: {reason}")
        twin = copy.copy(linear)
        for name, value in vars(linear).items():
            if isinstance(value, dict):  # of parameters, buffers, hooks
                vars(twin)[name] = copy.copy(value)
        return cls.join(twin, experts)

    @classmethod
    def join(cls, layer: nn.Module, experts: Mapping[str, LoRA]) -> ExpertLinear:
        """Turn a linear layer, or a `FrozenLinear`, into an `ExpertLinear` in place, and return it."""
        self: ExpertLinear = cls.take(layer)
        self._start_experts(experts)
        return self

    def _start_experts(self, experts: Mapping[str, LoRA]) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.experts = Experts()
        self.off: set[str] = set()           # experts that are not applied
        self.lora_a, self.lora_b = Pairs(), Pairs()
        self.block: int | None = None        # 1-based number of the transformer block this layer belongs to
        self.routes: list[Route] = []        # those of all threads
        self.plans = Plans()                 # what the CUDA kernels keep for this layer
        self.siblings: Siblings | None = None
        self.merged: tuple[str, PairState, nn.Parameter] | None = None   # what `merge` changed
        for name, lora in experts.items():
            self.add_expert(name, lora)

    def add_expert(self, name: str, lora: LoRA) -> None:
        """Add an expert in the frozen state. Since its B is zero, the output does not change.

        Raises:
            ValueError: If the name is taken or unusable, or if the dropout differs from that of the layer's other experts,
                which share one dropout mask.
        """
        check_experts(self.experts, {name: lora})
        weight = self._parameters["weight"] if self.frozen is None else self.frozen.scale
        like: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        a = torch.empty(lora.rank, self.in_features, **like)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_a[name] = nn.Parameter(a, requires_grad=False)
        self.lora_b[name] = nn.Parameter(torch.zeros(self.out_features, lora.rank, **like), requires_grad=False)
        self.experts[name] = lora

    @property
    def states(self) -> dict[str, PairState]:
        """The state of each expert's pair, by the expert's name."""
        return {name: PairState.OFF if name in self.off else PairState.TRAINED if self._trains(name) else PairState.FROZEN
                for name in self.experts}

    def _trains(self, expert: str) -> bool:
        return self.lora_a[expert].requires_grad or self.lora_b[expert].requires_grad

    def set_state(self, expert: str, state: PairState | str) -> None:
        """Set the state of an expert's pair, and `requires_grad` of its parameters to match.

        Raises:
            KeyError: If the layer has no such expert.
            ValueError: If `state` is not off, frozen or trained.
            RuntimeError: If the expert is merged into the weight: applying it would count it twice.
        """
        self._check_has(expert)
        try:
            state = PairState(state)
        except ValueError:
            raise ValueError(f"state is {state!r}, expected {', '.join(s.value for s in PairState)}") from None
        if self.merged is not None and self.merged[0] == expert and state is not PairState.OFF:
            raise RuntimeError(f"expert {expert!r} is merged into the weight; unmerge it before it is {state.value}")
        (self.off.add if state is PairState.OFF else self.off.discard)(expert)
        for p in (self.lora_a[expert], self.lora_b[expert]):
            p.requires_grad_(state is PairState.TRAINED)
            if state is not PairState.TRAINED:
                p.grad = None

    def _check_has(self, expert: str) -> None:
        if expert not in self.experts:
            raise KeyError(f"no expert {expert!r} in this layer; it has {sorted(self.experts)}")

    @property
    def applied(self) -> list[str]:
        """Names of the applied experts, those that are frozen or trained, in order."""
        return [name for name in self.experts if name not in self.off]

    @property
    def gate(self) -> Tensor | None:
        """The gate of the calling thread, or None; see the class."""
        return self._route().gate

    @property
    def segments(self) -> Sequence[int] | None:
        """The segments of the calling thread, or None; see the class."""
        return self._route().segments

    def _route(self) -> Route:
        if not self.routes:
            return _EVERYWHERE
        own = HERE.routes.get(self)
        if own is None and torch._C._current_graph_task_id() != -1:
            # Activation checkpointing recomputes a layer in a thread of autograd, which has no route of its own.
            if len(self.routes) > 1:
                raise RuntimeError("activation checkpointing recomputes a gated layer that several threads use, and cannot "
                                   "know whose gate to take; run the backward passes one after the other, or turn checkpointing off")
            own = self.routes[0]
        return _EVERYWHERE if own is None else own

    def forward(self, x: Tensor) -> Tensor:
        # Attribute access on a module searches `_modules` and `_parameters` last; reading these dicts saves 20 us a call.
        modules: dict[str, Any] = self._modules
        parameters: dict[str, Any] = self._parameters
        frozen, off, experts = modules.get("frozen"), self.off, self.experts
        if self.siblings is not None and not torch.compiler.is_compiling():
            together = self.siblings.output(self, x)
            if together is not None:
                return together
        if len(off) == len(experts):
            return super().forward(x)
        weight = parameters.get("weight") if frozen is None and self.plain is nn.Linear else frozen
        if weight is None:
            weight = self.matrix()
        bias = parameters["bias"] if "bias" in parameters else self.bias
        a, b, scale = [*modules["lora_a"]._parameters.values()], [*modules["lora_b"]._parameters.values()], experts.scales
        route = self._route() if self.routes else _EVERYWHERE
        segments = None if route.segments is None else self._segments_of_rows(x, route.segments)
        gate = None if route.gate is None else self._gate_of_rows(x, route)
        active = [name not in off for name in experts] if off else None
        if active is not None and gate is None and segments is None:
            a, b, scale = [*compress(a, active)], [*compress(b, active)], (*compress(scale, active),)
            active = None
        dropout = experts.dropout if experts.dropout and self.training else 0.0
        if dropout > 0.0:
            applied = (*a, *b) if active is None else (*compress(a, active), *compress(b, active))
            dropout = dropout if any([pair.requires_grad for pair in applied]) else 0.0
        seed = draw_seed(x) if dropout > 0.0 else None
        if type(x) is Tensor and getattr(x, ON_GPU) and segments is None and active is None:
            y = planned_linear(self.plans, x, weight, bias, a, b, scale, gate, dropout, 0 if seed is None else seed)
            if y is not None:
                return y
        return expert_linear(x, weight, bias, a, b, scale, gate, active, dropout, seed, segments)

    def as_sibling(self, x: Tensor) -> Sibling | None:
        """See `SharesInput`. The layer has to be called if rows of x take different experts (`segments`), if its `forward` was replaced,
        or if it has a hook that runs before it, which may change x or load the weight."""
        route = self._route()
        if route.segments is not None or self._forward_pre_hooks or "forward" in vars(self):
            return None
        modules: dict[str, Any] = self._modules   # and `_parameters`: see `forward`
        weight, experts = self.operand(), self.experts
        a, b, scale = [*modules["lora_a"]._parameters.values()], [*modules["lora_b"]._parameters.values()], experts.scales
        gate = None if route.gate is None or not a else self._gate_of_rows(x, route)
        if self.off:
            applied = [i for i, name in enumerate(experts) if name not in self.off]
            a, b, scale = [a[i] for i in applied], [b[i] for i in applied], tuple([scale[i] for i in applied])
            gate = gate[..., applied] if gate is not None and applied else None
        dropout = experts.dropout if experts.dropout and self.training else 0.0
        if dropout > 0.0 and not any([pair.requires_grad for pair in (*a, *b)]):
            dropout = 0.0
        return Sibling(weight, self._parameters["bias"] if "bias" in self._parameters else self.bias, a, b, scale, gate, dropout, 0)

    def sibling_kind(self) -> tuple[object, ...]:
        """See `SharesInput`."""
        return self.training, self.frozen is None, len(self.off), len(self.experts), len(self.routes)

    def sibling_state(self) -> tuple[list[Tensor | None], tuple[object, ...]]:
        """See `SharesInput`."""
        modules: dict[str, Any] = self._modules   # and `_parameters`: see `forward`
        frozen, route = modules.get("frozen"), self._route()
        pairs = [*modules["lora_a"]._parameters.values(), *modules["lora_b"]._parameters.values()]
        weight = frozen.operands if frozen is not None else (self.operand(),)
        return [*weight, self._parameters.get("bias"), route.gate, *pairs], (
            self.training, self.off.copy(), self.experts.scales, [pair.requires_grad for pair in pairs], route.segments, len(self.routes))

    def operand(self) -> Any:
        """Return the weight as the operators take it: (N, K), a tensor or a quantized weight."""
        frozen = self._modules.get("frozen")
        weight = self._parameters.get("weight") if frozen is None and self.plain is nn.Linear else frozen
        return self.matrix() if weight is None else weight

    def _gate_of_rows(self, x: Tensor, route: Route) -> Tensor:
        gate = route.gate
        columns = len(self.experts) if route.segments is None else 1
        if gate.shape == (*x.shape[:-1], columns):
            return gate
        if gate.dim() == 3 and gate.shape[-1] == columns and gate.shape[:2].numel() == x.shape[:-1].numel():
            return gate.reshape(*x.shape[:-1], columns)     # a gate for every token; x may be flattened to (B T, K)
        if gate.dim() != 2 or gate.shape[1] != columns or gate.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"gate must be (B, E) = ({x.shape[0]}, {columns}) for an input of shape "
                             f"{tuple(x.shape)}, got {tuple(gate.shape)}")
        return gate.reshape(gate.shape[0], *([1] * (x.dim() - 2)), columns).expand(*x.shape[:-1], columns)

    def _segments_of_rows(self, x: Tensor, samples: Sequence[int]) -> list[int]:
        rows, total = x.shape[:-1].numel(), sum(samples)
        flattened = x.dim() == 2 and total > 0 and rows % total == 0      # (B T, K), as OPT gives it to its second half
        if len(samples) != len(self.experts) or x.dim() < 2 or (x.shape[0] != total and not flattened):
            raise ValueError(f"segments must be {len(self.experts)} numbers of samples, {x.shape[0]} in all, for an input "
                             f"of shape {tuple(x.shape)}, got {list(samples)}")
        return [count * (rows // total) if total else 0 for count in samples]

    def delta(self, expert: str) -> Tensor:
        """Return `s * B A` of one expert, (N, K), computed in float32 or float64."""
        a, b = self.lora_a[expert].detach(), self.lora_b[expert].detach()
        return self.experts[expert].scale * (b @ a)

    def check_merge(self, expert: str) -> None:
        """Raise the errors of `merge`, except the one about values that are not finite."""
        self._check_has(expert)
        if self.frozen is not None:
            raise RuntimeError("the weight is quantized, so nothing can be merged into it; call fedms_ext.dequantize "
                               "with the original weights first")
        if self.merged is not None:
            raise RuntimeError(f"expert {self.merged[0]!r} is merged already; unmerge it first")
        if self.routes:
            raise RuntimeError("an expert cannot be merged while a gate or segments are set, since its weight differs by "
                               "sample; leave the context of fedms_ext.gated or fedms_ext.segmented first")
        if expert in self.off:
            raise RuntimeError(f"expert {expert!r} is off in this layer, so there is nothing to merge; activate it first")
        if reason := unplain(self):
            raise ValueError(f"nothing can be merged into this layer: {reason}")
        if self.matrix().is_meta:
            raise ValueError("nothing can be merged into this layer: its weight is offloaded or was never loaded; load it")

    @torch.no_grad()
    def merge(self, expert: str) -> None:
        """Replace the weight by the sum of the weight and the expert, and turn the expert's pair off.

        The original parameter is kept unchanged, for `unmerge` and for other modules that share it.

        Raises:
            KeyError: If the layer has no such expert.
            RuntimeError: If the expert is off, an expert is merged already, a gate is set, or the weight is quantized.
            ValueError: If the merged weight would hold an infinity or a NaN.
        """
        self.check_merge(expert)
        original: Any = self._parameters["weight"]
        delta = self._as_stored(self.delta(expert))
        weight = (original.to(delta.dtype) + delta).to(original.dtype)
        if not weight.isfinite().all():
            raise ValueError(f"the sum of the weight and expert {expert!r} holds an infinity or a NaN; nothing was merged")
        self.merged = (expert, self.states[expert], original)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.set_state(expert, PairState.OFF)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight from before `merge`, bit for bit, and the state of the expert's pair.

        Raises:
            RuntimeError: If no expert is merged.
        """
        if self.merged is None:
            raise RuntimeError("no expert is merged into this layer")
        expert, state, original = self.merged
        now: Any = self._parameters["weight"]
        if (original.device, original.dtype) != (now.device, now.dtype):  # the model was moved in between
            original = nn.Parameter(original.detach().to(now.device, now.dtype), requires_grad=False)
        self.weight, self.merged = original, None
        self.set_state(expert, state)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        states = self.states
        for name, lora in self.experts.items():
            numbers = [lora.rank, lora.alpha, lora.dropout, lora.rslora, STATES.index(states[name])]
            destination[f"{prefix}pairs.{name}"] = torch.tensor(numbers, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "weight" in state_dict:
            self.merged = None
        keys = {name: f"{prefix}pairs.{name}" for name in self.experts if f"{prefix}pairs.{name}" in state_dict}
        unexpected[:] = [key for key in unexpected if key not in keys.values()]
        try:
            saved = {name: saved_pair(state_dict[key], self.lora_a[name].shape[0]) for name, key in keys.items()}
            experts = Experts({**self.experts, **{name: lora for name, (lora, _) in saved.items()}})
            check_experts({}, experts)
        except ValueError as error:
            errors.append(f"{prefix}pairs: {error}")
            return
        self.experts = experts
        for name, (_, state) in saved.items():
            if self.merged is None or self.merged[0] != name:
                self.set_state(name, state)

    def leave(self) -> None:
        """Turn the layer, in place, into the layer that it was before it got experts, or into a `FrozenLinear` if its
        weight is quantized. The experts are deleted; merge one first to keep it."""
        if self.siblings is not None:
            self.siblings.part()
        del self.siblings, self.experts, self.off, self.lora_a, self.lora_b, self.block, self.routes, self.plans, self.merged
        super().leave()

    def extra_repr(self) -> str:
        pairs = ", ".join(f"{e}: r={self.experts[e].rank} {state.value}" for e, state in self.states.items())
        return f"{super().extra_repr()}, experts=({pairs})"
