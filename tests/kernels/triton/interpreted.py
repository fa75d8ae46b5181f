"""The numerics of the Triton kernels under Triton's interpreter, on the CPU. Run by test_processes.py.

Every result is compared with the float64 reference of the very same values, and must not be further away from it than
1.5 times the eager backend in the same dtype. New memory is filled with NaN, so nothing may stay unwritten.
"""

from __future__ import annotations

import interpreter  # noqa: F401  (first: it sets TRITON_INTERPRET)
import itertools

import pytest
import torch
from layers import GATES, Layer, check, check_not_applied, check_quantized, check_wide_experts
from sampled import FULL, combined

import fedms_ext
from fedms_ext import expert_linear
from fedms_ext.backends import triton as backend
from fedms_ext.backends.base import ForwardCall, Lora, Scales, Weight
from fedms_ext.backends.triton import launch
from fedms_ext.backends.triton.operands import Dropout, concatenate
from fedms_ext.backends.triton.tiles import Tile

SMALL = {kind: Tile(kind, 64, 64, 64, 4, 3) for kind in ("pointer", "descriptor", "inline")}
DTYPES = [torch.bfloat16, torch.float16]
SAME = [("pointer", "pointer"), ("descriptor", "descriptor")]  # the tiles of the forward pass and of dx
KINDS = [*SAME, ("inline", "descriptor"), ("cublas", "cublas")]


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forced(monkeypatch):
    """forced(forward, dx): the tiles to run with, None for cuBLAS's sequence of operators."""

    def force(forward, dx="pointer"):
        tiles = {"forward": SMALL.get(forward), "dx": SMALL.get(dx)}
        monkeypatch.setattr(backend, "_choose", lambda name, *rest: tiles[name])

    return force


@pytest.mark.parametrize("kinds, gate", combined(KINDS, GATES))
def test_gates(forced, kinds, gate):
    forced(*kinds)
    check(Layer(67, 72, 136, [3, 8], gate))


@pytest.mark.parametrize("kinds, ranks", combined(
    SAME, [[1], [2], [3], [7], [8], [16], [17], [64], [128], [1, 17], [8, 8, 8], [40, 2, 64]]))
def test_ranks(forced, kinds, ranks):
    forced(*kinds)
    check(Layer(70, 104, 72, ranks, "row and expert", torch.float16))


@pytest.mark.parametrize("ranks", [[1], [7], [16], [17, 5], [8, 8, 16]])
def test_ranks_inline(forced, ranks):
    forced("inline")
    check(Layer(70, 104, 72, ranks, "row and expert", bias=False))


# Every number of rows and every pair of sides, but not all of them together: the interpreter pays for each tile.
ODD = [(65, 1, 8), (127, 8, 1), (128, 100, 431), (197, 431, 100), (65, 3072, 8), (66, 8, 4104)]
MORE_ODD = [(127, 264, 128), (197, 1, 8), (65, 100, 431), (65, 431, 100), (70, 768, 72), (66, 72, 768)]


@pytest.mark.parametrize("rows, k, n", [*ODD, *MORE_ODD] if FULL else ODD)
def test_odd_shapes(forced, rows, k, n):
    forced("pointer")
    check(Layer(rows, k, n, [5, 2], "row", bias=n % 2 == 0))


# Descriptors need aligned rows.
@pytest.mark.parametrize("kind_and_sizes, dtype", combined(
    [("pointer", 72, 136), ("descriptor", 72, 136), ("pointer", 101, 131), ("pointer", 90, 66)], DTYPES))
def test_dropout(forced, kind_and_sizes, dtype):
    kind, k, n = kind_and_sizes
    forced(kind, kind)
    check(Layer(70, k, n, [3, 8], "row and expert", dtype, dropout_p=0.3, seed=2**62 + 2**31 + 7))


@pytest.mark.parametrize("seed, p", [(0, 0.001), (1, 0.5), (2**31, 0.5), (2**32 - 1, 0.99), (2**63 - 1, 0.25)])
def test_dropout_mask_is_bit_for_bit_that_of_the_reference(seed, p):
    for rows, k in [(70, 72), (65, 67)]:
        ones = torch.ones(rows, k, dtype=torch.float16)
        eye = torch.eye(k, dtype=torch.float16)
        experts = concatenate([eye], [eye], torch.ones(1), None, eye.dtype)
        s, _ = launch.shrink(ones, eye, experts, None, Dropout(p, seed))
        assert torch.equal(s != 0, fedms_ext.philox_mask(seed, rows, k, p))


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_every_activity_mask(experts):
    layer = Layer(66, 40, 48, [2, 3, 9][:experts], "row and expert")
    for active in itertools.product([True, False], repeat=experts):
        y, _, dgate, *lora = check(layer, list(active))
        assert [g is not None for g in lora] == list(active) * 2
        if not any(active):
            assert torch.equal(y, torch.nn.functional.linear(layer.x, layer.weight, layer.bias)) and dgate is None


def test_only_asked_gradients_are_made():
    layer = Layer(66, 40, 48, [2, 3, 4], "row and expert")
    for needs in [{0}, {1}, {2}, {3, 4}, {2, 4}, {5}, {6, 7}, {0, 6}, {1, 5}, {0, 1}, {3, 6}]:
        assert len(check(layer, needs=needs)) == 1 + len(needs)


def test_the_default_choice_of_tiles():
    check(Layer(140, 136, 144, [8, 3], "row and expert"))
    check(Layer(140, 136, 144, [8, 3], "row and expert", dropout_p=0.1))


@pytest.mark.parametrize("tile", [Tile("pointer", 128, 256, 32, 8, 4), Tile("descriptor", 128, 256, 64, 8, 3),
                                  Tile("inline", 128, 256, 64, 8, 3)], ids=str)
def test_large_tiles(monkeypatch, tile):
    dx = Tile("descriptor", 128, 128, 64, 8, 2)
    monkeypatch.setattr(backend, "_choose", lambda name, *rest: tile if name == "forward" else dx)
    check(Layer(197, 264, 328, [17, 8], "row and expert"))


@pytest.mark.parametrize("rows", [1, 2, 15, 17, 63, 64])
def test_few_rows(rows):
    check(Layer(rows, 40, 48, [2, 3], "row"))


def test_few_rows_are_left_to_cublas():
    for rows, chosen in ((64, "eager"), (65, "triton")):
        layer = Layer(rows, 40, 48, [2])
        weight = Weight(layer.weight, None, "float", 0, 48, 40)
        call = ForwardCall(layer.x, weight, None, Lora(layer.a, layer.b, Scales([1.0]), None, None, 0.0, 0))
        assert fedms_ext.backends.choose(call).name == chosen


@pytest.mark.parametrize("kinds, dtype, ranks", combined(
    [*SAME, ("inline", "pointer"), ("cublas", "cublas")], DTYPES, [[8], [3, 17]]))
def test_experts_in_float32(forced, kinds, dtype, ranks):
    forced(*kinds)
    check_wide_experts(Layer(70, 72, 136, ranks, "row", dtype))


@pytest.mark.parametrize("change, reason", [
    (dict(dtype=torch.float32), "takes bf16 and fp16"), (dict(ranks=[257]), "total rank from 1 to 256"),
])
def test_a_call_that_the_kernels_cannot_compute_is_refused_by_name(change, reason):
    layer = Layer(70, 40, 48, **{"ranks": [2], **change})
    with fedms_ext.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        layer.run(expert_linear)


@pytest.mark.parametrize("kind", ["pointer", "descriptor"])
def test_a_seed_in_memory_is_that_seed(forced, kind):
    forced("pointer", kind)
    layer = Layer(70, 72, 136, [3, 8], "row", dropout_p=0.3, seed=2**40 + 3)
    with fedms_ext.use_backend("triton"):
        want = layer.run(expert_linear)
        layer.options["seed"] = torch.tensor([2**40 + 3])
        got = layer.run(expert_linear)
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "expanded rows", "four dimensions"])
def test_layouts_of_x_and_dy(layout):
    layer = Layer(72, 40, 48, [4, 3], "row")
    make = {
        "transposed": lambda w: torch.randn(w, 72).t(),
        "sliced": lambda w: torch.randn(72, 2 * w)[:, ::2],
        "expanded": lambda w: torch.randn(1, w).expand(72, w),
        "expanded rows": lambda w: torch.randn(72, 1).expand(72, w),
        "four dimensions": lambda w: torch.randn(2, 3, 12, w),
    }[layout]
    layer.x, layer.dy = make(40).bfloat16(), make(48).bfloat16()
    if layer.x.dim() == 4:
        layer.gate = layer.gate.reshape(2, 3, 12, 1)
    with fedms_ext.use_backend("triton"):
        got = layer.run(expert_linear)
        layer.x, layer.dy = layer.x.contiguous(), layer.dy.contiguous()
        want = layer.run(expert_linear)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    check(Layer(72, 40, 48, [4, 3], "row"))


def test_transposed_parameters():
    layer = Layer(72, 40, 48, [4], "none")
    layer.weight = torch.randn(40, 48).bfloat16().t()
    layer.a, layer.b = [torch.randn(40, 4).bfloat16().t()], [torch.randn(4, 48).bfloat16().t()]
    check(layer)


def test_nan_stays_in_its_rows(forced):
    for kinds in (("pointer", "pointer"), ("descriptor", "descriptor"), ("inline", "pointer")):
        forced(*kinds)
        layer = Layer(70, 72, 136, [3, 8], "row and expert")
        layer.x[13], layer.dy[13] = float("nan"), float("nan")
        with fedms_ext.use_backend("triton"):
            y, dx, dgate, *_ = layer.run(expert_linear)
        bad = torch.zeros(70, dtype=torch.bool)
        bad[13] = True
        for rows in (y, dx, dgate):
            assert torch.equal(rows.isnan().any(dim=1), bad)


def test_alpha_zero_and_zero_b(forced):
    forced("descriptor", "descriptor")
    layer = Layer(70, 72, 136, [3, 8])
    layer.scale = [0.0, 0.0]
    with fedms_ext.use_backend("triton"):
        y, dx, *lora = layer.run(expert_linear)
        frozen = Layer(70, 72, 136, [3, 8])
        frozen.x, frozen.weight, frozen.bias, frozen.dy = layer.x, layer.weight, layer.bias, layer.dy
        frozen.b = [torch.zeros_like(b) for b in frozen.b]
        assert torch.equal(y, frozen.run(expert_linear)[0])
    assert not any(gradient.any() for gradient in lora)


def test_rows_past_two_to_the_31():
    # Rows 2**25 values apart: the last of them starts beyond 2**31. Only their first pages are ever touched.
    stride, rows = 2**25, 70
    torch.use_deterministic_algorithms(False)
    x = torch.empty(rows * stride, dtype=torch.bfloat16).as_strided((rows, 8), (stride, 1))
    layer = Layer(rows, 8, 16, [2])
    x.copy_(layer.x)
    with fedms_ext.use_backend("triton"):
        want = layer.run(expert_linear)
        layer.x = x
        got = layer.run(expert_linear)
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_saved_tensors_and_inputs_are_unchanged():
    layer = Layer(70, 72, 136, [3, 8], "row and expert", dropout_p=0.2)
    before = [t.clone() for t in (layer.x, layer.weight, layer.gate, layer.dy, *layer.a, *layer.b)]
    with fedms_ext.use_backend("triton"):
        first, second = layer.run(expert_linear), layer.run(expert_linear)
    assert all(torch.equal(f, s) for f, s in zip(first, second))
    after = (layer.x, layer.weight, layer.gate, layer.dy, *layer.a, *layer.b)
    assert all(torch.equal(b, a) for b, a in zip(before, after))


def test_opcheck():
    layer = Layer(70, 24, 16, [3, 2], "row and expert")
    scale = torch.tensor(layer.scale, dtype=torch.float64)
    torch.use_deterministic_algorithms(False)
    with fedms_ext.use_backend("triton"):
        torch.library.opcheck(
            torch.ops.fedms_ext.expert_linear.default,
            (layer.x, layer.weight, None, "float", 0, layer.bias, layer.a, layer.b, scale, layer.gate, None, 0.1, 3, None),
        )
        s = torch.randn(70, 5).bfloat16()
        torch.library.opcheck(
            torch.ops.fedms_ext.expert_linear_backward.default,
            (layer.dy, layer.x, 24, layer.weight, None, "float", 0, layer.a, layer.b, scale, layer.gate, None, 0.1, 3, None, s, True, True,
             [True, False], [True, True]),
        )  # fmt: skip


# cuBLAS cannot mask the ranks' part of dx.
@pytest.mark.parametrize("sizes, quantized, tile_and_dropout", combined(
    [(70, 72, 136), (65, 131, 101)], [("int8", 64), ("nf4", 32), ("nf4", 64), ("int4", 64)],
    [("pointer", 0.0), ("pointer", 0.3), ("cublas", 0.0)]))
def test_quantized_weight(monkeypatch, sizes, quantized, tile_and_dropout):
    """The frozen weight made wide where a tile is loaded, forward and dx, against its exact values."""
    tile, dropout_p = tile_and_dropout
    monkeypatch.setattr(backend, "_choose", lambda *arguments: SMALL.get(tile))
    check_quantized(Layer(*sizes, [3, 8], "row and expert", dropout_p=dropout_p), *quantized)


def test_quantized_weight_in_segments(monkeypatch):
    monkeypatch.setattr(backend, "_choose", lambda *arguments: SMALL["pointer"])
    check_quantized(Layer(140, 72, 136, [3, 8], "row", segments=(75, 65)), "nf4", 64)


@pytest.mark.parametrize("kinds, layer", combined(KINDS, [
    ((100, 97), [8, 8], "none"),
    ((70, 0, 127), [3, 17, 8], "row"),
    ((64, 128), [16, 16], "scalar"),
    ((0, 131), [8, 8], "strided"),
]))
def test_segments(forced, kinds, layer):
    forced(*kinds)
    segments, ranks, gate = layer
    check(Layer(sum(segments), 72, 136, ranks, gate, segments=segments))


@pytest.mark.parametrize("segments", [(30, 40), (1, 1, 68), (69, 1), (33, 0, 37), (5, 5, 60)])
def test_short_segments(segments):
    check(Layer(70, 104, 72, [2, 40, 7][: len(segments)], "row", segments=segments))


@pytest.mark.parametrize("kinds, segments_and_ranks", combined(SAME, [((65, 70), [8, 8]), ((64, 71), [3, 33])]))
def test_segments_with_dropout(forced, kinds, segments_and_ranks):
    forced(*kinds)
    segments, ranks = segments_and_ranks
    check(Layer(135, 72, 136, ranks, "row", dropout_p=0.3, segments=segments))


def test_segments_of_experts_that_are_not_applied(forced):
    for kinds in (("pointer", "pointer"), ("descriptor", "descriptor"), ("inline", "pointer")):
        forced(*kinds)
        layer = Layer(200, 40, 48, [2, 3, 9], "row", segments=(64, 70, 66))
        active = [True, False, True] if kinds[0] != "descriptor" else [False, True, False]
        check_not_applied(layer, active, row=70)


def test_only_asked_gradients_of_segments_are_made(monkeypatch):
    layer = Layer(140, 40, 48, [2, 3, 4], "row", segments=(50, 20, 70))
    swept = []
    lora_grad_partials_dy = launch.lora_grad_partials_dy
    monkeypatch.setattr(launch, "lora_grad_partials_dy", lambda *given: swept.append(given[-1]) or lora_grad_partials_dy(*given))
    for needs in [{0}, {1}, {3, 4}, {2, 6}, {5}, {0, 6}, {1, 5}]:
        swept.clear()
        assert len(check(layer, needs=needs)) == 1 + len(needs)
        wanted = [1 in needs or 5 + e in needs for e in range(3)]  # dgate of all rows, dB of an expert's own
        assert swept == ([tuple(wanted)] if any(wanted) else [])
