"""A backend of a user's own: registered from outside, chosen where it supports and prefers a call, refused where it is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, QuantizedWeight, expert_linear
from fedms_ext.backends import cpu_is_chosen, eager, registry
from fedms_ext.profiling import Served


@pytest.fixture
def doubling(monkeypatch):
    """A backend for three rows whose forward pass gives twice the right y."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_usable", list(registry._usable))

    def forward(call):
        y, s = eager.forward(call)
        return 2 * y, s

    return SimpleNamespace(
        name="doubling", unavailable=lambda: None, forward=forward, backward=eager.backward,
        supports=lambda call: None if call.input.shape[0] == 3 else "it takes three rows", prefers=lambda call: True,
    )  # fmt: skip


def operands(rows):
    return torch.randn(rows, 8), torch.randn(4, 8), None, [torch.randn(2, 8)], [torch.randn(4, 2)], [0.5]


def test_it_computes_what_it_supports_and_nothing_else(doubling):
    three, two = operands(3), operands(2)
    with fedms_ext.use_backend("eager"):
        y3, y2 = expert_linear(*three), expert_linear(*two)
    fedms_ext.register_backend(doubling, before="cpu")
    assert fedms_ext.available()[0] == "doubling" and fedms_ext.explain("doubling") is None
    assert torch.allclose(expert_linear(*three), 2 * y3) and torch.allclose(expert_linear(*two), y2, atol=1e-6)
    with Served() as served:
        expert_linear(*three)
    assert set(served.backends()) == {"doubling"}
    with fedms_ext.use_backend("doubling"), pytest.raises(RuntimeError, match="'doubling' was asked for by name.*takes three rows"):
        expert_linear(*two)
    layer = ExpertLinear(8, 4, experts={"e": LoRA(2, 4)})
    layer.freeze(QuantizedWeight(layer.weight))
    assert not cpu_is_chosen()  # so that a layer does not take the short way past the registry
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), 2 * layer(torch.cat([x, x]))[:3], rtol=2e-2, atol=2e-2)


def test_what_is_no_backend_is_refused(doubling):
    with pytest.raises(TypeError, match="has no supports, prefers, forward, backward"):
        fedms_ext.register_backend(SimpleNamespace(name="half", unavailable=lambda: None))
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        fedms_ext.register_backend(doubling, before="tpu")
    doubling.name = "cpu"
    with pytest.raises(ValueError, match="there is a backend 'cpu' already"):
        fedms_ext.register_backend(doubling)


@pytest.mark.parametrize("segmented", [False, True])
def test_the_plan_of_a_backward_pass_covers_what_is_asked_for_and_no_more(segmented):
    from itertools import product

    from fedms_ext.backends.triton.plan import plan_backward

    for dx, dgate, *rest in product([False, True], repeat=6):
        da, db = tuple(rest[:2]), tuple(rest[2:])
        plan = plan_backward(dx, dgate, da, db, segmented)
        assert plan.needs_ds == (dx or any(da)) and plan.from_x_pass == da
        for e in range(2):
            needs_ds = dx or da[e] if segmented else plan.needs_ds
            # Whoever needs dS gets it from the pass over dy or from a shrink of its own, never from both.
            assert not (plan.from_dy_pass[e] and plan.shrink_only[e])
            if segmented:
                assert plan.from_dy_pass[e] == (dgate or db[e]) and plan.shrink_only[e] == (needs_ds and not plan.from_dy_pass[e])
            else:
                assert plan.from_dy_pass[e] == (dgate or any(db))
        if not segmented and plan.needs_ds:
            assert any(plan.from_dy_pass) != any(plan.shrink_only)
        assert plan.projects == (plan.needs_ds or dgate)
