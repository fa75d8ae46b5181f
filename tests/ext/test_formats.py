"""The formats of frozen weights: what is stored, and how far it lies from the weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fedms_ext import QuantizedWeight, reference
from fedms_ext.quantization.formats import KINDS, quantize

FOUR_BITS = ["nf4", "int4"]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("n, k", [(1, 1), (3, 64), (5, 65), (7, 129), (64, 384)])
def test_every_value_goes_to_the_nearest_level(kind, group, n, k):
    weight = torch.randn(n, k) * torch.rand(n, 1)
    codes, scale = reference.quantize_groups(weight, kind, group)
    assert codes.dtype == torch.uint8 and codes.max() <= 15 and scale.shape == (n, -(-k // group))
    got = reference.dequantize_groups(codes, scale, kind, group)
    # All levels of every value's group, beside the one that was taken.
    wide = scale.double().repeat_interleave(group, 1)[:, :k, None] * torch.tensor(reference.LEVELS[kind]).double()
    nearest = (wide - weight.double()[:, :, None]).abs().amin(2)
    assert torch.allclose((got - weight).abs().double(), nearest, atol=1e-6 * weight.abs().max().item())


def test_nf4_has_the_levels_of_the_normal_distribution():
    # The construction of QLoRA: quantiles of N(0, 1) between the probability `end` and one half, 8 above zero and 7
    # below, over the largest.
    normal = torch.distributions.Normal(0.0, 1.0)
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
    assert torch.allclose(torch.tensor(reference.LEVELS["nf4"], dtype=torch.float64), levels, atol=1e-6)


def test_int4_uses_the_sign_of_the_largest_value():
    codes, scale = reference.quantize_groups(torch.tensor([[4.0, -1.0, 0.5, 0.0, -4.0]]), "int4", 32)
    assert scale.tolist() == [[-0.5]] and codes.tolist() == [[0, 10, 7, 8, 15]]


@pytest.mark.parametrize("kind, most", [("nf4", 0.094), ("int4", 0.097)])
def test_errors_on_normal_weights(kind, most):
    weight = torch.randn(256, 512)
    got = {group: error(reference.dequantize_groups(*reference.quantize_groups(weight, kind, group), kind, group), weight)
           for group in (32, 64)}  # fmt: skip
    assert 0.05 < got[32] < got[64] < most
    codes, scale = reference.quantize_groups(weight, kind)
    q, row_scale = reference.groups_as_int8(codes, scale, kind)
    assert q.abs().max() <= 63 and torch.equal(q, q.round())
    # What this adds is small beside the error of 4 bits.
    assert error(q * row_scale[:, None], reference.dequantize_groups(codes, scale, kind)) < 0.018
    assert error(q * row_scale[:, None], weight) < 1.03 * got[64]


@pytest.mark.parametrize("k", [0, 1, 2, 7, 64])
def test_nibbles(k):
    codes = torch.randint(0, 16, (5, k), dtype=torch.uint8)
    packed = reference.pack_nibbles(codes)
    assert packed.shape == (5, (k + 1) // 2)
    assert torch.equal(reference.unpack_nibbles(packed, k), codes)
    if k > 1:
        assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_zeros_and_extremes(kind):
    weight = torch.zeros(4, 130)
    weight[1, 70], weight[2, :64], weight[3] = 1e-41, 3e38, -2.5
    got = QuantizedWeight(weight, kind).dequantize()
    assert torch.equal(got[0], weight[0]) and torch.equal(got[3], weight[3])
    assert error(got[1:3], weight[1:3]) < 0.01
    codes, scale = reference.quantize_groups(weight, kind)
    q, row_scale = reference.groups_as_int8(codes, scale, kind)
    assert not q[0].any() and (q * row_scale[:, None]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(5, 7), (64, 384), (0, 4)])
def test_what_is_held(kind, n, k):
    weight = torch.randn(n, k)
    held = QuantizedWeight(weight, kind)
    shapes = {"int8": ((n, k), (n,)), "int8_rotated": ((n, k), (n,)), "fp16": ((n, k), (n, 0)), "bf16": ((n, k), (n, 0))}
    q_shape, scale_shape = shapes.get(kind, ((n, (k + 1) // 2), (n, -(-k // 64))))
    assert held.q.shape == q_shape and held.scale.shape == scale_shape and held.scale.dtype == torch.float32
    want = {"int8": 0.01, "int8_rotated": 0.01, "fp16": 3e-4, "bf16": 3e-3}.get(kind, 0.11)
    assert held.dequantize().shape == (n, k)
    if weight.numel():
        assert 0 < error(held.dequantize(), weight) < want
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert torch.equal(other.q, held.q) and torch.equal(other.dequantize(), held.dequantize())
    other = QuantizedWeight(torch.randn(n, k), kind)
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.dequantize(), held.dequantize())


@pytest.mark.parametrize("kind, most", [("int8", 0.27), ("int8_rotated", 0.27), ("fp16", 0.5), ("bf16", 0.5), ("nf4", 0.16),
                                        ("int4", 0.16)])
def test_bytes_held(kind, most):
    for n, k in [(384, 384), (1536, 384), (384, 1536), (768, 768)]:
        assert QuantizedWeight(torch.randn(n, k), kind).nbytes <= most * 4 * n * k


def test_refusals():
    with pytest.raises(ValueError, match="magnitude 1e\\+05, beyond the range of fp16; use bf16"):
        QuantizedWeight(torch.tensor([[1e5]]), "fp16")
    with pytest.raises(ValueError, match="group is 48, expected 32 or 64"):
        QuantizedWeight(torch.ones(2, 2), "nf4", 48)
    with pytest.raises(ValueError, match="cannot quantize to 'nf5'; expected int8"):
        QuantizedWeight(torch.ones(2, 2), "nf5")
    held = QuantizedWeight(torch.ones(2, 4), "nf4")
    with pytest.raises(RuntimeError, match=r"q is torch.int8 \(2, 4\).*expected torch.uint8 \(2, 2\)"):
        held.load_state_dict({**held.state_dict(), "q": torch.ones(2, 4, dtype=torch.int8), "scale": torch.ones(2)})
    with pytest.raises(RuntimeError, match='Missing key.*"identity"'):
        held.load_state_dict({name: tensor for name, tensor in held.state_dict().items() if name != "identity"})


@pytest.mark.parametrize("shape", [(1, 64), (700, 576), (3, 1), (5, 70_000), (0, 8)])
@pytest.mark.parametrize("kind", ["int8", "int8_rotated"])
def test_strips_of_rows_are_quantized_to_the_same_bits(shape, kind):
    weight = torch.randn(shape)
    q, scale = quantize(weight, kind, 64)
    if shape[0]:
        whole, levels = reference.quantize_weight(reference.rotate(weight) if kind == "int8_rotated" else weight)
        assert torch.equal(q, whole.to(torch.int8)) and torch.equal(scale, levels)
    else:
        assert q.shape == shape and scale.shape == (0,)
