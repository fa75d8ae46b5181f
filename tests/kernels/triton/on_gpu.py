"""What only a GPU can show. `make gpu` runs this; without a GPU it skips.

Numerics as in interpreted.py, with the real compiler; every tile; bits that repeat; CUDA graphs; torch.compile.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from layers import (
    GATES,
    Layer,
    check,
    check_bits_repeat,
    check_graph_replay,
    check_more_than_two_to_the_31_values,
    check_quantized,
)

import fedms_ext
from fedms_ext import expert_linear
from fedms_ext.backends import device, registry
from fedms_ext.backends import triton as backend

if reason := fedms_ext.explain("triton"):
    pytest.skip(reason, allow_module_level=True)

from fedms_ext.backends.triton import launch  # noqa: E402
from fedms_ext.backends.triton.operands import Dropout, concatenate  # noqa: E402
from fedms_ext.backends.triton.tiles import Gemm, legal_tiles  # noqa: E402

CHIP = device.properties(device.current())
WIDE = Gemm(4096, 768, 768, 32)
FORWARD = legal_tiles(WIDE, CHIP, aligned=True, inline=True, drop=False)
DX = legal_tiles(WIDE, CHIP, aligned=True, inline=False, drop=True)


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    monkeypatch.setenv("FEDMS_TUNE", "0")
    backend._choices.cache_clear()
    # This one by itself, also where the CUDA kernels have passed their tests and are candidates.
    monkeypatch.setattr(registry, "_usable", [b for b in registry._usable if b.name != "cuda"])
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("tile", [*FORWARD, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile_forward(monkeypatch, tile, dtype):
    monkeypatch.setattr(backend, "_choose", lambda name, *rest: tile if name == "forward" else DX[0])
    for rows, k, n in [(197, 264, 136), (1000, 768, 768)]:
        check(Layer(rows, k, n, [17, 8], "row and expert", dtype))


@pytest.mark.parametrize("tile", DX, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_tile_backward(monkeypatch, tile, p):
    pointer = next(t for t in FORWARD if t.kind == "pointer")
    monkeypatch.setattr(backend, "_choose", lambda name, *rest: pointer if name == "forward" else tile)
    for rows, k, n in [(197, 264, 136), (1000, 768, 768)]:
        check(Layer(rows, k, n, [17, 8], "row and expert", dropout_p=p))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("ranks", [[1], [2], [3], [7], [8], [16], [17], [64], [128], [1, 17], [40, 2, 64]], ids=str)
def test_gates_and_ranks(gate, ranks):
    check(Layer(197, 264, 136, ranks, gate))


@pytest.mark.parametrize("rows", [1, 2, 15, 17, 63, 65, 127, 197, 1023])
@pytest.mark.parametrize("k, n", [(1, 8), (8, 1), (100, 431), (431, 100), (768, 3072), (3072, 768), (4104, 431)])
def test_odd_shapes(rows, k, n):
    check(Layer(rows, k, n, [5, 2], "row", dropout_p=0.1 if rows % 2 else 0.0, bias=n % 2 == 0))


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_every_activity_mask(experts):
    layer = Layer(130, 72, 136, [2, 3, 9][:experts], "row and expert")
    for active in itertools.product([True, False], repeat=experts):
        y, _, _, *lora = check(layer, list(active))
        assert [g is not None for g in lora] == list(active) * 2
        if not any(active):
            assert torch.equal(y, torch.nn.functional.linear(layer.x, layer.weight, layer.bias))


@pytest.mark.parametrize("k", [70, 72])
@pytest.mark.parametrize("seed, p", [(0, 0.001), (2**31, 0.5), (2**63 - 1, 0.25)])
def test_dropout_mask_is_bit_for_bit_that_of_the_reference(seed, p, k):
    ones, eye = torch.ones(300, k, dtype=torch.float16), torch.eye(k, dtype=torch.float16)
    experts = concatenate([eye], [eye], torch.ones(1), None, eye.dtype)
    s, _ = launch.shrink(ones, eye, experts, None, Dropout(p, seed))
    assert torch.equal(s != 0, fedms_ext.philox_mask(seed, 300, k, p, "cuda"))


def test_more_than_two_to_the_31_values():
    check_more_than_two_to_the_31_values()


@pytest.mark.parametrize("tile", [*FORWARD, None], ids=str)
@pytest.mark.parametrize("segments, ranks", [((500, 500), [16, 16]), ((131, 0, 869), [3, 8, 33])], ids=str)
def test_every_tile_in_segments(monkeypatch, tile, segments, ranks):
    dx = next(t for t in FORWARD if t.kind == "pointer") if tile is not None and tile.kind == "inline" else tile
    if tile is not None and tile.kind == "inline" and max(ranks) > 32:
        pytest.skip("inline tiles hold 32 ranks at most")
    monkeypatch.setattr(backend, "_choose", lambda name, *rest: tile if name == "forward" else dx)
    check(Layer(1000, 768, 264, ranks, "row", segments=segments))


@pytest.mark.parametrize("segments", [(30, 40), (1, 1, 68), (5, 5, 990), (400, 0, 600)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_segments(segments, p):
    layer = Layer(sum(segments), 264, 136, [2, 40, 7][: len(segments)], "row", segments=segments, dropout_p=p)
    check(layer)
    check(layer, [True, False, True][: len(segments)])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind, group", [("int8", 64), ("nf4", 32), ("nf4", 64), ("int4", 64), ("bf16", 64)])
@pytest.mark.parametrize("rows, k, n", [(70, 72, 136), (197, 431, 101), (1000, 768, 768)])
def test_quantized_weight(rows, k, n, kind, group, p):
    check_quantized(Layer(rows, k, n, [3, 8], "row and expert", dropout_p=p), kind, group)


@pytest.mark.parametrize("segments", [None, (2000, 1000)])
def test_bits_repeat(segments):
    gate = "row and expert" if segments is None else "row"
    layer = Layer(3000, 768, 768, [16, 8], gate, dropout_p=0.1, segments=segments)
    check_bits_repeat(layer, 20)


def test_graph_replay():
    check_graph_replay(Layer(1000, 768, 768, [16, 8], "row and expert", dropout_p=0.1))


def test_opcheck():
    layer = Layer(130, 72, 136, [3, 8], "row and expert")
    scale = torch.tensor(layer.scale)
    torch.library.opcheck(
        torch.ops.fedms_ext.expert_linear.default,
        (layer.x, layer.weight, None, "float", 0, layer.bias, layer.a, layer.b, scale, layer.gate, None, 0.1, 3, None),
    )
    s = torch.randn(130, 11, dtype=torch.bfloat16)
    torch.library.opcheck(
        torch.ops.fedms_ext.expert_linear_backward.default,
        (layer.dy, layer.x, 72, layer.weight, None, "float", 0, layer.a, layer.b, scale, layer.gate, None, 0.1, 3, None, s, True, True,
         [True, False], [True, True]),
    )  # fmt: skip


def test_compiled_whole_graph_and_no_recompilation():
    graphs = []

    def counting(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        graphs.append(graph)
        return compile_fx(graph, inputs)

    layer = Layer(130, 72, 136, [3, 8], "row and expert")

    def call(x, scale, gate):
        return expert_linear(x, layer.weight, layer.bias, layer.a, layer.b, scale, gate).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    for rows, value in [(130, 0.5), (200, -1.0), (517, 2.0)]:
        x, gate = torch.randn(rows, 72).bfloat16().requires_grad_(), torch.rand(rows, 2)
        scale = torch.tensor([value, 1.0])
        y, want = compiled(x, scale, gate), call(x, scale, gate)
        assert torch.allclose(y.float(), want.float(), atol=2e-2)
        assert torch.allclose(*[torch.autograd.grad(t.sum(), x)[0].float() for t in (y, want)], atol=5e-2, rtol=5e-2)
    assert len(graphs) == 1


def test_measured_choices_are_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMS_TUNE")
    backend._choices.cache_clear()
    layer = Layer(512, 256, 256, [8])
    first = layer.run(expert_linear)
    (file,) = tmp_path.iterdir()
    written = file.read_text()
    backend._choices.cache_clear()
    again = layer.run(expert_linear)
    assert file.read_text() == written and all(torch.equal(f, a) for f, a in zip(first, again))
    backend._choices.cache_clear()
