"""Which backend computes which products of a model: `with Served() as served: model(x).sum().backward()`.

No part of `import fedms_ext`, as `flops`."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from . import (
    backends,
    flops,  # noqa: F401  registers the formulas
)
from .backends.base import Lora

PYTORCH = "pytorch"  # who computes what is no operator of this package: layers without an expert, attention, ...

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
    """What a call computes: `name` of the operator, rows M, K and N of the layer and the mean rank of its experts; 0 where
    an operator of PyTorch has none."""

    name: str
    rows: int = 0
    k: int = 0
    n: int = 0
    rank: float = 0.0

    def __str__(self) -> str:
        layer = f" {self.rows}; {self.k} -> {self.n}" if self.n else ""
        return self.name + layer + (f", r = {self.rank:g}" if self.rank else "")


class Served(TorchDispatchMode):
    """While it is active, `calls` and `flops` (a multiply-add counts as two) count by (backend, `Product`).

    A call that the CPU backend leaves to the eager one counts as the latter's. One of the CPU backend's own on a weight of
    16 or 32 bits may have its frozen product from PyTorch, as a part of it.
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
        """(calls, flops) of each backend, most flops first."""
        totals: dict[str, tuple[int, int]] = {}
        for (name, product), flops in self.flops.items():
            calls, before = totals.get(name, (0, 0))
            totals[name] = calls + self.calls[name, product], before + flops
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def _served(packet: Any, args: tuple[Any, ...]) -> tuple[str, Product]:
    ours = torch.ops.fedms_ext
    name = packet.__name__
    if packet is ours.expert_linear:
        x, weight, _, *lora = args
        (n, k), kind, backward = weight.shape, None, False
    elif packet is ours.frozen_linear:
        x, _, scale, kind, _, _, *lora = args
        n, k, backward = scale.shape[0], x.shape[-1], False
    elif packet is ours.expert_linear_backward:
        x, _, weight, a, b, scale, gate, segments, _, dropout_p, seed, *_ = args
        lora, (n, k), kind, backward = [a, b, scale, gate, segments, dropout_p, seed], weight.shape, None, True
    elif packet is ours.frozen_linear_backward:
        x, _, k, _, _, kind, _, a, b, scale, gate, segments, _, dropout_p, seed, *_ = args
        lora, n, backward = [a, b, scale, gate, segments, dropout_p, seed], x.shape[-1], True
    elif packet in (torch.ops.aten.addmm, torch.ops.aten.mm):
        (rows, k), n = args[-2].shape, args[-1].shape[1]
        return PYTORCH, Product(name, rows, k, n)
    else:
        return PYTORCH, Product(name)
    branch = Lora(*lora)
    mean_rank = sum(branch.ranks) / max(1, len(branch.a))
    return backends.serving(x, branch, kind, backward), Product(name, x.shape[:-1].numel(), k, n, mean_rank)
