"""Operations of this package's operators, for `torch.utils.flop_counter.FlopCounterMode`: importing this module registers
them. It is no part of `import fedms_ext`, which would then take as long as loading torch's counter does.

One multiply-add counts as two, as in torch's own formulas; int8 products count like any others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def _rows(rows: int, lora_a: Sequence[Shape], segments: Sequence[int] | None) -> Sequence[int]:
    """Of each expert."""
    return [rows] * len(lora_a) if segments is None else segments


def _forward(rows: int, k: int, n: int, lora_a: Sequence[Shape], segments: Sequence[int] | None) -> int:
    pairs = sum(count * a[0] for count, a in zip(_rows(rows, lora_a, segments), lora_a))
    return 2 * (rows * k * n + pairs * (k + n))


def _backward(
    rows: int, k: int, n: int, lora_a: Sequence[Shape], segments: Sequence[int] | None, needs_dx: bool,
    needs_dgate: bool, needs_da: Sequence[bool], needs_db: Sequence[bool],
) -> int:  # fmt: skip
    products = rows * k * n if needs_dx else 0
    for count, a, da, db in zip(_rows(rows, lora_a, segments), lora_a, needs_da, needs_db):
        # dy B, of it dx and dA; and dB.
        products += count * a[0] * (n * (needs_dx or needs_dgate or da) + k * needs_dx + k * da + n * db)
    return 2 * products


@register_flop_formula(torch.ops.fedms_ext.expert_linear)
def expert_linear(x, weight, bias, lora_a, lora_b, scale, gate, segments, *_, **__) -> int:
    """Of shapes: x (..., K), weight (N, K), every A (r, K)."""
    return _forward(math.prod(x[:-1]), x[-1], weight[0], lora_a, segments)


@register_flop_formula(torch.ops.fedms_ext.frozen_linear)
def frozen_linear(x, weight, weight_scale, kind, group, bias, lora_a, lora_b, scale, gate, segments, *_, **__) -> int:
    """Of shapes: x (..., K), weight_scale (N, ...), every A (r, K)."""
    return _forward(math.prod(x[:-1]), x[-1], weight_scale[0], lora_a, segments)


@register_flop_formula(torch.ops.fedms_ext.expert_linear_backward)
def expert_linear_backward(
    dy, x, weight, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, *needs, **_
) -> int:  # fmt: skip
    """Of shapes: dy (..., N), weight (N, K), every A (r, K); counted is what `needs` asks for."""
    return _backward(math.prod(dy[:-1]), weight[1], weight[0], lora_a, segments, *needs)


@register_flop_formula(torch.ops.fedms_ext.frozen_linear_backward)
def frozen_linear_backward(
    dy, x, k, weight, weight_scale, kind, group, lora_a, lora_b, scale, gate, segments, s, dropout_p, seed, *needs, **_
) -> int:  # fmt: skip
    """As `expert_linear_backward`."""
    return _backward(math.prod(dy[:-1]), k, dy[-1], lora_a, segments, *needs)
