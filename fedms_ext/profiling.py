"""Count operations, and find out which backend computes which products of a model::

    with Served() as served:
        model(x).sum().backward()
    served.backends()

Importing this module also registers the operators of this package with `torch.utils.flop_counter.FlopCounterMode`. `import
fedms_ext` does not import it, to save the time of importing torch's counter. One multiply-add counts as two operations, as in
torch's formulas, in int8 as in other dtypes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from . import backends
from .backends.base import Call
from .operators.definition import backward_call, forward_call

PYTORCH = "pytorch"  # label for operations that PyTorch computes: layers without an expert, attention, ...

Shape = Sequence[int]


def _rows_of_experts(rows: int, lora_a: Sequence[Shape], segments: Sequence[int] | None) -> Sequence[int]:
    """Return the number of rows that each expert processes."""
    return [rows] * len(lora_a) if segments is None else segments


@register_flop_formula(torch.ops.fedms_ext.expert_linear)
def _forward_flops(x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, segments, *_, **__) -> int:
    """Return the operations of a forward pass. All arguments are shapes: x (..., K); a floating weight, or the scale of a
    quantized one, (N, ...); every A (r, K)."""
    rows, k, n = math.prod(x[:-1]), x[-1], (weight if weight_scale is None else weight_scale)[0]
    pairs = sum(count * a[0] for count, a in zip(_rows_of_experts(rows, lora_a, segments), lora_a))
    return 2 * (rows * k * n + pairs * (k + n))


@register_flop_formula(torch.ops.fedms_ext.expert_linear_backward)
def _backward_flops(
    dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, segments, dropout_p, seed, seed_tensor, s,
    needs_dx, needs_dgate, needs_da, needs_db, **_,
) -> int:  # fmt: skip
    """Return the operations of the gradients that are needed. The tensor arguments are shapes: dy (..., N), every A (r, K)."""
    rows, n = math.prod(dy[:-1]), dy[-1]
    products = rows * k * n if needs_dx else 0
    for count, a, da, db in zip(_rows_of_experts(rows, lora_a, segments), lora_a, needs_da, needs_db):
        # dy B, from which dx and dA are computed; and dB
        products += count * a[0] * (n * (needs_dx or needs_dgate or da) + k * needs_dx + k * da + n * db)
    return 2 * products


# PyTorch's counter has no formula for its attention on a CPU.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}


class Product(NamedTuple):
    """The operator and the sizes of a call.

    Attributes:
        name: Name of the operator.
        rows, k, n: Number of rows M, input features K and output features N; 0 for operators of PyTorch without them.
        rank: Mean rank of the layer's experts; 0 without experts.
    """

    name: str
    rows: int = 0
    k: int = 0
    n: int = 0
    rank: float = 0.0

    def __str__(self) -> str:
        layer = f" {self.rows}; {self.k} -> {self.n}" if self.n else ""
        return self.name + layer + (f", r = {self.rank:g}" if self.rank else "")


class Served(TorchDispatchMode):
    """A context that counts calls and operations by backend.

    A call that the CPU backend computes with a 16-bit or 32-bit weight is counted as that backend's, even if PyTorch computes
    the frozen product in it.

    Attributes:
        calls: Number of calls by (backend, `Product`).
        flops: Number of operations by (backend, `Product`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, Product]] = Counter()
        self.flops: Counter[tuple[str, Product]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula: Any = flop_registry.get(func._overloadpacket) or _ATTENTION.get(func._overloadpacket)
        if formula is not None:
            key = _served(func._overloadpacket, args)
            self.calls[key] += 1
            self.flops[key] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def backends(self) -> dict[str, tuple[int, int]]:
        """Return (calls, operations) of each backend, the one with the most operations first."""
        totals: dict[str, tuple[int, int]] = {}
        for (name, product), flops in self.flops.items():
            calls, before = totals.get(name, (0, 0))
            totals[name] = calls + self.calls[name, product], before + flops
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def _served(packet: Any, args: tuple[Any, ...]) -> tuple[str, Product]:
    """Return the backend and the product of a call of an operator."""
    name = packet.__name__
    if packet in (torch.ops.aten.addmm, torch.ops.aten.mm):
        (rows, k), n = args[-2].shape, args[-1].shape[1]
        return PYTORCH, Product(name, rows, k, n)
    call: Call
    if packet is torch.ops.fedms_ext.expert_linear:
        call = forward_call(*args)
    elif packet is torch.ops.fedms_ext.expert_linear_backward:
        call = backward_call(*args)
    else:
        return PYTORCH, Product(name)
    lora, weight = call.lora, call.weight
    mean_rank = sum(lora.ranks) / max(1, len(lora.a))
    return backends.choose(call).name, Product(name, call.input.shape[:-1].numel(), weight.k, weight.n, mean_rank)
