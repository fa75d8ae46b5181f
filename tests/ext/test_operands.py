"""Which tensors a layer takes, and what it keeps between calls: subclasses, views, modes, transforms, scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, QuantizedWeight, expert_linear, reference
from fedms_ext.backends.base import made_once

M, K, N, R = 3, 16, 8, 4
OPERANDS = ("x", "weight", "bias", "a", "b", "gate", "scale")


def operands(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "a": (R, K), "b": (N, R), "gate": (M, 1), "scale": (1,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def floating(o: dict[str, Tensor]) -> Tensor:
    return expert_linear(o["x"], o["weight"], o["bias"], [o["a"]], [o["b"]], o["scale"], o["gate"])


FROZEN = QuantizedWeight(operands()["weight"], "fp16")


def frozen(o: dict[str, Tensor]) -> Tensor:
    return expert_linear(o["x"], FROZEN, o["bias"], [o["a"]], [o["b"]], o["scale"], o["gate"])


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("run", [floating, frozen])
def test_a_tensor_without_memory_is_refused_or_passed_on(run, name):
    if run is frozen and name == "weight":
        pytest.skip("a quantized weight is no operand of its own")
    o = operands()
    with FakeTensorMode():
        fake = torch.empty(o[name].shape)
    with pytest.raises((AssertionError, TypeError, ValueError, RuntimeError)):
        run({**o, name: fake})
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
        run({**o, name: torch.empty(o[name].shape, device="meta")})


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_subclass_is_computed_by_its_own_rules(name, grad):
    o, other = operands(), operands(1)
    with torch.set_grad_enabled(grad):
        pair = floating({**o, name: TwoTensor(o[name], other[name])})
    assert isinstance(pair, TwoTensor)
    assert torch.allclose(pair.a, floating(o)) and torch.allclose(pair.b, floating({**o, name: other[name]}))


@pytest.mark.parametrize("name", ["x", "a", "b", "gate", "weight"])
@pytest.mark.parametrize("run", [floating, frozen])
def test_a_view_that_is_negated_when_it_is_read(run, name):
    o = operands()
    negated = run({**o, name: torch._neg_view(o[name])})
    assert torch.allclose(negated, run({**o, name: -o[name]}), atol=1e-6)


def test_a_gradient_that_is_negated_when_it_is_read():
    o = operands()
    a = o["a"].requires_grad_(True)
    dy = torch.ones(M, N)
    (plain,) = torch.autograd.grad(floating(o), a, -dy)
    (viewed,) = torch.autograd.grad(floating(o), a, torch._neg_view(dy))
    assert torch.allclose(plain, viewed, atol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_inference_mode_leaves_nothing_behind(quantized):
    layer = ExpertLinear(K, N, experts={"e": LoRA(R, 8.125)})  # a scale that no other test uses
    layer.set_state("e", "trained")
    if quantized:
        fedms_ext.quantize(layer)
    x = torch.randn(M, K)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.lora_b["e"].grad.abs().sum() > 0


def test_fake_mode_leaves_nothing_behind():
    layer = ExpertLinear(K, N, experts={"e": LoRA(R, 9.375)})
    x = torch.randn(M, K)
    want = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(M, K))
    assert torch.equal(layer(x), want)


def test_a_kept_constant_belongs_to_no_mode():
    made = made_once(2)(lambda value: torch.full((1,), value))
    with torch.inference_mode():
        assert not made(1.0).is_inference()
    with FakeTensorMode():
        made(2.0)
    assert type(made(2.0)) is Tensor and made(2.0) is made(2.0)
    made(3.0), made(4.0)
    assert made(1.0).item() == 1.0


def test_a_scale_that_is_changed_in_place():
    o = operands()
    scale = torch.tensor(2.0)
    call = lambda: expert_linear(o["x"], o["weight"], None, [o["a"]], [o["b"]], [scale])  # noqa: E731
    call()
    scale.fill_(5.0)
    assert torch.allclose(call(), reference.expert_linear(o["x"], o["weight"], None, [o["a"]], [o["b"]], [5.0]), atol=1e-5)


def test_the_transposed_weight_follows_a_change_in_place():
    weight = QuantizedWeight(torch.randn(N, K))
    x = torch.randn(M, K, requires_grad=True)
    (before,) = torch.autograd.grad(expert_linear(x, weight, None).sum(), x)
    weight.scale.mul_(2)
    (after,) = torch.autograd.grad(expert_linear(x, weight, None).sum(), x)
    assert torch.allclose(after, 2 * before, atol=1e-3)


@pytest.mark.parametrize("run", [floating, frozen])
def test_vmap_and_grad(run):
    o = operands()
    rows = torch.randn(5, M, K)
    mapped = torch.func.vmap(lambda x: run({**o, "x": x}))(rows)
    assert torch.allclose(mapped, torch.stack([run({**o, "x": x}) for x in rows]), atol=1e-3)
    found = torch.func.grad(lambda a: run({**o, "a": a}).square().sum())(o["a"])
    a = o["a"].clone().requires_grad_(True)
    (want,) = torch.autograd.grad(run({**o, "a": a}).square().sum(), a)
    assert torch.allclose(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_experts_stay_float32(dtype):
    def dtypes(layer: ExpertLinear) -> set[torch.dtype]:
        return {p.dtype for p in (*layer.lora_a.values(), *layer.lora_b.values())}

    layer = ExpertLinear(K, N, experts={"e": LoRA(R, 8)}, dtype=dtype)
    assert dtypes(layer) == {torch.float32} and layer.weight.dtype == dtype
    assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype
    became = ExpertLinear(K, N, experts={"e": LoRA(R, 8)})
    bits = became.lora_a["e"].clone()
    became.to(dtype)
    assert dtypes(became) == {torch.float32} and torch.equal(became.lora_a["e"], bits) and became.weight.dtype == dtype
    saved = {name: t.to(dtype) if "lora" in name else t for name, t in became.state_dict().items()}
    became.load_state_dict(saved, assign=True)
    assert dtypes(became) == {torch.float32}
    assert dtypes(became.double()) == {torch.float64}


def test_a_nested_or_sparse_input_is_refused_by_name():
    o = operands()
    with pytest.raises(TypeError, match="x has the layout torch.sparse_coo, expected a dense tensor"):
        floating({**o, "x": o["x"].to_sparse()})
    with pytest.raises(TypeError, match="nested"):
        floating({**o, "x": torch.nested.nested_tensor([torch.randn(2, K), torch.randn(1, K)])})


