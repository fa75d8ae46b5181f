"""Rows in segments, each with its own expert: operator, quantized layers, and whole models."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, expert_linear, reference
from fedms_ext.nn import QuantizedWeight

N, K = 33, 23
SEGMENTS = [(7, 5), (12, 0), (0, 1, 11), (6, 0, 6)]


def operands(segments, gated=True, dtype=torch.float64, n=N, k=K):
    """x (M, K), gate (M, 1) or None, every A and B of unequal ranks, the scales, W, b and dy."""
    torch.manual_seed(len(segments))
    rows, ranks = sum(segments), [3, 8, 1][: len(segments)]
    x = torch.randn(rows, k, dtype=dtype)
    gate = torch.randn(rows, 1, dtype=dtype) if gated else None
    a, b = [torch.randn(r, k, dtype=dtype) for r in ranks], [torch.randn(n, r, dtype=dtype) for r in ranks]
    scale = [0.5 + e for e in range(len(ranks))]
    return x, gate, a, b, scale, torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype), torch.randn(rows, n, dtype=dtype)


def leaves(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def piece_by_piece(x, gate, a, b, scale, weight, bias, segments, active):
    """What segments mean, without the word: every segment is a layer with one expert, or none."""
    gates = [None] * len(segments) if gate is None else gate.split(segments)
    return torch.cat([
        expert_linear(rows, weight, bias, a[e : e + 1], b[e : e + 1], scale[e : e + 1], gates[e], [active is None or active[e]])
        for e, rows in enumerate(x.split(segments))
    ])  # fmt: skip


@pytest.fixture(params=["the one chosen", "eager"])
def backend(request):
    with fedms_ext.use_backend("eager") if request.param == "eager" else nullcontext():
        yield request.param


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("active", [None, [True, False, True], [False, True, False]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_every_segment_is_a_layer_of_its_own(backend, segments, gated, active, dtype, tolerance):
    if backend == "cpu" and dtype == torch.float64 and active:
        pytest.skip("float64 runs on the eager backend")
    active = active and active[: len(segments)]
    x, gate, a, b, scale, weight, bias, dy = operands(segments, gated, dtype)
    for reference_of in ("pieces", "reference"):
        x1, gate1, *lora1 = leaves(*(None if t is None else t.double() for t in (x, gate, *a, *b)))
        e = len(a)
        if reference_of == "pieces":
            want = piece_by_piece(x1, gate1, lora1[:e], lora1[e:], scale, weight.double(), bias.double(), segments, active)
        else:
            want = reference.expert_linear(x1, weight.double(), bias.double(), lora1[:e], lora1[e:], scale, gate1, active,
                                           segments=segments)
        x2, gate2, *lora2 = leaves(x, gate, *a, *b)
        got = expert_linear(x2, weight, bias, lora2[:e], lora2[e:], scale, gate2, active, segments=segments)
        assert error(got, want) < tolerance
        wanted = [t for t in (x1, gate1, *lora1) if t is not None]
        given = [t for t in (x2, gate2, *lora2) if t is not None]
        for g, w in zip(torch.autograd.grad(got, given, dy, allow_unused=True),
                        torch.autograd.grad(want, wanted, dy.double(), allow_unused=True)):
            if g is None:
                assert w is None or not w.any()  # an expert that is not applied, or a gate of no expert
            else:
                assert g.isfinite().all() and (error(g, w) < 2 * tolerance or not w.any() and not g.any())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_gradcheck_and_the_handwritten_backward(segments, dropout_p):
    x, gate, a, b, scale, weight, bias, dy = operands(segments, n=4, k=5)
    x, gate, *lora = leaves(x, gate, *a, *b)
    e = len(a)

    def call(x, gate, *lora):
        return expert_linear(x, weight, bias, lora[:e], lora[e:], scale, gate, None, dropout_p, 11, segments)

    assert torch.autograd.gradcheck(call, (x, gate, *lora))
    want = torch.autograd.grad(call(x, gate, *lora), [x, gate, *lora], dy)
    with torch.no_grad():
        dx, dgate, da, db = reference.expert_linear_backward(
            dy, x, weight, lora[:e], lora[e:], scale, gate, None, dropout_p, 11, segments
        )
    for got, expected in zip([dx, dgate, *da, *db], want):
        assert got.shape == expected.shape and error(got, expected) < 1e-13


@pytest.mark.parametrize("segments", SEGMENTS)
def test_dropout_is_that_of_the_layer(backend, segments):
    """One mask for all rows, whatever segment they lie in."""
    x, gate, a, b, scale, weight, bias, dy = operands(segments, dtype=torch.float32)
    results = []
    for call, dtype in ((reference.expert_linear, torch.float64), (expert_linear, torch.float32)):
        x1, gate1, *lora = leaves(*(t.to(dtype) for t in (x, gate, *a, *b)))
        e = len(a)
        y = call(x1, weight.to(dtype), bias.to(dtype), lora[:e], lora[e:], scale, gate1, None, 0.4, 2**40 + 3, segments)
        results.append([y, *torch.autograd.grad(y, [x1, gate1, *lora], dy.to(dtype))])
    for want, got in zip(*results):
        assert error(got, want) < 5e-6


@pytest.mark.parametrize("active, dropout_p", [(None, 0.0), (None, 0.3), ([True, False, True], 0.3), ([False] * 3, 0.0)])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_quantized_weight(segments, dropout_p, active):
    x, gate, a, b, scale, weight, bias, dy = operands(segments, dtype=torch.float32)
    active, frozen, e = active and active[: len(segments)], QuantizedWeight(weight), len(a)
    x1, gate1, *lora1 = leaves(x, gate, *a, *b)
    got = expert_linear(x1, frozen, bias, lora1[:e], lora1[e:], scale, gate1, active, dropout_p, 5, segments)
    x2, gate2, *lora2 = leaves(*(t.double() for t in (x, gate, *a, *b)))
    want = reference.frozen_linear(x2, frozen.q, frozen.scale, bias, lora2[:e], lora2[e:], scale, gate2, active, dropout_p, 5,
                                   segments, frozen.int8_steps)
    assert error(got, want) < 1e-5
    # The gradient of x: what goes through the frozen weight, which is that without experts, and the experts' part.
    through = x.clone().requires_grad_()
    frozen_dx = torch.autograd.grad(expert_linear(through, frozen, bias), through, dy)[0]
    branch = reference.expert_linear(x2, torch.zeros_like(weight).double(), None, lora2[:e], lora2[e:], scale, gate2, active,
                                     dropout_p, 5, segments)
    dx, *rest = torch.autograd.grad(got, [x1, gate1, *lora1], dy, allow_unused=True)
    branch_dx, *branch_rest = torch.autograd.grad(branch, [x2, gate2, *lora2], dy.double(), allow_unused=True)
    assert error(dx, frozen_dx + branch_dx) < 1e-5
    for g, w in zip(rest, branch_rest):
        assert (w is None or not w.any()) if g is None else error(g, w) < 1e-5


def test_experts_are_not_computed_for_the_rows_of_another(backend):
    x, _, a, b, scale, weight, bias, _ = operands((7, 5), dtype=torch.float32)
    a[1], b[1] = torch.full_like(a[1], torch.nan), torch.full_like(b[1], torch.nan)
    y = expert_linear(x, weight, bias, a, b, scale, segments=(7, 5))
    assert y[:7].isfinite().all() and y[7:].isnan().all()
    y = expert_linear(x, weight, bias, a, b, scale, active=[True, False], segments=(7, 5))
    assert y.isfinite().all()
    none = expert_linear(x, weight, bias, a, b, scale, active=[False, False], segments=(7, 5))
    assert torch.equal(none, nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("segments", [(5, 5), (12,), (13, -1), (4, 4, 4), ()])
def test_wrong_segments(segments):
    x, _, a, b, scale, weight, bias, _ = operands((7, 5))
    with pytest.raises(ValueError, match=r"segments is .* expected a number of rows for each of the 2 experts, .* 12 in all"):
        expert_linear(x, weight, bias, a, b, scale, segments=segments)


def test_a_gate_of_segments_is_one_weight_a_row():
    x, _, a, b, scale, weight, bias, _ = operands((7, 5))
    with pytest.raises(ValueError, match=r"gate has the shape \(12, 2\), expected one that broadcasts to \(12, 1\)"):
        expert_linear(x, weight, bias, a, b, scale, torch.ones(12, 2), segments=(7, 5))


def test_opcheck_and_one_graph_for_any_segments():
    x, gate, a, b, scale, weight, bias, dy = operands((7, 5), dtype=torch.float32)
    factors = torch.tensor(scale, dtype=torch.float64)
    operator = torch.ops.fedms_ext.expert_linear.default
    torch.library.opcheck(operator, (x, weight, None, "float", 0, bias, a, b, factors, gate, [7, 5], 0.1, 3, None))
    s = operator(x, weight, None, "float", 0, bias, a, b, factors, gate, [7, 5], 0.1, 3, None)[1]
    torch.library.opcheck(
        torch.ops.fedms_ext.expert_linear_backward.default,
        (dy, x, K, weight, None, "float", 0, a, b, factors, gate, [7, 5], 0.1, 3, None, s, True, True, [True, False], [True, True]),
    )
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def layer(x, first):
        return expert_linear(x, weight, bias, a, b, factors, segments=(first, x.shape[0] - first)).relu()

    for rows, first in [(12, 7), (20, 3), (31, 19)]:
        x = torch.randn(rows, K, requires_grad=True)
        want = expert_linear(x, weight, bias, a, b, factors, segments=(first, rows - first)).relu()
        assert torch.equal(layer(x, first), want)
    assert len(graphs) == 1


@pytest.mark.parametrize("quantized", [False, True])
def test_the_streams_of_a_model_run_as_one_batch(quantized):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
    fedms_ext.attach(model, "all-linear", {"global": LoRA(3, 6), "local": LoRA(4, 8)}, blocks="blocks")
    layers = list(fedms_ext.expert_layers(model).values())
    for layer in layers:
        for b in layer.lora_b.values():
            nn.init.normal_(b, std=0.3)
    if quantized:
        fedms_ext.quantize(model)

    def run(x, applied):
        for layer in layers:
            for expert in ("global", "local"):
                layer.set_state(expert, "frozen" if expert in applied else "off")
        for block in model.blocks:
            x = block(x)
        return x

    x = torch.randn(5, 7, 16)
    want = torch.cat([run(x[:3], ["global"]), run(x[3:], ["local"])])
    with fedms_ext.segmented(layers, (3, 2)):
        assert error(run(x, ["global", "local"]), want) < 1e-6
    assert all(layer.segments is None for layer in layers)
    with fedms_ext.segmented(layers, (3, 3)), pytest.raises(ValueError, match="2 numbers of samples, 5 in all"):
        run(x, ["global", "local"])


def test_a_gate_of_samples_weighs_their_own_expert():
    layer = ExpertLinear.from_linear(nn.Linear(6, 4), {"a": LoRA(2, 2), "b": LoRA(2, 2)})
    for b in layer.lora_b.values():
        nn.init.normal_(b)
    x, gate = torch.randn(5, 3, 6), torch.rand(5, 1)
    with fedms_ext.gated([layer], gate), fedms_ext.segmented([layer], (2, 3)):
        y = layer(x)
    layer.set_state("b", "off")
    with fedms_ext.gated([layer], gate[:2].expand(-1, 2)):
        assert error(y[:2], layer(x[:2])) < 1e-6
