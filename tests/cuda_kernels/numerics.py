"""The CUDA kernels, through the backend, against float64.

test_cuda.py runs this on the emulator, in processes of their own: once with copies and multiplications that happen as
early as they may, and once as late. `make gpu` runs it on a GPU.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

import fedms_ext
from fedms_ext import expert_linear, reference
from fedms_ext.backends import cuda as backend
from fedms_ext.backends.operands import Frozen, Lora, Needs

sys.path.insert(0, str(Path(__file__).parents[1] / "triton_kernels"))
from layers import Layer, error  # noqa: E402

if reason := fedms_ext.explain("cuda"):
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cpu" if backend._EMULATED else "cuda"
CHIP = backend._chip(torch.empty(0, device=DEVICE).device)


def tiles(int8=False, drops=False):
    numbers = sorted(backend._kernels.gemm_tiles(CHIP, 4096, 4096, 4096, 32, int8, drops))
    return [pytest.param(tile, id=backend._kernels.gemm_tile_name(tile)) for tile in numbers]


SMALL = 1  # 64 x 64: where the tile is not what is tested
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="for a GPU")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The kernels themselves must take every call."""
    monkeypatch.setattr(backend, "other", lambda x: pytest.fail("the kernels did not take the call"))
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def use_tile(monkeypatch, tile):
    monkeypatch.setattr(backend._kernels, "gemm_tiles", lambda *problem: [tile])


def check(layer, active=None, needs=None):
    want = layer.run(reference.expert_linear, active, double=True, needs=needs)
    with fedms_ext.use_backend("eager"):
        eager = layer.run(expert_linear, active, needs=needs)
    with fedms_ext.use_backend("cuda"):
        got = layer.run(expert_linear, active, needs=needs)
    assert len(got) == len(want)
    for i, (g, e, w) in enumerate(zip(got, eager, want)):
        assert (g is None) == (w is None), i
        if g is not None:
            # On a handful of values either may be lucky with its roundings.
            slack = torch.finfo(layer.x.dtype).eps if w.numel() < 64 else 1e-7
            assert error(g, w) <= 1.5 * error(e, w) + slack, (i, error(g, w), error(e, w))
    return got


# Sizes that end inside a tile, a step of the reduction and a step of the ranks.
@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile(monkeypatch, tile, dtype):
    use_tile(monkeypatch, tile)
    check(Layer(150, 200, 264, [17, 3], "row and expert", dtype))


@pytest.mark.parametrize("tile", [tile for tile in tiles() if tile.id.startswith("wgmma")])
def test_more_tiles_than_multiprocessors_and_more_steps_than_stages(monkeypatch, tile):
    # The emulated chip has four multiprocessors.
    use_tile(monkeypatch, tile)
    check(Layer(390, 520, 520, [70], "row"), needs=[0])


@pytest.mark.parametrize("tile", tiles(drops=True))
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


@pytest.mark.parametrize("rows", [1, 2, 15, 63, 65])
@pytest.mark.parametrize("k, n", [(8, 8), (8, 72), (136, 8)])
def test_small_shapes(monkeypatch, rows, k, n):
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


@pytest.mark.parametrize("tile", tiles(int8=True))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_weight(monkeypatch, tile, dtype):
    use_tile(monkeypatch, tile)
    layer = Layer(70, 144, 80, [5, 2], "row and expert", dtype)
    q, scale = reference.quantise_weight(layer.weight)
    q_t, scale_t = reference.quantise_weight((q * scale[:, None]).t())

    def double(*tensors):
        return [t.double() for t in tensors]

    lora = Lora(layer.a, layer.b, torch.tensor(layer.scale), layer.gate, None, 0.0, 0)
    y, s = backend.frozen_forward(layer.x, Frozen(q.to(torch.int8), scale, "int8", 0, 80, 144), layer.bias, lora)
    weight = q.double() * scale.double()[:, None]
    want = reference.expert_linear(
        layer.x.double(), weight, layer.bias.double(), double(*layer.a), double(*layer.b), layer.scale, layer.gate.double()
    )
    assert error(y, want) <= 4e-3
    frozen, needs = Frozen(q_t.to(torch.int8), scale_t, "int8", 0, 80, 144), Needs(True, True, [True] * 2, [True] * 2)
    dx, dgate, da, db = backend.frozen_backward(layer.dy, layer.x, frozen, lora, s, needs)
    want = reference.expert_linear_backward(
        layer.dy.double(), layer.x.double(), (q_t.double() * scale_t.double()[:, None]).t(), double(*layer.a),
        double(*layer.b), layer.scale, layer.gate.double(),
    )  # fmt: skip
    for got, wanted in zip((dx, dgate, *da, *db), (want[0], want[1], *want[2], *want[3])):
        assert error(got, wanted) <= 6e-3


def test_bits_repeat(monkeypatch):
    use_tile(monkeypatch, SMALL)
    layer = Layer(150, 72, 136, [9, 8], "row and expert", dropout_p=0.1)
    with fedms_ext.use_backend("cuda"):
        first, again = layer.run(expert_linear), layer.run(expert_linear)
    assert all(torch.equal(f, a) for f, a in zip(first, again))


@on_gpu
@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("rows, k, n", [(1000, 768, 768), (517, 4096, 4104), (4096, 768, 3072)])
def test_large(monkeypatch, tile, rows, k, n):
    use_tile(monkeypatch, tile)
    check(Layer(rows, k, n, [16, 16], "row and expert"))


@on_gpu
def test_the_tiles_of_the_cost_model():
    for rows in (1, 17, 128, 1000, 5000):
        check(Layer(rows, 768, 768, [16, 16], "row", dropout_p=0.1 if rows % 2 else 0.0))


@on_gpu
def test_graph_replay():
    layer = Layer(1000, 768, 768, [16, 8], "row and expert", dropout_p=0.1)
    with fedms_ext.use_backend("cuda"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                want = layer.run(expert_linear)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer.run(expert_linear)
    for tensor in got:
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@on_gpu
def test_more_than_two_to_the_31_values():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    rows, k = 2**20 + 70, 2056  # the last rows of x start beyond 2**31 values
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    layer = Layer(70, k, 16, [2])
    with fedms_ext.use_backend("cuda"):
        whole = expert_linear(x, layer.weight, None, layer.a, layer.b, layer.scale)
        end = expert_linear(x[-70:], layer.weight, None, layer.a, layer.b, layer.scale)
    assert (whole[-70:] - end).abs().max() <= 2e-2 * end.abs().max()
