"""The gate adapter: the small trainable part of the gate network (Mixture of Foundation Models)."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GateAdapter(nn.Module):
    """Weights of the experts for each sample: `softmax(gate(features) / temperature)`.

    LayerNorm, a bottleneck MLP with a residual connection, and one output per expert (definition, section 3; the
    gate network's large part is the frozen foundation model whose pooled features arrive here). The last layer
    starts at zero, so the gate begins at equal weights and moves only where that lowers the loss.

    Args:
        dim: width of the features.
        experts: number of outputs.
        bottleneck: inner width of the MLP.
        temperature: divides the gate's logits; above 0. Larger is softer.
        side: number of further inputs, which reach the outputs by a linear map of their own, past the bottleneck.

    Raises:
        ValueError: if an argument is out of range.
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
        """features (B, dim), further inputs (B, side) or None -> weights (B, experts), rows sum to 1."""
        h = self.norm(features)
        h = h + self.up(nn.functional.gelu(self.down(h)))
        logits = self.out(h) if side is None else self.out(h) + self.side(side)
        return torch.softmax(logits / self.temperature, dim=-1)
