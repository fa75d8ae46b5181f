"""The gate adapter: the small trainable part of the gate network (Mixture of Foundation Models)."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GateAdapter(nn.Module):
    """Compute the weight of each expert for each sample: `softmax(logits(features) / temperature)`.

    The logits come from a LayerNorm, a bottleneck MLP with a residual connection, and a linear layer with one output per
    expert. The gate network as a whole is the frozen foundation model, which computes the pooled features, followed by
    this adapter. The last layer is initialized to zero, so that all experts start with equal weights.

    Args:
        dim: Width of the features.
        experts: Number of experts, E.
        bottleneck: Inner width of the MLP.
        temperature: Divides the logits; above 0. A larger temperature gives more equal weights.
        side: Number of further inputs. They bypass the MLP through a linear map of their own.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, experts: int = 2, bottleneck: int = 16, temperature: float = 1.0,
                 side: int = 0) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("experts", experts), ("bottleneck", bottleneck)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        self.temperature = temperature
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.out = nn.Linear(dim, experts)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.side_inputs = side
        if side:
            self.side = nn.Linear(side, experts, bias=False)
            nn.init.zeros_(self.side.weight)

    def forward(self, features: Tensor, side: Tensor | None = None) -> Tensor:
        """Map features (B, dim) and further inputs (B, side), or None, to weights (B, experts) whose rows sum to 1."""
        h = self.norm(features)
        h = h + self.up(nn.functional.gelu(self.down(h)))
        logits = self.out(h) if side is None else self.out(h) + self.side(side)
        return torch.softmax(logits / self.temperature, dim=-1)
