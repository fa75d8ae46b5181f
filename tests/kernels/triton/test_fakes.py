"""The operators on CUDA tensors that are not there: shapes, dtypes and devices, also where sizes are symbols.

Without a CUDA build of PyTorch autograd cannot run on such tensors, so the two operators are called one by one. Whole training steps
of them are compiled in tests/fedms/training/compiled_for_cuda.py.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedms_ext import expert_linear

N, K, RANKS = 96, 64, (3, 8)


def operands(rows, dtype=torch.bfloat16):
    def make(*shape):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    a, b = [make(r, K) for r in RANKS], [make(N, r) for r in RANKS]
    return make(*rows, K), make(N, K), make(N), a, b, torch.empty(2, device="cuda"), torch.empty(*rows, 2, device="cuda")


def step(x, weight, bias, a, b, scale, gate, dy):
    y, s = torch.ops.fedms_ext.expert_linear(x, weight, None, "float", 0, bias, a, b, scale, gate, None, 0.1, 3, None)
    return y, s, *torch.ops.fedms_ext.expert_linear_backward(
        dy, x, K, weight, None, "float", 0, a, b, scale, gate, None, 0.1, 3, None, s, True, True, [True, True], [False, True]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [(), (0,), (7,), (4, 33), (2, 3, 50)])
def test_forward_and_backward(rows, dtype):
    with FakeTensorMode():
        x, weight, bias, a, b, scale, gate = operands(rows, dtype)
        dy = torch.empty(*rows, N, dtype=dtype, device="cuda")
        y, s, dx, dgate, da0, da1, db1 = step(x, weight, bias, a, b, scale, gate, dy)
    assert s.shape == (x.shape[:-1].numel(), sum(RANKS)) and s.dtype == dtype
    for got, like in [(y, dy), (dx, x), (dgate, gate), (da0, a[0]), (da1, a[1]), (db1, b[1])]:
        assert got.shape == like.shape and got.dtype == like.dtype and got.device == like.device


def test_compile_of_the_whole_graph_with_dynamic_rows():
    """One graph for any number of rows, with the operators forward and backward in it."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def block(x, weight, bias, a0, a1, b0, b1, scale, gate, dy):
        y = expert_linear(x.cos(), weight, bias, [a0, a1], [b0, b1], [0.5, 2.0], gate)
        return y.relu(), step(x, weight, bias, [a0, a1], [b0, b1], scale, gate, dy)

    with FakeTensorMode(), torch.no_grad():
        for rows in (70, 90, 131):
            x, weight, bias, a, b, scale, gate = operands((rows,))
            dy = torch.empty(rows, N, dtype=x.dtype, device="cuda")
            y, (y2, s, dx, *_) = block(x, weight, bias, *a, *b, scale, gate, dy)
            assert y.shape == y2.shape == (rows, N) and s.shape == (rows, sum(RANKS)) and dx.shape == x.shape
            assert y.device.type == dx.device.type == "cuda"
    assert len(graphs) == 1
