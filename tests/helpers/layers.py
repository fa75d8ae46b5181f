"""Random layers and the comparison that every numerical test makes, on the default device of PyTorch."""

from __future__ import annotations

import pytest
import torch

import fedms_ext
from fedms_ext import QuantizedWeight, expert_linear, reference
from fedms_ext.backends.base import Weight
from fedms_ext.quantization.formats import unpacked

GATES = ["none", "scalar", "expert", "row", "row and expert", "zeros and ones", "strided"]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def refuse_general_way(monkeypatch, module):
    """Let a layer of this module fail where it does not take the short way of the CUDA kernels."""

    def refuse(*args, **kwargs):
        raise AssertionError("the call took the general way")

    monkeypatch.setattr(f"{module}.expert_linear", refuse)
    monkeypatch.setattr("fedms_ext.operators.planned._general_gradients", refuse)


def random_gate(kind, rows, experts):
    """(rows, E) or what broadcasts to it, on the default device; None for no gate."""
    return {
        "none": lambda: None,
        "scalar": lambda: torch.randn(()),
        "expert": lambda: torch.randn(experts),
        "row": lambda: torch.randn(rows, 1),
        "row and expert": lambda: torch.randn(rows, experts),
        "zeros and ones": lambda: torch.randint(0, 2, (rows, experts)).float(),
        "strided": lambda: torch.randn(experts, rows, 2)[..., 1].t(),
    }[kind]()


class Layer:
    def __init__(self, rows, k, n, ranks, gate="none", dtype=torch.bfloat16, bias=True, dropout_p=0.0, seed=5,
                 segments=None):
        self.x = torch.randn(rows, k).to(dtype)
        self.weight = (torch.randn(n, k) / k**0.5).to(dtype)
        self.bias = torch.randn(n).to(dtype) if bias else None
        self.a = [(torch.randn(r, k) / k**0.5).to(dtype) for r in ranks]
        self.b = [torch.randn(n, r).to(dtype) for r in ranks]
        self.scale = [0.5 + 0.25 * e for e in range(len(ranks))]
        self.gate = random_gate(gate, rows, 1 if segments else len(ranks))
        self.options = dict(dropout_p=dropout_p, seed=seed, segments=segments)
        self.dy = torch.randn(rows, n).to(dtype)

    def run(self, call, active=None, double=False, needs=None):
        """y and the gradients of x, the gate, every A and B; `needs` are the numbers of those that are asked for."""
        convert = (lambda t: None if t is None else t.double()) if double else (lambda t: t)
        inputs = [convert(t) for t in (self.x, self.gate, *self.a, *self.b)]
        leaves = [None if t is None else t.detach().requires_grad_(needs is None or i in needs)
                  for i, t in enumerate(inputs)]
        x, gate, *lora = leaves
        e = len(self.a)
        y = call(x, convert(self.weight), convert(self.bias), lora[:e], lora[e:], self.scale, gate, active, **self.options)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, convert(self.dy), allow_unused=True)]


def check(layer, active=None, needs=None, backend="triton"):
    """The backend's results, which are as near to float64 as eager's, or 1.5 times as far away."""
    want = layer.run(reference.expert_linear, active, double=True, needs=needs)
    with fedms_ext.use_backend("eager"):
        eager = layer.run(expert_linear, active, needs=needs)
    with fedms_ext.use_backend(backend):
        got = layer.run(expert_linear, active, needs=needs)
    assert len(got) == len(want)
    for i, (g, e, w) in enumerate(zip(got, eager, want)):
        assert (g is None) == (w is None), i
        if g is not None:
            check_error(i, g, e, w, layer.x.dtype)
    return got


def check_wide_experts(layer, backend="triton"):
    """Experts in float32 beside x in half precision: their gradients are float32, and the results as near to float64 as those
    of a layer whose experts were rounded to x's dtype before, or 1.5 times as far away."""
    dtype = layer.x.dtype
    layer.a, layer.b = [torch.randn_like(a.float()) / a.shape[1]**0.5 for a in layer.a], [torch.randn_like(b.float()) for b in layer.b]
    wide = layer.a, layer.b
    want = layer.run(reference.expert_linear, double=True)
    layer.a, layer.b = [a.to(dtype) for a in layer.a], [b.to(dtype) for b in layer.b]
    with fedms_ext.use_backend("eager"):
        rounded = layer.run(expert_linear)
    layer.a, layer.b = wide
    with fedms_ext.use_backend(backend):
        got = layer.run(expert_linear)
    experts = 2 * len(layer.a)
    assert [g.dtype for g in got[-experts:]] == [torch.float32] * experts and got[0].dtype == dtype
    for i, (g, r, w) in enumerate(zip(got, rounded, want, strict=True)):
        check_error(i, g, r, w, dtype)
    # The gradients are not rounded to x's dtype at the end: few of their values are values of it.
    assert all((g == g.to(dtype)).float().mean() < 0.1 for g in got[-experts:] if g.numel() > 100)


def check_error(i, got, eager, want, dtype):
    # On a handful of values either may be lucky with its roundings, which are to the layer's dtype: S's in fp32 dgate too.
    slack = torch.finfo(dtype).eps if want.numel() < 64 else 1e-7
    assert error(got, want) <= 1.5 * error(eager, want) + slack, (i, error(got, want), error(eager, want))


def check_not_applied(layer, active, row, backend="triton"):
    """In segments, of which the second one holds `row`: no gradients for experts that are not active, and an infinity in
    the rows of one that is not there meets no zeros of it."""
    _, _, _, *lora = check(layer, active, backend=backend)
    assert [g is not None for g in lora] == active * 2
    layer.x[row, 3] = torch.inf
    with fedms_ext.use_backend(backend):
        y = layer.run(expert_linear, [True, False, True])[0]
    assert not y[row].isnan().any() and y.isfinite().all(dim=1).sum() == len(y) - 1


def check_bits_repeat(layer, times, backend="triton"):
    with fedms_ext.use_backend(backend):
        first = layer.run(expert_linear)
        for _ in range(times):
            assert all(torch.equal(f, a) for f, a in zip(first, layer.run(expert_linear)))


def check_graph_replay(layer, backend="triton"):
    """A CUDA graph of forward and backward gives the bits of the calls that it captured."""
    with fedms_ext.use_backend(backend):
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


def check_more_than_two_to_the_31_values(backend="triton"):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    rows, k = 2**20 + 70, 2056  # the last rows of x start beyond 2**31 values
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    layer = Layer(70, k, 16, [2])
    with fedms_ext.use_backend(backend):
        whole = expert_linear(x, layer.weight, None, layer.a, layer.b, layer.scale)
        end = expert_linear(x[-70:], layer.weight, None, layer.a, layer.b, layer.scale)
    assert (whole[-70:] - end).abs().max() <= 2e-2 * end.abs().max()


def check_quantized(layer, kind, group, backend="triton"):
    """`check` on a quantized weight, against the exact values that it stands for, forward and in dx."""
    (n, k), frozen = layer.weight.shape, QuantizedWeight(layer.weight, kind, group)
    # The logical form is what a GPU holds. An int8 weight has a transpose, which is quantized apart.
    q, (q_dx, scale_dx) = frozen.q, frozen.for_dx()
    q_dx = unpacked(q_dx, kind, *((k, n) if kind == "int8" else (n, k)))
    lora = (layer.a, layer.b, torch.tensor(layer.scale, dtype=torch.float64), layer.gate, layer.options["segments"])
    options, e = (layer.options["dropout_p"], layer.options["seed"], None), len(layer.a)
    needs = (True, layer.gate is not None, [True] * e, [True] * e)
    found = {}
    for name in ("eager", backend):
        with fedms_ext.use_backend(name):
            y, s = torch.ops.fedms_ext.expert_linear(layer.x, q, frozen.scale, kind, group, layer.bias, *lora, *options)
            found[name] = [y, *torch.ops.fedms_ext.expert_linear_backward(
                layer.dy, layer.x, k, q_dx, scale_dx, kind, group, *lora, *options, s, *needs)]  # fmt: skip
    layer.weight = frozen.dequantize().double()
    y, *_ = layer.run(reference.expert_linear, double=True)
    layer.weight = Weight(q_dx, scale_dx, kind, group, n, k).expanded_for_dx(torch.float64)
    _, *gradients = layer.run(reference.expert_linear, double=True)
    for i, (got, eager, want) in enumerate(zip(found[backend], found["eager"], [y, *gradients], strict=True)):
        check_error(i, got, eager, want, layer.x.dtype)
