"""How the server combines what clients send."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightedMean:
    """Weighted mean of each tensor over the clients that sent it, as replies stream in.

    The divisor is kept per tensor: where clients train different depths, a tensor is divided by the weight of those
    that trained it, or its update would shrink. Sums are in float64, in the order of arrival; callers add clients in
    ascending order of their ids, so that every engine gives the same bits.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Adds one reply.

        Raises:
            ValueError: if the weight is not above 0, or a tensor's shape differs from the one sent before.
        """
        if not weight > 0:
            raise ValueError(f"a reply's weight must be above 0, got {weight}")
        for name, tensor in tensors.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self.weights[name] = 0.0
            elif self.sums[name].shape != tensor.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not match {tuple(self.sums[name].shape)} "
                                 "sent by other clients")
            self.sums[name].add_(tensor.double(), alpha=weight)
            self.weights[name] += weight

    def result(self) -> dict[str, Tensor]:
        """The means, float32, for the tensors that anybody sent."""
        return {name: (total / self.weights[name]).float() for name, total in self.sums.items()}


class ResidualNorm:
    """Relative size of what averaging A and B apart loses:
    `||mean(B A) - mean(B) mean(A)|| / ||mean(B A)||` over all LoRA pairs together, Frobenius norms.

    Keeps the round's pairs (references, rank-sized) and never forms an N x K product: with the factors stacked,
    `||B A||^2 = sum((B^T B) * (A A^T))`.

    Source: definition, section 5; the residual of FedEx-LoRA (Singhal et al. 2024).
    """

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[Tensor, Tensor, float]]] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Takes the pairs `<layer>.lora_a` (r, K), `<layer>.lora_b` (N, r) out of one reply."""
        for name, a in tensors.items():
            if name.endswith(".lora_a"):
                layer = name.removesuffix(".lora_a")
                self.pairs.setdefault(layer, []).append((a, tensors[f"{layer}.lora_b"], weight))

    def result(self) -> float | None:
        """The relative norm; None if no pair was sent or all products are zero."""
        lost = kept = 0.0
        for _, pairs in sorted(self.pairs.items()):
            total = sum(weight for _, _, weight in pairs)
            a = torch.cat([a.double() for a, _, _ in pairs])
            b = torch.cat([b.double() * (weight / total) for _, b, weight in pairs], dim=1)
            mean_a = sum(a.double() * (weight / total) for a, _, weight in pairs)
            mean_b = sum(b.double() * (weight / total) for _, b, weight in pairs)
            kept += _product_norm_squared(a, b)
            lost += _product_norm_squared(torch.cat([a, mean_a]), torch.cat([b, -mean_b], dim=1))
        return (lost / kept) ** 0.5 if kept > 0 else None


def _product_norm_squared(a: Tensor, b: Tensor) -> float:
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)
