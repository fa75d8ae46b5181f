"""The CUDA kernels, through the backend, against float64.

test_cuda.py runs this on the emulator, in processes of their own: once with copies and multiplications that happen as
early as they may, and once as late. `make gpu` runs it on a GPU.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

import layers
import fedms_ext
from fedms_ext import expert_linear
from fedms_ext.backends import cuda as backend
from fedms_ext.backends import cuda_plan, device
from layers import (
    Layer,
    check_bits_repeat,
    check_graph_replay,
    check_more_than_two_to_the_31_values,
    check_not_applied,
)
from sampled import FULL, combined

if reason := fedms_ext.explain("cuda"):
    pytest.skip(reason, allow_module_level=True)

DEVICE = device.current().type
CHIP = cuda_plan.chip_of(torch.empty(0, device=DEVICE).device)


def tiles(int8=False, has_dropout=False):
    return sorted(backend._kernels.gemm_tiles(CHIP, 4096, 4096, 4096, 32, int8, has_dropout, True))


def cases(names, *values):
    """Parametrize a test by all combinations of values on a GPU, which is fast, and by some of them on the emulator."""
    ids = [backend._kernels.gemm_tile_name if name == "tile" else str for name in names.split(", ")]
    found = [pytest.param(*case, id="-".join(of(value) for of, value in zip(ids, case)))
             for case in combined(*values, full=FULL or DEVICE != "cpu")]
    return pytest.mark.parametrize(names, found)


DTYPES = [torch.bfloat16, torch.float16]
APART, OVERLAPPED, INSIDE = "apart", "overlapped", "inside"  # where S, or dS, is made
NARROW = next(tile for tile in tiles() if backend._kernels.has_shrink_inside(tile, 1))
SMALL = 1  # 64 x 64: where the tile is not what is tested
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="for a GPU")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("FEDMS_TUNE", "0")
    cuda_plan.choices.cache_clear()
    monkeypatch.setattr(backend, "shared_plan", cuda_plan.Plan)  # each call makes its own, with the tile of its test
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def use_tile(monkeypatch, tile, shrink=APART):
    """`shrink`: where S and dS are made, if the tile can do that."""

    def configs(chip, m, n, k, rank, int8, has_dropout, full_tiles, may_overlap, may_be_inside):
        can = {APART: True, OVERLAPPED: may_overlap and backend._kernels.overlaps_shrink(tile, rank),
               INSIDE: may_be_inside and backend._kernels.has_shrink_inside(tile, rank)}  # fmt: skip
        return [cuda_plan.GemmConfig(tile, shrink if can[shrink] else APART)]

    monkeypatch.setattr(cuda_plan, "gemm_configs", configs)


check = partial(layers.check, backend="cuda")
check_quantized = partial(layers.check_quantized, backend="cuda")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gemm_alone_as_the_benchmark_times_it(transposed):
    (m, n, k), rank = (70, 40, 72), 8
    x, t = torch.randn(m, k).bfloat16(), torch.randn(m, rank).bfloat16()
    w, f = (torch.randn((size, n) if transposed else (n, size)).bfloat16() for size in (k, rank))
    for ranks in (rank, 0):
        y = torch.full((m, n), float("nan")).bfloat16()
        backend._kernels.gemm(x, w, t, f, y, transposed, ranks, SMALL, CHIP)
        want = x.double() @ (w if transposed else w.T).double() + (t.double() @ (f if transposed else f.T).double() if ranks else 0)
        assert layers.error(y, want) < 0.01


# Sizes that end inside a tile, a step of the reduction and a step of the ranks.
@cases("tile, shrink, dtype", tiles(), [APART, OVERLAPPED], DTYPES)
def test_every_tile(monkeypatch, tile, shrink, dtype):
    use_tile(monkeypatch, tile, shrink)
    check(Layer(150, 200, 264, [17, 3], "row and expert", dtype))


@cases("tile, shrink", [tile for tile in tiles() if backend._kernels.gemm_tile_name(tile).startswith("wgmma")], [APART, OVERLAPPED])
def test_more_tiles_than_multiprocessors_and_more_steps_than_stages(monkeypatch, shrink, tile):
    # The emulated chip has four multiprocessors.
    use_tile(monkeypatch, tile, shrink)
    check(Layer(390, 520, 520, [70 if shrink == APART else 40], "row"), needs=[0])


# Tiles end before the rows and columns do, with them, and behind them; there are more steps than stages, and more tiles than the
# four multiprocessors of the emulated chip.
@cases("sizes_and_ranks, gate, dtype", [((150, 200, 264), [17, 3]), ((260, 72, 392), [32]), ((1, 8, 8), [5]), ((129, 328, 192), [1, 7, 8])],
       ["row and expert", "none", "row"], DTYPES)  # fmt: skip
def test_a_forward_pass_in_one_launch(monkeypatch, sizes_and_ranks, gate, dtype):
    sizes, ranks = sizes_and_ranks
    use_tile(monkeypatch, NARROW, INSIDE)
    check(Layer(*sizes, ranks, gate, dtype), needs=[2 + len(ranks)])  # the gradient of a B tells what S holds


# The emulated chip has four multiprocessors: with two blocks of columns of x, dA and dB have two parts, of two of four blocks of rows.
@cases("sizes_and_ranks, gate, dtype", [((390, 200, 72), [17, 3]), ((140, 72, 136), [32]), ((1, 8, 8), [5]), ((129, 264, 328), [1, 7, 8])],
       ["row", "none", "expert"], DTYPES)  # fmt: skip
def test_a_backward_pass_in_one_launch_and_its_sums(monkeypatch, sizes_and_ranks, gate, dtype):
    sizes, ranks = sizes_and_ranks
    use_tile(monkeypatch, NARROW, INSIDE)
    check(Layer(*sizes, ranks, gate, dtype), needs=[0, *range(2, 2 + 2 * len(ranks))])  # all but the gate


# Without some gradients, with that of the gate, and where dy has more columns than one block of columns of x can take.
@pytest.mark.parametrize("n, needs", [(40, [0]), (40, [2, 3]), (40, [0, 1, 2, 3]), (264, [0, 2, 3])], ids=str)
def test_a_backward_pass_that_takes_more_launches(monkeypatch, n, needs):
    use_tile(monkeypatch, NARROW, INSIDE)
    check(Layer(70, 8, n, [5], "row"), needs=needs)


def test_segments_of_a_forward_pass_in_one_launch(monkeypatch):
    use_tile(monkeypatch, NARROW, INSIDE)
    check(Layer(259, 24, 200, [3, 17, 30], "row", segments=(131, 0, 128)), needs=[3])
    layer = Layer(392, 16, 24, [2, 3, 9], "row", segments=(130, 132, 130))
    check_not_applied(layer, [True, False, True], row=140, backend="cuda")


def test_infinities_meet_no_zeros_behind_the_last_rank(monkeypatch):
    use_tile(monkeypatch, NARROW, INSIDE)
    layer = Layer(70, 72, 40, [5])
    layer.weight, layer.a[0] = layer.weight.abs(), layer.a[0].abs()
    layer.b[0] = layer.b[0].abs()
    layer.x[7, 3] = layer.dy[9, 3] = float("inf")
    with fedms_ext.use_backend("cuda"):
        y, dx, *_ = layer.run(expert_linear, needs=[0, 2, 3])
    assert (y[7] == float("inf")).all() and y.isfinite().all(dim=1).sum() == len(y) - 1
    assert (dx[9] == float("inf")).all() and dx.isfinite().all(dim=1).sum() == len(dx) - 1


@cases("tile", tiles(has_dropout=True))
def test_dropout(monkeypatch, tile):
    use_tile(monkeypatch, tile)
    check(Layer(70, 136, 72, [9], "row", dropout_p=0.3, seed=2**40 + 3))


@pytest.mark.parametrize("gate", ["none", "scalar", "expert", "row", "zeros and ones", "strided"])
def test_gates(monkeypatch, gate):
    use_tile(monkeypatch, SMALL)
    check(Layer(70, 72, 40, [3, 2], gate))


@pytest.mark.parametrize("ranks", [[1], [8], [33], [1, 17], [40, 2, 64]], ids=str)
def test_ranks(monkeypatch, ranks):
    use_tile(monkeypatch, SMALL)
    check(Layer(33, 72, 136, ranks, "row and expert"))


@cases("rows, k_and_n", [1, 2, 15, 63, 65], [(8, 8), (8, 72), (136, 8)])
def test_small_shapes(monkeypatch, rows, k_and_n):
    k, n = k_and_n
    use_tile(monkeypatch, SMALL)
    check(Layer(rows, k, n, [5, 2], "row", bias=n == 8))


def test_wide_dy_takes_wide_blocks(monkeypatch):
    use_tile(monkeypatch, SMALL)
    check(Layer(66, 8, 2056, [5], "row"), needs=[1, 3])  # the gate and B


def test_what_is_asked_for(monkeypatch):
    use_tile(monkeypatch, SMALL)
    layer = Layer(40, 24, 32, [2, 3], "row and expert")
    for asked in ([0], [1], [2], [5], [0, 3, 4]):
        check(layer, needs=asked)
    for active in itertools.product([True, False], repeat=2):
        check(layer, list(active))


def test_views_and_a_frozen_bias_in_any_layout(monkeypatch):
    use_tile(monkeypatch, SMALL)
    layer = Layer(6, 24, 32, [2])
    layer.x = torch.randn(3, 2, 56, dtype=torch.bfloat16)[..., 8:32]   # rows with gaps
    layer.weight = torch.randn(24, 32, dtype=torch.bfloat16).t()       # transposed
    layer.dy = torch.randn(32, dtype=torch.bfloat16).expand(3, 2, 32)  # stride 0
    check(layer)


def test_nan_stays_in_its_row(monkeypatch):
    use_tile(monkeypatch, SMALL)
    layer = Layer(40, 24, 32, [5], "row")
    layer.x[7, 3] = float("nan")
    with fedms_ext.use_backend("cuda"):
        y = layer.run(expert_linear)[0]
    assert y[7].isnan().all() and y[:7].isfinite().all() and y[8:].isfinite().all()


@cases("dtype_and_p, tile", list(itertools.product(DTYPES, [0.0, 0.3])), tiles(int8=True))
def test_int8_weight(monkeypatch, dtype_and_p, tile):
    dtype, p = dtype_and_p
    use_tile(monkeypatch, tile)
    check_quantized(Layer(70, 144, 80, [5, 2], "row and expert", dtype, dropout_p=p), "int8", 64)


@cases("tile, shrink, layer", tiles(), [APART, OVERLAPPED], [((128, 150), [8, 8], "none"), ((131, 0, 140), [3, 17, 40], "row")])
def test_segments(monkeypatch, shrink, tile, layer):
    segments, ranks, gate = layer
    use_tile(monkeypatch, tile, shrink)
    check(Layer(sum(segments), 72, 264, ranks, gate, segments=segments))


def test_strips_end_with_their_segment(monkeypatch):
    use_tile(monkeypatch, tiles()[-1], OVERLAPPED)
    layer = Layer(270, 72, 40, [3, 40], "row", segments=(130, 140))
    check(layer)
    layer.x[130, 3] = float("nan")  # in the same box of 128 rows as the end of the first segment
    with fedms_ext.use_backend("cuda"):
        first, second, *_ = layer.run(expert_linear)[3:]
    assert first.isfinite().all() and not second.isfinite().all()


@pytest.mark.parametrize("segments, ranks", [((30, 40), [5, 2]), ((1, 1, 68), [2, 40, 7]), ((0, 70), [3, 3]),
                                             ((9,) * 8, [1, 2, 3, 4, 5, 6, 7, 33])], ids=str)  # fmt: skip
def test_short_segments(segments, ranks):
    check(Layer(sum(segments), 72, 136, ranks, "row", segments=segments))


def test_segments_with_dropout_and_int8(monkeypatch):
    use_tile(monkeypatch, SMALL)
    check(Layer(135, 72, 136, [3, 33], "row", dropout_p=0.3, segments=(65, 70)))
    check_quantized(Layer(135, 80, 144, [3, 33], "row", dropout_p=0.3, segments=(65, 70)), "int8", 64)


def test_segments_of_experts_that_are_not_applied():
    for active in ([True, False, True], [False, True, False]):
        layer = Layer(400, 40, 48, [2, 3, 9], "row", segments=(130, 140, 130))
        check_not_applied(layer, active, row=140, backend="cuda")


def test_only_asked_gradients_of_segments_are_made(monkeypatch):
    use_tile(monkeypatch, SMALL)
    layer = Layer(70, 40, 48, [2, 3], "row", segments=(40, 30))
    for needs in [{0}, {1}, {2, 5}, {3}, {4, 5}]:
        assert len(check(layer, needs=needs)) == 1 + len(needs)


@pytest.mark.parametrize("layer, reason", [
    (lambda: Layer(72, 40, 48, [2] * 9, "row", segments=(8,) * 9), "at most 8 segments"),
    (lambda: Layer(72, 40, 47, [2]), "multiples of 8"),
    (lambda: Layer(72, 40, 48, [257]), "total rank from 1 to 256"),
    (lambda: Layer(72, 40, 48, [2], dtype=torch.float32), "takes bf16 and fp16"),
])  # fmt: skip
def test_a_call_that_the_kernels_cannot_compute_is_refused_by_name(layer, reason):
    with fedms_ext.use_backend("cuda"), pytest.raises(RuntimeError, match=reason):
        layer().run(expert_linear)


@cases("dtype, ranks", DTYPES, [[8], [3, 17]])
def test_experts_in_float32(monkeypatch, dtype, ranks):
    use_tile(monkeypatch, SMALL)
    layers.check_wide_experts(Layer(70, 72, 136, ranks, "row", dtype, dropout_p=0.2), "cuda")


def test_bits_repeat(monkeypatch):
    use_tile(monkeypatch, SMALL)
    check_bits_repeat(Layer(150, 72, 136, [9, 8], "row and expert", dropout_p=0.1), 1, "cuda")


@on_gpu
@cases("tile, shrink, sizes", tiles(), [APART, OVERLAPPED, INSIDE], [(1000, 768, 768), (517, 4096, 4104), (4096, 768, 3072)])
def test_large(monkeypatch, tile, shrink, sizes):
    use_tile(monkeypatch, tile, shrink)
    check(Layer(*sizes, [16, 16], "row and expert"))


@on_gpu
def test_the_tiles_of_the_cost_model():
    for rows in (1, 17, 128, 1000, 5000):
        check(Layer(rows, 768, 768, [16, 16], "row", dropout_p=0.1 if rows % 2 else 0.0))


@on_gpu
@pytest.mark.parametrize("shrink", [APART, OVERLAPPED, INSIDE])
def test_graph_replay(monkeypatch, shrink):
    if shrink != APART:
        use_tile(monkeypatch, NARROW, shrink)
    monkeypatch.setattr(backend, "shared_plan", cuda_plan.shared_plan)  # a plan cannot be made within a capture
    check_graph_replay(Layer(1000, 768, 768, [16, 8], "row and expert", dropout_p=0.1 if shrink == APART else 0), "cuda")


@on_gpu
def test_more_than_two_to_the_31_values():
    check_more_than_two_to_the_31_values("cuda")
