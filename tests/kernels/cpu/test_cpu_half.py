"""The linear layer of 16-bit weights in fedms_ext._C against float64, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fedms_ext
from fedms_ext import _C, QuantizedWeight, expert_linear
from fedms_ext.quantization import formats

KINDS = {torch.float16: _C.fp16_forward, torch.bfloat16: _C.bf16_forward}


@pytest.fixture(params=[isa for isa in fedms_ext.build_info()["isa_available"] if isa != "avxvnni"], autouse=True)
def isa(request):
    before = fedms_ext.build_info()["isa_used"]
    _C.set_isa(request.param)
    yield
    _C.set_isa(before)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.full((len(x), len(weight)), float("nan"))
    KINDS[weight.dtype](x, weight, bias, y)
    return y


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("m, n, k", [
    (1, 1, 1), (1, 65, 8), (2, 7, 100), (3, 64, 431), (4, 130, 15), (7, 66, 768), (16, 431, 31), (17, 9, 4104)])
def test_against_float64(dtype, m, n, k):
    x, weight, bias = torch.randn(m, k), torch.randn(n, k).to(dtype), torch.randn(n)
    want = x.double() @ weight.double().T
    assert error(product(x, weight, None), want) < 1e-6
    assert error(product(x, weight, bias), want + bias.double()) < 1e-6


@pytest.mark.parametrize("dtype", KINDS)
def test_every_value_of_16_bits_is_read_as_torch_reads_it(dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    assert torch.equal(product(torch.ones(1, 1), weight, None).nan_to_num(7), weight.float().T.nan_to_num(7))


@pytest.mark.parametrize("dtype", KINDS)
def test_rows_and_threads_do_not_change_the_bits(dtype):
    x, weight, bias = torch.randn(16, 768), torch.randn(768, 768).to(dtype), torch.randn(768)
    whole = product(x, weight, bias)
    assert all(torch.equal(product(row.view(1, -1), weight, bias)[0], y) for row, y in zip(x, whole))
    before = torch.get_num_threads()
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            assert torch.equal(product(x, weight, bias), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_nan_stays_in_its_row(dtype):
    x = torch.randn(5, 40)
    x[2, 7] = float("nan")
    y = product(x, torch.randn(33, 40).to(dtype), torch.randn(33))
    assert y.isnan().all(dim=1).tolist() == [False, False, True, False, False]


def test_wrong_operands():
    with pytest.raises(ValueError, match="weight is not float16"):
        _C.fp16_forward(torch.randn(2, 3), torch.randn(4, 3), None, torch.empty(2, 4))
    with pytest.raises(ValueError, match=r"weight has the shape \(4, 5\), expected \(4, 3\)"):
        _C.fp16_forward(torch.randn(2, 3), torch.randn(4, 5).half(), None, torch.empty(2, 4))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, few", [(1, True), (128, True), (129, False)])
def test_few_rows_are_multiplied_without_a_weight_in_float32(monkeypatch, kind, rows, few):
    weight, bias, x = torch.randn(48, 40), torch.randn(48), torch.randn(rows, 40)
    expanded = []
    written_out = formats.dequantize
    monkeypatch.setattr(formats, "dequantize", lambda *args: expanded.append(1) or written_out(*args))
    a, b = torch.randn(4, 40), torch.randn(48, 4)
    frozen = QuantizedWeight(weight, kind)
    want = x.double() @ frozen.q.double().T + bias.double()
    with torch.no_grad():
        assert error(expert_linear(x, frozen, bias), want) < 1e-6
        assert error(expert_linear(x, frozen, bias, [a], [b], [0.5]), want + 0.5 * (x @ a.T @ b.T).double()) < 1e-5
    assert bool(expanded) != few
