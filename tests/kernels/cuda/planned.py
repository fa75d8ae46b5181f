"""`ExpertLinear` on the CUDA kernels by its short way, one C++ call a pass, against float64. test_cuda.py runs this as it runs
numerics.py."""

from __future__ import annotations

import copy
import ctypes
import os

import pytest
import torch
from torch.nn import Linear

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, reference
from fedms_ext.backends import cuda_plan, device
from fedms_ext.operators import planned
from layers import error, refuse_general_way

if reason := fedms_ext.explain("cuda"):
    pytest.skip(reason, allow_module_level=True)

DEVICE = device.current().type


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that the kernels are given holds NaN, which stays where they do not write."""
    monkeypatch.setenv("FEDMS_TUNE", "0")
    cuda_plan.choices.cache_clear()  # a test may have put its own in their place
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills all new memory with NaN, that of C++ too
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    with fedms_ext.use_backend("cuda"):
        assert torch.empty(1).isnan() and torch.empty(1).new_empty(1).isnan()
        yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_way(monkeypatch):
    """Fails where a layer takes the general way."""
    refuse_general_way(monkeypatch, "fedms_ext.nn.expert_linear")


def layer_of(k, n, ranks, dtype=torch.bfloat16, dropout=0.0, bias=True):
    layer = ExpertLinear.from_linear(
        Linear(k, n, bias=bias, dtype=dtype), {f"e{i}": LoRA(r, alpha=1.5 * r, dropout=dropout) for i, r in enumerate(ranks)}
    )
    for name in layer.experts:
        layer.set_state(name, "trained")
        torch.nn.init.normal_(layer.lora_b[name])
    return layer


def gradients(layer, x, dy):
    x = x.detach().requires_grad_()
    torch.manual_seed(7)
    y = layer(x)
    pairs = [p for p in (*layer.lora_a.values(), *layer.lora_b.values()) if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *pairs], dy)]


def wanted(layer, x, dy):
    torch.manual_seed(7)
    seed = int(torch.randint(2**63 - 1, ()))
    x = x.double().requires_grad_()
    a, b = ([p.detach().double().requires_grad_(p.requires_grad) for p in pairs.values()] for pairs in (layer.lora_a, layer.lora_b))
    dropout = next(iter(layer.experts.values())).dropout
    y = reference.expert_linear(
        x, layer.matrix().double(), None if layer.bias is None else layer.bias.double(), a, b,
        [lora.scale for lora in layer.experts.values()], dropout_p=dropout, seed=seed,
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, [x, *[p for p in (*a, *b) if p.requires_grad]], dy.double())]


def check(layer, x):
    dy = torch.randn(*x.shape[:-1], layer.out_features).to(x.dtype)
    got, want = gradients(layer, x, dy), wanted(layer, x, dy)
    eps = torch.finfo(x.dtype).eps
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        # Rounded operands and a rounded S: errors of a few units of the last place of the layer's dtype.
        assert error(g, w) < 2 * eps, (i, error(g, w), eps)
    return got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, k, n, ranks, dropout", [
    ((70,), 72, 136, [8], 0.0),
    ((3, 11), 40, 24, [5], 0.0),
    ((1,), 8, 8, [1], 0.0),
    ((2, 35), 72, 48, [3, 17, 16], 0.0),
    ((66,), 72, 40, [9, 4], 0.3),
    ((150,), 200, 264, [16], 0.0),
], ids=str)  # fmt: skip
def test_a_layer_takes_the_short_way_and_is_right(short_way, dtype, rows, k, n, ranks, dropout):
    layer = layer_of(k, n, ranks, dtype, dropout)
    first = check(layer, torch.randn(*rows, k).to(dtype))
    assert [found.plan is not None for found in layer.plans.values()] == [True]
    assert all(g.dtype == torch.float32 for g in first[2:])


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_converts_x_and_the_weight(short_way, dtype, of_x):
    """The bits are those of a layer and an input that have autocast's dtype; A and B are float32 in both."""
    layer, x = layer_of(72, 40, [3, 5], torch.float32), torch.randn(2, 33, 72).to(of_x)
    typed, dy = copy.deepcopy(layer), torch.randn(2, 33, 40).to(dtype)
    for parameter in typed.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    want = gradients(typed, x.to(dtype), dy)
    with torch.autocast(DEVICE, dtype):
        got = gradients(layer, x, dy)
    assert [t.dtype for t in got] == [dtype, of_x] + [torch.float32] * 4
    assert all(torch.equal(g, w.to(g.dtype)) for g, w in zip(got, want, strict=True))


@pytest.fixture
def overlapped(short_way, monkeypatch):
    """Shrinks overlap the GEMMs, and dA and dB are made in strips."""
    monkeypatch.setattr(cuda_plan, "gemm_configs", lambda *args: [cuda_plan.GemmConfig(tile=2, shrink="overlapped")])


# The emulated GPU has four multiprocessors: at 24 -> 40 two strips are split along the rows, as is one of dB alone.
@pytest.mark.parametrize("rows, k, n, ranks", [
    ((150,), 200, 264, [16]), ((1,), 8, 8, [1]), ((2, 65), 72, 48, [3, 40, 21]), ((390,), 24, 40, [3, 9]), ((130,), 24, 16, [1, 2] * 20)
], ids=str)  # fmt: skip
def test_shrinks_that_overlap_and_strips(overlapped, rows, k, n, ranks):
    layer, x = layer_of(k, n, ranks), torch.randn(*rows, k).bfloat16()
    check(layer, x)
    dy = torch.randn(*rows, n).bfloat16()
    assert all(torch.equal(one, two) for one, two in zip(gradients(layer, x, dy), gradients(layer, x, dy), strict=True))


@pytest.mark.parametrize("frozen", [["e0"], ["e0", "e1"]], ids=str)
def test_strips_without_frozen_pairs(overlapped, frozen):
    layer = layer_of(72, 40, [3, 5])
    for name in frozen:
        layer.set_state(name, "frozen")
    check(layer, torch.randn(140, 72).bfloat16())


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator counts")
@pytest.mark.parametrize("ways, launches", [
    ("overlapped", 3 + 3),  # experts side by side, S, y; dS, dx, all of dA and dB
    ("narrow", 2 + 2),      # experts side by side, y; dx with parts of dA and dB, their sums
])  # fmt: skip
def test_few_launches(request, ways, launches):
    request.getfixturevalue(ways)
    counter = ctypes.CDLL(os.environ["FEDMS_CUDA_EMULATED"]).fedms_launches
    counter.restype = ctypes.c_int64
    layer, x, dy = layer_of(200, 264, [16]), torch.randn(20, 200).bfloat16(), torch.randn(20, 264).bfloat16()
    before = counter()
    gradients(layer, x, dy)
    assert counter() - before == launches


@pytest.fixture
def narrow(short_way, monkeypatch):
    """Each pass is one launch, besides the experts side by side and the sums of the gradients."""
    monkeypatch.setattr(cuda_plan, "gemm_configs", lambda *args: [cuda_plan.GemmConfig(tile=3, shrink="inside")])


@pytest.mark.parametrize("rows, k, n, ranks", [((130,), 72, 200, [16]), ((1,), 8, 8, [1]), ((2, 65), 72, 48, [3, 8, 21])], ids=str)
def test_passes_in_one_launch(narrow, rows, k, n, ranks):
    layer, x = layer_of(k, n, ranks), torch.randn(*rows, k).bfloat16()
    check(layer, x)
    dy = torch.randn(*rows, n).bfloat16()
    assert all(torch.equal(one, two) for one, two in zip(gradients(layer, x, dy), gradients(layer, x, dy), strict=True))


@pytest.mark.parametrize("shape, of_gate", [((6, 5), (6, 2)), ((6, 5), (1, 2)), ((150,), (150, 2)), ((6, 5), (6, 5, 2))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["short_way", "narrow"])
def test_a_gate_of_samples_or_of_tokens(request, way, shape, of_gate, dtype):
    request.getfixturevalue(way)
    layer = layer_of(200, 24, [3, 8])
    x, dy = torch.randn(*shape, 200).bfloat16(), torch.randn(*shape, 24).bfloat16()
    gate = torch.randn(of_gate).to(dtype).requires_grad_()
    with fedms_ext.gated([layer], gate):
        y = layer(x)
    pairs = [*layer.lora_a.values(), *layer.lora_b.values()]
    got = [y, *torch.autograd.grad(y, [gate, *pairs], dy)]
    wide = [t.detach().double().requires_grad_() for t in (gate, *pairs)]
    rows = wide[0].reshape(of_gate[0], *[1] * (len(shape) + 1 - len(of_gate)), *of_gate[1:])
    y = reference.expert_linear(x.double(), layer.weight.double(), layer.bias.double(), wide[1:3], wide[3:], [1.5, 1.5], rows)
    for g, w in zip(got, [y, *torch.autograd.grad(y, wide, dy.double())], strict=True):
        assert error(g, w) < 0.02


def test_experts_in_the_layers_dtype_are_read_where_they_are(short_way):
    layer = layer_of(72, 40, [16])
    layer.lora_a["e0"].data, layer.lora_b["e0"].data = layer.lora_a["e0"].data.bfloat16(), layer.lora_b["e0"].data.bfloat16()
    check(layer, torch.randn(33, 72).bfloat16())
    (found,) = layer.plans.values()
    assert found.plan.reads_expert_in_place


def test_more_than_32_experts_take_more_launches(short_way):
    check(layer_of(24, 16, [1, 2] * 20), torch.randn(33, 24).bfloat16())


def test_frozen_pairs_and_inputs_without_gradients(short_way):
    layer = layer_of(72, 40, [3, 5])
    layer.set_state("e0", "frozen")
    check(layer, torch.randn(33, 72).bfloat16())
    layer.set_state("e1", "frozen")
    check(layer, torch.randn(33, 72).bfloat16())  # the gradient of x alone
    layer.set_state("e1", "trained")
    x = torch.randn(33, 72).bfloat16()
    layer(x).backward(torch.randn(33, 40).bfloat16())
    assert layer.lora_b["e1"].grad.isfinite().all() and x.grad is None


def test_bits_repeat_and_the_general_way_gives_the_same():
    layer = layer_of(72, 136, [9, 8], dropout=0.2)
    x, dy = torch.randn(70, 72).bfloat16(), torch.randn(70, 136).bfloat16()
    first, again = gradients(layer, x, dy), gradients(layer, x, dy)
    assert len(layer.plans) == 1
    with torch.profiler.profile():  # somebody listens to the dispatcher
        general = gradients(layer, x, dy)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(first[:-2], general, strict=False))
    # For dB the general way makes T from the rounded S, the short way keeps T.
    assert all(error(one, two) < 0.02 for one, two in zip(first[-2:], general[-2:], strict=True))


def test_an_int8_layer(short_way, monkeypatch):
    monkeypatch.setattr("fedms_ext.nn.quantized_weight.packed", lambda q, *rest: q)  # as it lies on a GPU
    layer = layer_of(80, 144, [5, 2])
    plain = copy.deepcopy(layer)
    layer.freeze(fedms_ext.QuantizedWeight(layer.matrix().detach()))
    x, dy = torch.randn(70, 80).bfloat16(), torch.randn(70, 144).bfloat16()
    got, want = gradients(layer, x, dy), wanted(plain, x, dy)
    for g, w in zip(got, want, strict=True):
        assert error(g, w) < 0.02  # that of the quantized weight


def test_a_weight_of_another_format_takes_another_plan(monkeypatch):
    """int8_rotated has the shapes and dtypes of int8, which the kernels would read as a weight that is not rotated."""
    monkeypatch.setattr("fedms_ext.nn.quantized_weight.packed", lambda q, *rest: q)  # as it lies on a GPU
    layer, x = layer_of(80, 144, [5, 2]), torch.randn(70, 80).bfloat16()
    weight = layer.matrix().detach()
    layer.freeze(fedms_ext.QuantizedWeight(weight))
    layer(x)
    layer.thaw(weight)
    layer.freeze(fedms_ext.QuantizedWeight(weight, "int8_rotated"))
    with pytest.raises(RuntimeError, match="this one is int8_rotated"):
        layer(x)


def test_every_change_between_two_calls_is_noticed(short_way):
    """The plan of the last call is tried first: what it depends on is changed one by one, and all is right each time."""
    layer, x = layer_of(24, 32, [8, 8]), torch.randn(6, 24).bfloat16()
    check(layer, x)
    for rows in ((7,), (2, 3), (6,)):
        check(layer, torch.randn(*rows, 24).bfloat16())
    layer.add_expert("wide", LoRA(16, alpha=24))
    check(layer, x)
    state = layer.state_dict()
    state["pairs.e0"][1] *= 3
    layer.load_state_dict(state)  # another alpha, so another scale
    check(layer, x)
    layer.half()
    check(layer, x.half())
    with fedms_ext.use_backend("eager"), pytest.raises(AssertionError, match="general way"):
        layer(x.half())
    off, (dx, dy) = copy.deepcopy(layer), (x.half(), torch.randn(6, 32).half())
    gradients(off, dx, dy)
    off.set_state("e0", "off")
    off.set_state("e1", "off")
    y = off(dx).double()
    want = reference.expert_linear(dx.double(), off.matrix().double(), off.bias.double(), [off.lora_a["wide"].double()],
                                   [off.lora_b["wide"].double()], [1.5])
    assert error(y, want) < 0.002


@pytest.mark.parametrize("spoil", [
    lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]].unflatten(0, (2, -1)),  # rows with gaps, in three dimensions
    lambda x: x.t().contiguous().t(),
    lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # misaligned
], ids=["gaps", "transposed", "misaligned"])
def test_what_the_kernels_cannot_read_takes_the_general_way(spoil):
    check(layer_of(72, 40, [3]), spoil(torch.randn(34, 72).bfloat16()))


def test_an_expanded_gradient_is_written_out():
    layer = layer_of(24, 32, [2])
    x = torch.randn(6, 24).bfloat16()
    dy = torch.randn(32).bfloat16().expand(6, 32)
    for got, want in zip(gradients(layer, x, dy), wanted(layer, x, dy), strict=True):
        assert error(got, want) < 0.02


def test_another_backend_asked_for_by_name_computes():
    layer, x = layer_of(24, 32, [2]), torch.randn(6, 24).bfloat16()
    layer(x)
    with fedms_ext.use_backend("eager"):
        layer(x)
    assert [found.plan is None for found in layer.plans.values()] == [False, True]


def test_a_copy_of_a_layer_has_plans_of_its_own(short_way):
    layer, x = layer_of(24, 32, [2]), torch.randn(6, 24).bfloat16()
    layer(x)
    for twin in (copy.deepcopy(layer), copy.copy(layer)):
        check(twin, x)
    assert len(copy.deepcopy(layer).plans) == 0


def test_few_plans_are_kept(short_way):
    layer = layer_of(8, 8, [1])
    for rows in range(1, planned.Plans.MOST + 5):
        layer(torch.randn(rows, 8).bfloat16())
    assert len(layer.plans) == planned.Plans.MOST


def test_the_second_derivative_is_refused():
    layer = layer_of(24, 32, [2])
    x = torch.randn(6, 24).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad((layer(x).float() ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_seed_of_dropout_in_memory():
    layer = layer_of(72, 40, [8], dropout=0.4)
    x, dy = torch.randn(66, 72).bfloat16(), torch.randn(66, 40).bfloat16()
    want = gradients(layer, x, dy)
    torch.manual_seed(7)
    seed = torch.tensor([int(torch.randint(2**63 - 1, ()))])
    pair = [pairs["e0"] for pairs in (layer.lora_a, layer.lora_b)]
    x = x.requires_grad_()

    def run():
        y = planned.planned_linear(
            layer.plans, x, layer.weight, layer.bias, *[[p] for p in pair], [layer.experts["e0"].scale], None, 0.4, seed
        )
        return [y.detach(), *torch.autograd.grad(y, [x, *pair], dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    seed.add_(1)  # as a replay of a graph has it: the same launches, other values in memory
    assert not any(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="for a GPU")
def test_replays_of_a_graph_drop_other_values(short_way):
    layer, x = layer_of(72, 40, [8], dropout=0.4), torch.randn(66, 72).bfloat16()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    found = []
    for _ in range(2):
        graph.replay()
        found.append(y.clone())
    assert all(one.isfinite().all() for one in found) and not torch.equal(*found)
