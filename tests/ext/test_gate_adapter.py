"""fedms_ext.GateAdapter."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fedms_ext import GateAdapter


def randomized(**arguments) -> GateAdapter:
    gate = GateAdapter(**arguments)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=0.5)
    return gate


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_starts_at_equal_weights_and_can_leave_them(experts):
    gate = GateAdapter(dim=7, experts=experts)
    features = torch.randn(6, 7)
    weights = gate(features)
    assert torch.equal(weights, torch.full((6, experts), 1 / experts))
    if experts > 1:
        weights[:, 0].sum().backward()
        assert gate.out.weight.grad.any() and gate.out.bias.grad.any()


@pytest.mark.parametrize("shape", [(6,), (1,), (0,), (2, 3)])
def test_against_the_definition_in_float64(shape):
    gate = randomized(dim=7, experts=3, bottleneck=4, temperature=0.7).double()
    features = torch.randn(*shape, 7, dtype=torch.float64)
    mean = features.mean(-1, keepdim=True)
    variance = (features - mean).square().mean(-1, keepdim=True)
    h = (features - mean) / (variance + gate.norm.eps).sqrt() * gate.norm.weight + gate.norm.bias
    inner = h @ gate.down.weight.T + gate.down.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    h = h + inner @ gate.up.weight.T + gate.up.bias
    logits = (h @ gate.out.weight.T + gate.out.bias) / 0.7
    want = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert torch.allclose(gate(features), want, rtol=1e-12, atol=1e-14)


def test_weights_are_a_distribution_whatever_the_features():
    gate = randomized(dim=7, experts=3)
    for scale in (0.0, 1e-6, 1.0, 1e6, 1e15):
        weights = gate(scale * torch.randn(20, 7))
        assert torch.allclose(weights.sum(-1), torch.ones(20)) and (weights >= 0).all()


def test_temperature():
    gate, features = randomized(dim=7), torch.randn(50, 7)

    def sharpness(temperature: float) -> float:
        softer = copy.deepcopy(gate)
        softer.temperature = temperature
        return softer(features).max(-1).values.mean().item()

    assert sharpness(0.01) > sharpness(1.0) > sharpness(100.0) > 0.5
    assert sharpness(0.01) > 0.95 and sharpness(1e6) < 0.51


def test_samples_do_not_mix():
    gate, features = randomized(dim=7), torch.randn(5, 7)
    others = features.clone()
    others[1:] = torch.randn(4, 7)
    assert torch.allclose(gate(features)[0], gate(others)[0])


def test_gradcheck():
    gate = randomized(dim=5, experts=3, bottleneck=2, temperature=2.0).double()
    features = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*gate.named_parameters())

    def call(features, *values):
        return torch.func.functional_call(gate, dict(zip(names, values)), (features,))

    assert torch.autograd.gradcheck(call, (features, *values))


def test_learns_which_expert_is_better():
    gate = GateAdapter(dim=8, experts=2)
    features = torch.randn(200, 8)
    better = (features[:, 3] > 0).long()
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.nll_loss(gate(features).log(), better).backward()
        optimizer.step()
    assert (gate(features).argmax(-1) == better).float().mean() > 0.95


def test_size():
    gate = GateAdapter(dim=384, experts=2, bottleneck=16)
    assert sum(p.numel() for p in gate.parameters()) == 2 * 384 + (384 * 16 + 16) + (16 * 384 + 384) + 2 * 384 + 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(dim=3, experts=0), "experts must be at least 1, got 0"),
        (dict(dim=3, bottleneck=-1), "bottleneck must be at least 1, got -1"),
        (dict(dim=3, temperature=0.0), "temperature must be above 0 and finite, got 0.0"),
        (dict(dim=3, temperature=math.inf), "got inf"),
        (dict(dim=3, temperature=math.nan), "got nan"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GateAdapter(**arguments)
