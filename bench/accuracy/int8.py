"""Where the error of int8 comes from, and what would lessen it, on MiniLM's own activations.

    python -m bench.accuracy.int8

Emulated in fp32: both operands are rounded as the kernels do it, or otherwise, and multiplied by `F.linear`. The inputs are
2,048 rows of a batch of the built-in sentiment data; what looks at activations beforehand sees the batch's other rows.
`bench.accuracy.cpu` has the kernels' own errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench.accuracy.cpu import Case, error
from bench.accuracy.rounding import rounded_groups, rounded_rows, rounded_weight
from torch import Tensor

ROWS = 2048


def clipped(w: Tensor) -> Tensor:
    """Every row of the weight with the scale, of ten smaller ones, that brings it closest."""
    best, least = w, torch.full((len(w), 1), torch.inf)
    for part in torch.linspace(0.8, 1, 10):
        scale = part * w.abs().amax(1, keepdim=True) / 127
        found = torch.round(w / scale).clamp(-127, 127) * scale
        loss = (found - w).square().sum(1, keepdim=True)
        best, least = torch.where(loss < least, found, best), torch.minimum(loss, least)
    return best


def without_largest(x: Tensor, count: int) -> Tensor:
    """The largest of every row exactly, beside the others."""
    apart = torch.zeros_like(x).scatter(1, x.abs().topk(count, 1).indices, 1.0) * x
    return rounded_rows(x - apart) + apart


# Each takes x, the weight, and activations seen before, and gives the output without the bias.
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def smoothed(alpha: float, seen: bool) -> Way:
    """Channel by channel divided in x and multiplied in the weight (SmoothQuant, Xiao et al. 2023)."""

    def way(x: Tensor, w: Tensor, before: Tensor) -> Tensor:
        of_x = before.abs().amax(0).clamp_min(1e-5) ** alpha if seen else 1
        factor = of_x / w.abs().amax(0).clamp_min(1e-5) ** (1 - alpha)
        return F.linear(rounded_rows(x / factor), rounded_weight(w * factor))

    return way


WAYS: dict[str, Way] = {
    "as it is, 255 steps": lambda x, w, _: F.linear(rounded_rows(x), rounded_weight(w)),
    "as it is, 4095 steps": lambda x, w, _: F.linear(rounded_rows(x, 4095), rounded_weight(w)),
    "the weight alone": lambda x, w, _: F.linear(x, rounded_weight(w)),
    "x alone, 255 steps": lambda x, w, _: F.linear(rounded_rows(x), w),
    "the best scale a row of the weight": lambda x, w, _: F.linear(rounded_rows(x), clipped(w)),
    "smoothed by the weight alone": smoothed(0.75, False),
    "smoothed by activations seen, alpha 0.5": smoothed(0.5, True),
    "x in two groups of columns": lambda x, w, _: F.linear(rounded_groups(x, x.shape[1] // 2), rounded_weight(w)),
    "x in groups of 128": lambda x, w, _: F.linear(rounded_groups(x, 128), rounded_weight(w)),
    "the mean of activations seen taken from x": lambda x, w, seen: F.linear(
        rounded_rows(x - seen.mean(0)) + seen.mean(0), rounded_weight(w)
    ),
    "the largest of a row exactly": lambda x, w, _: F.linear(without_largest(x, 1), rounded_weight(w)),
    "the two largest of a row exactly": lambda x, w, _: F.linear(without_largest(x, 2), rounded_weight(w)),
}


@torch.no_grad()
def main() -> None:
    case = Case()
    with torch.enable_grad():
        recorded = [(layer, x.flatten(0, -2)) for layer, x, _ in case.record()]
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for layer, x in recorded:
        before, x = x[ROWS:], x[:ROWS]
        for name, way in WAYS.items():
            y = way(x, layer.weight, before)
            errors[name].append(error(y if layer.bias is None else y + layer.bias, layer(x)))
    print("| int8 | error of the output, %: mean, worst layer |\n| --- | --- |")
    for name, found in errors.items():
        print(f"| {name} | {sum(found) / len(found):.2f}, {max(found):.2f} |")


if __name__ == "__main__":
    main()
