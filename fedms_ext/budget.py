"""Cost model: floating-point operations of a model whose blocks are partly trained, partly a constant prefix.

One multiply-add counts as two operations. Counted are the Linear layers, their applied LoRA pairs, and the two
products of attention; normalisation, activations and softmax are left out (a few percent of a transformer).
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedms_ext.activation import blocks_of, prefix_depth
from fedms_ext.nn.expert_linear import ExpertLinear


@dataclass(frozen=True)
class BlockCost:
    """Per token: weights of the Linear layers, weights of the applied LoRA pairs, width of attention."""

    linear: int
    lora: int
    attention: int

    def forward(self, tokens: int, length: int) -> int:
        """Operations of a forward pass over `tokens` tokens in sequences of `length`, padding included."""
        return tokens * (2 * self.linear + 2 * self.lora + 4 * length * self.attention)

    def backward(self, tokens: int, length: int) -> int:
        """Operations of a backward pass: dx of every Linear layer (the frozen weight has no gradient), two products
        for each of attention's and LoRA's."""
        return tokens * (2 * self.linear + 4 * self.lora + 8 * length * self.attention)


def block_costs(model: nn.Module) -> list[BlockCost]:
    """The cost of each block with the pairs that are applied now."""
    costs = []
    for block in blocks_of(model):
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        lora = sum(layer.experts[e].rank * (layer.in_features + layer.out_features)
                   for layer in linears if isinstance(layer, ExpertLinear) for e in layer.applied)
        costs.append(BlockCost(linear=sum(m.in_features * m.out_features for m in linears), lora=lora,
                               attention=linears[0].in_features))
    return costs


def forward_flops(model: nn.Module, samples: int, length: int, *, first: int = 0, last: int | None = None) -> int:
    """Operations of running blocks first..last-1 (0-based; default all) on `samples` sequences of `length`."""
    return sum(cost.forward(samples * length, length) for cost in block_costs(model)[first:last])


def backward_flops(model: nn.Module, samples: int, length: int) -> int:
    """Operations of the backward pass down to the end of the constant prefix."""
    return sum(cost.backward(samples * length, length) for cost in block_costs(model)[prefix_depth(model):])
