"""fedms_ext.expert_linear as PyTorch sees it: autograd, compile, autocast, arguments, and PEFT beside it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedms_ext
from fedms_ext import LoRA, _C, activate, attach, expert_linear, philox_mask, quantize, reference
from fedms_ext.operators import dispatch

N, K = 9, 7


def operands(ranks, shape=(2, 5), dtype=torch.float64, n=N, k=K):
    x = torch.randn(*shape, k, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)
    a = [torch.randn(r, k, dtype=dtype, requires_grad=True) for r in ranks]
    b = [torch.randn(n, r, dtype=dtype, requires_grad=True) for r in ranks]
    return x, weight, bias, a, b, [0.5 + e for e in range(len(ranks))]


def gradients(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy, allow_unused=True)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


@pytest.fixture(params=fedms_ext.available())
def backend(request):
    with fedms_ext.use_backend(request.param):
        yield request.param


# Values and gradients


def random_gate(kind, shape, experts, dtype):
    return {
        "none": lambda: None,
        "scalar": lambda: torch.randn((), dtype=dtype),
        "expert": lambda: torch.randn(experts, dtype=dtype),
        "row": lambda: torch.randn(*shape, 1, dtype=dtype),
        "row and expert": lambda: torch.randn(*shape, experts, dtype=dtype),
        "zeros and ones": lambda: torch.randint(0, 2, (*shape, experts)).to(dtype),
        "strided": lambda: torch.randn(experts, *reversed(shape), 2, dtype=dtype)[..., 0].permute(
            *range(len(shape), -1, -1)
        ),
    }[kind]()


GATES = ["none", "scalar", "expert", "row", "row and expert", "zeros and ones", "strided"]


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(gate_kind, dropout_p):
    x, weight, bias, a, b, scale = operands([3, 2])
    gate = random_gate(gate_kind, (2, 5), 2, torch.float64)
    if gate is not None:
        gate.requires_grad_()

    def call(x, gate, a0, a1, b0, b1):
        return expert_linear(x, weight, bias, [a0, a1], [b0, b1], scale, gate, None, dropout_p, 11)

    assert torch.autograd.gradcheck(call, (x, gate, *a, *b))


def test_handwritten_backward_of_the_reference_is_the_gradient_of_its_forward():
    x, weight, bias, a, b, scale = operands([3, 1, 2])
    gate = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    active = [True, False, True]
    y = reference.expert_linear(x, weight, bias, a, b, scale, gate, active, 0.2, 3)
    dy = torch.randn_like(y)
    want = gradients(y, [x, gate, *a, *b], dy)
    with torch.no_grad():
        dx, dgate, da, db = reference.expert_linear_backward(dy, x, weight, a, b, scale, gate, active, 0.2, 3)
    for got, expected in zip([dx, dgate, *da, *db], want):
        assert (got is None) == (expected is None)
        assert got is None or error(got, expected) < 1e-14


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("ranks", [[8], [1, 17], [2, 8, 5], [40]])
def test_float32_against_float64_reference(backend, gate_kind, ranks):
    shape = (3, 11)
    x, weight, bias, a, b, scale = operands(ranks, shape, torch.float32, n=50, k=70)
    gate = random_gate(gate_kind, shape, len(ranks), torch.float32)
    inputs = [x, *a, *b] + ([] if gate is None else [gate.requires_grad_()])
    y = expert_linear(x, weight, bias, a, b, scale, gate, None, 0.25, 5)
    dy = torch.randn_like(y)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    a64, b64 = doubles[1 : 1 + len(a)], doubles[1 + len(a) : 1 + 2 * len(a)]
    gate64 = None if gate is None else doubles[-1]
    want = reference.expert_linear(
        doubles[0], weight.double(), bias.double(), a64, b64, scale, gate64, None, 0.25, 5
    )
    assert error(y, want) < 1e-6
    for got, expected in zip(gradients(y, inputs, dy), gradients(want, doubles, dy.double())):
        assert error(got, expected) < 2e-6


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_every_activity_mask(backend, experts):
    x, weight, bias, a, b, scale = operands([2, 3, 1][:experts], dtype=torch.float32)
    gate = torch.randn(2, 5, experts, requires_grad=True)
    for active in itertools.product([True, False], repeat=experts):
        y = expert_linear(x, weight, bias, a, b, scale, gate, list(active))
        want = reference.expert_linear(x, weight, bias, a, b, scale, gate, list(active))
        assert error(y, want) < 1e-6
        dx, dgate, *lora = gradients(y, [x, gate, *a, *b], torch.ones_like(y))
        assert [gradient is not None for gradient in lora] == list(active) * 2
        if any(active):
            assert [bool(column.any()) for column in dgate.unbind(-1)] == list(active)
        else:
            assert torch.equal(y, F.linear(x, weight, bias)) and dgate is None


def test_none_active_is_bitwise_the_frozen_layer_and_so_is_no_expert():
    x, weight, bias, a, b, scale = operands([4, 4], dtype=torch.float32, n=33, k=65)
    want = F.linear(x, weight, bias)
    assert torch.equal(expert_linear(x, weight, bias, a, b, scale, active=[False, False]), want)
    assert torch.equal(expert_linear(x, weight, bias, [], [], []), want)


def test_inactive_experts_are_not_read():
    x, weight, bias, a, b, scale = operands([2, 2], dtype=torch.float32)
    bad = [torch.full_like(t, float("nan")) for t in (a[1], b[1])]
    y = expert_linear(x, weight, bias, [a[0], bad[0]], [b[0], bad[1]], scale, None, [True, False])
    assert torch.equal(y, expert_linear(x, weight, bias, a[:1], b[:1], scale[:1]))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (0,), (3, 0)])
def test_shapes(backend, shape):
    x, weight, bias, a, b, scale = operands([3, 2], shape, torch.float32)
    gate = torch.randn(*shape, 2, requires_grad=True)
    y = expert_linear(x, weight, bias, a, b, scale, gate)
    assert y.shape == (*shape, N)
    want = reference.expert_linear(x, weight, bias, a, b, scale, gate)
    inputs = [x, gate, *a, *b]
    for got, expected in zip(gradients(y, inputs, torch.ones_like(y)), gradients(want, inputs, torch.ones_like(y))):
        assert got.shape == expected.shape and error(got, expected) < 1e-5


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(backend, layout):
    _, weight, bias, a, b, scale = operands([3], dtype=torch.float32)
    x = {
        "transposed": lambda: torch.randn(K, 6).T,
        "sliced": lambda: torch.randn(6, 2 * K)[:, ::2],
        "expanded": lambda: torch.randn(1, K).expand(6, K),
    }[layout]().requires_grad_()
    a, b = [torch.randn(K, 3).T.requires_grad_()], [torch.randn(3, N).T.requires_grad_()]
    y = expert_linear(x, weight, bias, a, b, scale)
    want = reference.expert_linear(x, weight, bias, a, b, scale)
    assert error(y, want) < 1e-6
    # The gradient of a sum has strides of zero.
    for got, expected in zip(gradients(y.sum(), [x, *a, *b], None), gradients(want.sum(), [x, *a, *b], None)):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_only_asked_gradients_are_made(backend, bias):
    x, weight, full_bias, a, b, scale = operands([2, 3], dtype=torch.float32)
    gate = torch.rand(2, 5, 2)
    everything = [x, gate, *a, *b]
    for wanted in ([x], [a[0]], [b[1]], [gate], [x, a[1]], [gate, b[0]]):
        for tensor in everything:
            tensor.requires_grad_(any(tensor is w for w in wanted))
        y = expert_linear(x, weight, full_bias if bias else None, a, b, scale, gate)
        want = reference.expert_linear(x, weight, full_bias if bias else None, a, b, scale, gate)
        for got, expected in zip(gradients(y.sum(), wanted, None), gradients(want.sum(), wanted, None)):
            assert error(got, expected) < 1e-5


def test_weight_and_bias_never_get_a_gradient():
    x, weight, bias, a, b, scale = operands([2])
    weight.requires_grad_()
    bias.requires_grad_()
    for active in ([True], [False]):
        expert_linear(x, weight, bias, a, b, scale, active=active).sum().backward()
    assert weight.grad is None and bias.grad is None and x.grad is not None


def test_kept_for_backward_are_x_s_and_the_gate_only():
    x, weight, bias, a, b, scale = operands([2], (6,), torch.float32)
    gate = torch.rand(6, 1, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_linear(x, weight, bias, a, b, scale, gate, None, 0.5, 1)
        shapes = sorted(tuple(t.shape) for t in kept if t.shape[0:1] == (6,))
        assert shapes == [(6, 1), (6, 2), (6, K)]
        kept.clear()
        x.requires_grad_(False), gate.requires_grad_(False), a[0].requires_grad_(False)
        expert_linear(x, weight, bias, a, b, scale, gate)  # dB needs S and the gate, and no x
        assert sorted(tuple(t.shape) for t in kept if t.shape[0:1] == (6,)) == [(6, 1), (6, 2)]


def test_accumulation_checkpointing_and_retained_graph():
    x, weight, bias, a, b, scale = operands([3], (8,), torch.float32)

    def call(x):
        return expert_linear(x, weight, bias, a, b, scale, None, None, 0.4, 9)

    want = gradients(call(x).square().sum(), [x, *a, *b], None)
    again = gradients(checkpoint(call, x, use_reentrant=False).square().sum(), [x, *a, *b], None)
    assert all(torch.equal(g, w) for g, w in zip(again, want))
    y = call(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    assert all(torch.allclose(t.grad, 2 * w) for t, w in zip([x, *a, *b], want))


def test_no_grad_and_inference_mode(backend):
    x, weight, bias, a, b, scale = operands([3], dtype=torch.float32)
    want = expert_linear(x, weight, bias, a, b, scale)
    with torch.no_grad():
        y = expert_linear(x, weight, bias, a, b, scale)
    assert not y.requires_grad and torch.equal(y, want)
    with torch.inference_mode():
        assert torch.equal(expert_linear(x, weight, bias, a, b, scale), want)


def test_double_backward_is_an_error():
    x, weight, bias, a, b, scale = operands([2])
    y = expert_linear(x, weight, bias, a, b, scale).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# Dropout


def test_philox_known_answers():
    # The published test vectors of Random123 (kat_vectors): philox4x32, 7 and 10 rounds.
    vectors = [
        (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            7,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
        (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            10,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for rounds, counter, key, want in vectors:
        got = reference.philox_4x32(tuple(torch.tensor(c) for c in counter), key, rounds)
        assert tuple(int(word) for word in got) == want


def test_a_mask_takes_two_values_from_each_word():
    seed, words = 2**40 + 3, []
    for octet in range(3):
        words += reference.philox_4x32(tuple(torch.tensor(c) for c in (octet, 0, 0, 0)), (seed % 2**32, seed >> 32))
    numbers = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16)]
    for p in (0.25, 0.1):
        assert philox_mask(seed, 2, 11, p).flatten().tolist() == [number >= round(p * 2**16) for number in numbers[:22]]


@pytest.mark.parametrize("p", [0.0, 2.0**-18, 0.1, 0.5, 1 - 2.0**-16, 1 - 2.0**-40])
def test_the_scale_of_dropout_keeps_the_mean(p):
    # Over all 2^16 values of a random number: kept ones times the scale are as many as there are values.
    kept = 2**16 - reference.dropout_threshold(p)
    assert kept * reference.dropout_scale(p) == 2**16 and kept >= 1
    assert abs(kept / 2**16 - (1 - p)) <= 2.0**-16


def test_dropout_statistics():
    # Also between the eight values of one call of Philox, which are made of four words.
    octets = philox_mask(11, 25_000, 8, 0.5).double() - 0.5
    correlations = octets.T @ octets / len(octets) - torch.eye(8) / 4
    assert correlations.abs().max() < 5 * 0.25 / len(octets) ** 0.5
    for p in (0.1, 0.5, 0.9):
        mask = philox_mask(random.getrandbits(63), 400, 250, p).double()
        tolerance = 5 * (p * (1 - p) / mask.numel()) ** 0.5
        assert abs(mask.mean().item() - (1 - p)) < tolerance
        # Neighboring rows and columns are independent.
        for left, right in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert abs(((left - 1 + p) * (right - 1 + p)).mean().item()) < 5 * p * (1 - p) / mask.numel() ** 0.5


def test_dropout_depends_on_the_seed_alone(backend):
    x, weight, bias, a, b, scale = operands([2], dtype=torch.float32)
    first, second, other = (expert_linear(x, weight, bias, a, b, scale, None, None, 0.5, s) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


# Dtypes


@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_base(lora_dtype):
    x, weight, bias, a, b, scale = operands([4, 2], (40,), torch.bfloat16, n=64, k=64)
    a = [t.detach().to(lora_dtype).requires_grad_() for t in a]
    b = [t.detach().to(lora_dtype).requires_grad_() for t in b]
    gate = torch.rand(40, 2, requires_grad=True)
    y = expert_linear(x, weight, bias, a, b, scale, gate)
    want = reference.expert_linear(
        x.double(), weight.double(), bias.double(), [t.double() for t in a], [t.double() for t in b], scale, gate
    )
    assert y.dtype == torch.bfloat16 and error(y, want) < 8e-3
    inputs = [x, gate, *a, *b]
    dy = torch.randn_like(want)
    for tensor, got, expected in zip(inputs, gradients(y, inputs, dy.bfloat16()), gradients(want, inputs, dy)):
        assert got.dtype == tensor.dtype and error(got, expected) < 1.2e-2


def test_autocast_does_as_linear_does():
    x, weight, bias, a, b, scale = operands([4], (40,), torch.float32, n=64, k=64)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_linear(x, weight, bias, a, b, scale)
        assert y.dtype == F.linear(x, weight, bias).dtype == torch.bfloat16
        assert torch.equal(expert_linear(x, weight, bias, a, b, scale, active=[False]), F.linear(x, weight, bias))
    want = expert_linear(x, weight, bias, a, b, scale)
    assert error(y, want) < 1e-2
    inputs = [x, *a, *b]
    for got, expected in zip(gradients(y.float().sum(), inputs, None), gradients(want.sum(), inputs, None)):
        assert got.dtype == torch.float32 and error(got, expected) < 2e-2


def test_backward_inside_autocast_of_a_forward_outside(backend):
    x, weight, bias, a, b, scale = operands([4], dtype=torch.float32)
    y = expert_linear(x, weight, bias, a, b, scale)
    want = gradients(y.sum(), [x, *a, *b], None)
    y = expert_linear(x, weight, bias, a, b, scale)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(y.sum(), [x, *a, *b], None)
    assert all(torch.equal(g, w) for g, w in zip(got, want))


# torch.library and torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(dtype, gated):
    x, weight, bias, a, b, _ = operands([3, 2], (2, 5), dtype)
    x, a, b = x.detach(), [t.detach() for t in a], [t.detach() for t in b]
    gate = torch.rand(2, 5, 2, dtype=dtype) if gated else None
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fedms_ext.expert_linear.default, (x, weight, None, "float", 0, bias, a, b, scale, gate, None, 0.1, 3, None)
    )
    dy, s = torch.randn(2, 5, N, dtype=dtype), torch.randn(10, 5, dtype=dtype)
    torch.library.opcheck(
        torch.ops.fedms_ext.expert_linear_backward.default,
        (dy, x, K, weight, None, "float", 0, a, b, scale, gate, None, 0.1, 3, None, s, True, gated, [True, False], [True, True]),
    )


def test_compile_whole_graph_without_recompilation():
    x, weight, bias, a, b, _ = operands([3, 2], (6,), torch.float32)
    compiled_graphs = []

    def counting(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    def call(x, scale, gate, seed):
        return expert_linear(x, weight, bias, a, b, scale, gate, None, 0.2, seed).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    for rows, value, seed in [(6, 0.5, 4), (9, -1.0, 5), (17, 3.0, 2**40)]:
        x = torch.randn(rows, K, requires_grad=True)
        scale, gate = torch.tensor([value, 1.0]), torch.rand(rows, 2, requires_grad=True)
        y, want = compiled(x, scale, gate, seed), call(x, scale, gate, seed)
        assert torch.equal(y, want)
        inputs = [x, gate, *a, *b]
        for got, expected in zip(gradients(y.sum(), inputs, None), gradients(want.sum(), inputs, None)):
            assert torch.equal(got, expected)
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("kind", [None, "int8"])
def test_shapes_are_told_without_values(kind):
    """On the meta device, which torch knows no autocast of."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(6, 4)))
    attach(model, "all-linear", {"e": LoRA(2, 4)}, blocks="")
    if kind is not None:
        quantize(model, kind)
    activate(model, "e", depth=2)
    y = model.to("meta")(torch.zeros(3, 8, device="meta"))
    assert y.shape == (3, 4) and y.is_meta
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


def test_compile_through_autograd_tracing():
    x, weight, bias, a, b, scale = operands([3, 2], (6,), torch.float32)

    def call(x, gate):
        return expert_linear(x.cos(), weight, bias, a, b, scale, gate, [True, False]).sin()

    gate = torch.rand(6, 2, requires_grad=True)
    y, want = torch.compile(call, fullgraph=True, backend="aot_eager")(x, gate), call(x, gate)
    assert torch.equal(y, want)
    inputs = [x, gate, a[0], b[0]]
    for got, expected in zip(gradients(y.sum(), inputs, None), gradients(want.sum(), inputs, None)):
        assert error(got, expected) < 1e-6


# PEFT


@pytest.mark.parametrize("rows, k, n, r", [(1, 384, 384, 8), (33, 100, 431, 4), (64, 384, 1536, 16), (130, 48, 17, 3)])
def test_equals_peft(backend, rows, k, n, r):
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(k, n)
    config = peft.LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(rows, k, requires_grad=True)
    want = model(x)
    got = expert_linear(x, base.weight, base.bias, [a], [b], [layer.scaling["default"]])
    dy = torch.randn_like(want)
    assert error(got, want) <= 1e-5
    for g, w in zip(gradients(got, [x, a, b], dy), gradients(want, [x, a, b], dy)):
        assert error(g, w) <= 1e-5


# Arguments and backends


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(x=torch.zeros(4, K + 1)), ValueError, r"x has the shape \(4, 8\), expected \(\.\.\., 7\)"),
        (dict(x=torch.zeros(4, K).int()), TypeError, "x is torch.int32, expected a floating dtype"),
        (dict(x=torch.zeros(4, K).double()), TypeError, "weight is torch.float32 and x is torch.float64"),
        (dict(x=[1.0]), TypeError, "x is list, expected a tensor"),
        (dict(weight=torch.zeros(N)), ValueError, r"weight has the shape \(9,\), expected \(N, K\)"),
        (dict(bias=torch.zeros(N + 1)), ValueError, r"bias has the shape \(10,\), expected \(9,\)"),
        (dict(bias=torch.zeros(N, device="meta")), ValueError, "bias is on meta, but x is on cpu"),
        (dict(lora_a=[torch.zeros(2, K)]), ValueError, "lora_a has 1 tensors and lora_b 2"),
        (dict(lora_a=[torch.zeros(2, K), torch.zeros(0, K)]), ValueError, r"lora_a\[1\] has the shape \(0, 7\)"),
        (dict(lora_b=[torch.zeros(N, 2), torch.zeros(N, 2)]), ValueError, r"lora_b\[1\] .* expected \(9, 3\)"),
        (dict(lora_b=[torch.zeros(N, 2), torch.zeros(N, 3).half()]), TypeError, "share one floating dtype"),
        (dict(scale=[1.0]), ValueError, r"scale has the shape \(1,\), expected one value for each of the 2"),
        (dict(scale=torch.ones(3)), ValueError, r"scale has the shape \(3,\), expected one value for each of the 2"),
        (dict(scale=torch.ones(2, requires_grad=True)), ValueError, "scale requires a gradient"),
        (dict(active=[True]), ValueError, "active has 1 values, expected one for each of the 2"),
        (dict(gate=torch.zeros(4, 3)), ValueError, r"gate has the shape \(4, 3\), expected one that broadcasts"),
        (dict(gate=torch.zeros(4, 2).int()), TypeError, "gate is torch.int32"),
        (dict(dropout_p=1.0, seed=1), ValueError, "dropout_p is 1.0"),
        (dict(dropout_p=0.1), ValueError, "seed is None; give a seed"),
        (dict(dropout_p=0.1, seed=-1), ValueError, "seed is -1"),
    ],
)
def test_refused_arguments(change, kind, message):
    good = dict(
        x=torch.zeros(4, K), weight=torch.zeros(N, K), bias=torch.zeros(N),
        lora_a=[torch.zeros(2, K), torch.zeros(3, K)], lora_b=[torch.zeros(N, 2), torch.zeros(N, 3)],
        scale=[1.0, 1.0],
    )  # fmt: skip
    expert_linear(**good)
    with pytest.raises(kind, match=message):
        expert_linear(**good | change)


@pytest.mark.parametrize("name", ["_is_tracing", "_len_torch_dispatch_stack", "_are_functorch_transforms_active"])
def test_where_pytorch_lacks_a_private_name_every_call_takes_the_dispatcher(monkeypatch, name):
    x, weight, bias, a, b, scale = operands([2, 3], dtype=torch.float32)
    which = lambda: dispatch.call(lambda x: "the dispatcher", lambda x: "past it", x.detach())  # noqa: E731
    assert which() == "past it"
    y = expert_linear(x, weight, bias, a, b, scale)

    with monkeypatch.context() as patch:
        patch.delattr(torch._C, name)
        listeners = dispatch._find_probes()
    monkeypatch.setattr(dispatch, "_PROBES", listeners)
    assert which() == "the dispatcher"
    again = expert_linear(x, weight, bias, a, b, scale)
    assert torch.equal(again, y)
    for got, want in zip(*(gradients(out.sum(), [x, *a, *b], None) for out in (again, y))):
        assert torch.equal(got, want)


def test_backends_by_name():
    assert {"cpu", "eager"} <= set(fedms_ext.available())
    assert fedms_ext.explain("eager") is None
    with pytest.raises(ValueError, match="unknown backend 'tpu'; known are: cuda, triton, cpu, eager"):
        fedms_ext.explain("tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"), fedms_ext.use_backend("tpu"):
        pass
    x, weight, a, b = (torch.zeros(shape, dtype=torch.float64) for shape in ((2, K), (N, K), (3, K), (N, 3)))
    with fedms_ext.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for by name.*computes in float32"):
        expert_linear(x, weight, None, [a], [b], [1.0])
    assert expert_linear(x, weight, None, [a], [b], [1.0]).shape == (2, N)


@pytest.mark.parametrize(
    "ranks, dropout_p, in_kernels",
    [([48], 0.0, True), ([49], 0.0, False), ([90, 6], 0.0, True), ([90, 7], 0.0, False), ([64], 0.1, True)],
)
def test_the_cpu_backend_uses_its_kernels_where_they_are_faster(monkeypatch, ranks, dropout_p, in_kernels):
    monkeypatch.setattr(fedms_ext.backends.cpu, "_largest_ranks", lambda rows: (48, 48))
    calls = []

    def count(direction, name):
        kernel = getattr(_C, name)

        def call(*args):
            found = kernel(*args)
            if name.startswith("lora") or found is not None:    # a plain call is declined by None
                calls.append(direction)
            return found

        monkeypatch.setattr(_C, name, call)

    for direction in ("forward", "backward"):
        count(direction, f"linear_{direction}")
        count(direction, f"lora_{direction}")
    x, weight, bias, a, b, scale = operands(ranks, dtype=torch.float32, n=100, k=70)
    inputs = [x, *a, *b]
    y = expert_linear(x, weight, bias, a, b, scale, None, None, dropout_p, 4)
    got = gradients(y.sum(), inputs, None)
    assert calls == (["forward", "backward"] if in_kernels else [])
    want = reference.expert_linear(x, weight, bias, a, b, scale, None, None, dropout_p, 4)
    assert error(y, want) < 1e-5
    assert all(error(g, w) < 1e-5 for g, w in zip(got, gradients(want.sum(), inputs, None)))


def test_the_largest_rank_of_the_kernels_is_that_of_the_most_rows_reached(monkeypatch):
    monkeypatch.setattr(fedms_ext.backends.cpu, "_RANKS", ((1, 8, 16), (64, 32, 48)))
    largest = fedms_ext.backends.cpu._largest_ranks.__wrapped__
    assert [largest(rows) for rows in (0, 1, 63, 64, 999)] == [(8, 16)] * 3 + [(32, 48)] * 2


def test_build_info():
    info = fedms_ext.build_info()
    assert set(info) == {"version", "cuda", "isa_detected", "isa_used", "isa_available", "bf16_products", "openmp"}
    assert info["cuda"] is None or isinstance(info["cuda"], str)
