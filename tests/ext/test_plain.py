"""The plain case of an expert layer on a CPU: one C++ call a pass, the same numbers as the general way, and what is declined."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, FrozenLinear, LoRA, QuantizedWeight, _C, expert_linear, reference, use_backend
from fedms_ext.operators.plain import plain_linear

OPERATOR = import_module("fedms_ext.operators.expert_linear")
EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
needs_exchange = pytest.mark.skipif(not EXCHANGE, reason="this torch has no DLPack exchange API")


def layer_of(k, n, ranks=(3, 1), kind=None, bias=True, dropout=0.0):
    layer = ExpertLinear(k, n, bias, experts={f"e{i}": LoRA(rank, 2 * rank + i, dropout) for i, rank in enumerate(ranks)})
    for name, b in layer.lora_b.items():
        nn.init.normal_(b)
        layer.set_state(name, "trained")
    if kind:
        layer.freeze(QuantizedWeight(layer.weight, kind))
    return layer


def passes(layer, x, dy):
    """y and the gradients of x and of every pair that is trained."""
    pairs = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *pairs] if x.requires_grad else pairs, dy)]


def generally(monkeypatch, layer, x, dy):
    with monkeypatch.context() as patch:
        patch.setattr(OPERATOR, "plain_linear", lambda *_: None)
        return passes(layer, x, dy)


def close(got, want, tolerance=2e-6):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1e-30)


@needs_exchange
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("rows", [(1,), (2,), (4,), (5,), (2, 3), (64,)])
@pytest.mark.parametrize("k, n", [(1, 1), (13, 9), (70, 130), (128, 64)])
def test_the_same_as_the_general_way(monkeypatch, kind, rows, k, n):
    layer = layer_of(k, n, kind=kind)
    x, dy = torch.randn(*rows, k, requires_grad=True), torch.randn(*rows, n)
    close(passes(layer, x, dy), generally(monkeypatch, layer, x, dy))


@needs_exchange
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 1), (2, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gates_and_dropout_are_the_same_as_the_general_way(monkeypatch, kind, rows, dropout):
    layer = layer_of(70, 50, kind=kind, dropout=dropout)
    x, dy = torch.randn(*rows, 70, requires_grad=True), torch.randn(*rows, 50)
    gate = torch.rand(2, rows[0]).T.requires_grad_()  # of strides that are not a row's
    seen = []
    general = OPERATOR.run_forward
    monkeypatch.setattr(OPERATOR, "run_forward", lambda *args: seen.append(args) or general(*args))

    def found():
        torch.manual_seed(5)
        with fedms_ext.gated([layer], gate):
            y = layer(x)
        return [y, *torch.autograd.grad(y, [x, gate, *layer.lora_a.values(), *layer.lora_b.values()], dy)]

    got = found()
    assert not seen
    monkeypatch.setattr(OPERATOR, "plain_linear", lambda *_: None)
    close(got, found())


@needs_exchange
def test_a_frozen_layer_without_experts_is_plain(monkeypatch):
    frozen = fedms_ext.FrozenLinear(QuantizedWeight(torch.randn(9, 21), "int8"), torch.randn(9))
    x, dy = torch.randn(2, 21, requires_grad=True), torch.randn(2, 9)
    close(passes(frozen, x, dy), generally(monkeypatch, frozen, x, dy))
    with pytest.raises(ValueError, match=r"x has the shape \(2, 20\), expected"):
        frozen(x[:, :20])


@needs_exchange
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("segments", [(1, 1), (2, 1), (0, 3), (3, 0)])
def test_segments_are_one_call_and_equal_the_general_way(monkeypatch, kind, segments):
    layer, x = layer_of(13, 9, kind=kind), torch.randn(sum(segments), 1, 13)
    frozen = layer.weight if kind is None else layer.frozen
    operands = frozen, layer.bias, list(layer.lora_a.values()), list(layer.lora_b.values()), [l.scale for l in layer.experts.values()]
    with torch.no_grad(), fedms_ext.segmented([layer], segments):
        found = plain_linear(x, *operands, None, segments=segments)
        if kind or sum(segments) <= 1:
            assert found is not None
        y = layer(x)
        assert found is None or torch.equal(y, found)
        with monkeypatch.context() as patch:
            patch.setattr(OPERATOR, "plain_linear", lambda *_: None)
            close([y], [layer(x)])
        for wrong in ((1,), (1, 1, 1), (4, -1), (9, 9)):
            assert plain_linear(x, *operands, None, segments=wrong) is None
    assert plain_linear(x, *operands, None, segments=segments) is None        # where A and B have gradients


@needs_exchange
@pytest.mark.parametrize("rows", [(1,), (2, 1), (64,)])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_layer_without_experts_is_one_call(rows, kind):
    layer = FrozenLinear(QuantizedWeight(torch.randn(9, 13), kind), torch.randn(9))
    x = torch.randn(*rows, 13, requires_grad=True)
    want = expert_linear(x, layer.frozen, layer.bias)
    with torch.no_grad():
        found = plain_linear(x, layer.frozen, layer.bias, (), (), (), None)
        assert torch.equal(found, want) and torch.equal(layer(x), want)
    dy = torch.randn_like(want)
    (dx,), (expected,) = (torch.autograd.grad(y, x, dy) for y in (layer(x), want))
    assert torch.equal(dx, expected)


@needs_exchange
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k, n", [(1, 1), (17, 5), (100, 431), (768, 96)])
@pytest.mark.parametrize("isa", fedms_ext.build_info()["isa_available"])
def test_few_rows_in_float64(rows, k, n, isa):
    """The fp32 product of few rows, forward and backward, against the definition; nothing is read from the outputs."""
    before = fedms_ext.build_info()["isa_used"]
    layer = layer_of(k, n, ranks=(2,))
    x, dy = torch.randn(rows, k), torch.randn(rows, n)
    a, b = layer.lora_a["e0"], layer.lora_b["e0"]
    seen = []  # by whom PyTorch is asked for a product

    def product(x, weight, bias, *size):
        seen.append(size)
        return F.linear(x, weight.detach(), bias.detach())

    def product_for_dx(dy, weight, *size):
        seen.append(size)
        return dy @ weight.detach()

    branch = [a], [b], [2.5], None, 0.0, 0
    needs = [True, False, True, True]
    many = rows > {"avx512": 4, "avx2": 1, "avxvnni": 1}.get(isa, 0)
    try:
        _C.set_isa(isa)
        y, s = _C.linear_forward(x, layer.weight, None, layer.bias, *branch, product=product)
        grads = _C.linear_backward(dy, x, k, layer.weight, None, *branch, s, needs, product_for_dx)
        for none in (None, lambda *_: None):
            assert (_C.linear_forward(x, layer.weight, None, layer.bias, *branch, product=none) is None) == many
            assert (_C.linear_backward(dy, x, k, layer.weight, None, *branch, s, needs, none) is None) == many
        alone, unkept = _C.linear_forward(x, layer.weight, None, layer.bias, *branch, keeps_s=False, product=product)
    finally:
        _C.set_isa(before)
    assert seen == [(rows, 2, 1, 0.0)] * (3 if many else 0)
    assert unkept is None and torch.equal(alone, y)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    want = reference.expert_linear(wide[0], layer.weight.double(), layer.bias.double(), [wide[1]], [wide[2]], [2.5])
    close([y.double()], [want])
    close([grads[i].double() for i in (0, 2, 3)], torch.autograd.grad(want, wide, dy.double()))
    assert grads[1] is None


@needs_exchange
def test_bits_repeat_and_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        for kind in (None, "int8"):
            layer = layer_of(1024, 1100, kind=kind)
            x, dy = torch.randn(4, 1024, requires_grad=True), torch.randn(4, 1100)
            found = []
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                found.append(passes(layer, x, dy))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_exchange
def test_a_plain_call_is_one_cpp_call_a_pass(monkeypatch):
    calls = []
    for name in dir(_C):
        if callable(getattr(_C, name)) and not name.startswith("__"):
            function = getattr(_C, name)
            monkeypatch.setattr(_C, name, lambda *a, _f=function, _n=name: calls.append(_n) or _f(*a))
    layer = layer_of(16, 16, kind="int8")
    layer.frozen.for_dx()
    calls.clear()
    passes(layer, torch.randn(1, 16, requires_grad=True), torch.randn(1, 16))
    assert calls == ["linear_forward", "linear_backward"]


@needs_exchange
@pytest.mark.parametrize("kind, rows", [("int8", 1), ("nf4", 1), (None, 16)])
@pytest.mark.parametrize("case", ["alone", "two experts", "gate", "dropout"])
def test_how_many_functions_few_rows_call(kind, rows, case):
    """At few rows the functions around a product take longer than the product: no case may fall back to the general way."""
    layer = layer_of(64, 64, (8, 4) if case in ("two experts", "gate") else (8,), kind, dropout=0.1 if case == "dropout" else 0.0)
    x, dy, gate = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 64), torch.rand(rows, 2)

    def count(run):
        calls = []
        sys.setprofile(lambda frame, event, argument: calls.append(event) if event == "call" else None)
        try:
            run()
        finally:
            sys.setprofile(None)
        return len(calls)

    with fedms_ext.gated([layer] if case == "gate" else [], gate):
        layer(x).backward(dy)
        with torch.no_grad():
            forward = count(lambda: layer(x))
        both = count(lambda: layer(x).backward(dy))
    assert forward <= 20 and both <= 56  # measured: at most 17 and 50; by the general way 80 and 166


@needs_exchange
def test_what_is_not_plain_is_declined():
    layer, x = layer_of(16, 8, kind="int8"), torch.randn(2, 16)

    def call(x, frozen=layer.frozen, weight=None, bias=layer.bias, a=layer.lora_a["e0"], b=layer.lora_b["e0"], scale=(1.0,),
             gate=None, dropout_p=0.0, seed=None):  # fmt: skip
        with torch.no_grad():
            return plain_linear(x, frozen if weight is None else weight, bias, [a], [b], scale, gate, dropout_p, seed)

    assert call(x) is not None

    class Wrapped(torch.Tensor):
        pass

    for odd in (
        x.double(), x.bfloat16(), torch.randn(2, 32)[:, ::2], torch.randn(16, 2).T, torch.randn(2, 15), torch.randn(0, 16),
        torch.tensor(1.0), x.as_subclass(Wrapped), x.to_sparse(), torch.empty(2, 16, device="meta"),
        torch._neg_view(x),
    ):  # fmt: skip
        assert call(odd) is None
    assert call(x, a=layer.lora_a["e0"].double()) is None and call(x, b=layer.lora_b["e0"][:7]) is None
    assert call(x, bias=torch.randn(9)) is None and call(x, bias=torch.randn(1, 8)) is None
    assert call(x, b=layer.lora_b["e0"].unsqueeze(0)) is None
    assert call(x, scale=torch.ones(1)) is None and call(x, scale=[torch.tensor(1.0)]) is None and call(x, scale=[1.0, 2.0]) is None
    assert call(x, gate=torch.ones(2, 1)) is not None and call(x, gate=torch.ones(1, 1)) is None
    assert call(x, gate=torch.ones(2)) is None and call(x, gate=torch.ones(2, 2)) is None
    assert call(x, dropout_p=0.5, seed=3) is not None and call(x, dropout_p=1.0, seed=3) is None
    assert call(x, dropout_p=0.5) is None and call(x, dropout_p=0.5, seed=-1) is None
    assert call(x, dropout_p=0.5, seed=torch.tensor(3)) is None
    assert plain_linear(x, layer.matrix(), layer.bias, [], [], [], None, 0.0, None) is None  # F.linear, bit for bit
    assert call(x, frozen=QuantizedWeight(torch.randn(8, 16), "fp16")) is None
    wide = call(torch.randn(5, 16), weight=torch.randn(8, 16), a=torch.randn(64, 16), b=torch.randn(8, 64))
    assert wide is None  # of a branch of this rank the eager backend is the faster one
    assert call(torch.randn(5, 16), weight=torch.randn(8, 16)) is not None
    with use_backend("eager"):
        assert call(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x) is None
    with torch.profiler.profile():
        assert call(x) is None
    seen = []
    torch.func.vmap(lambda rows: seen.append(call(rows)) or rows)(x.unsqueeze(0))
    assert seen == [None]


@needs_exchange
def test_gradients_that_are_not_plain_and_second_ones(monkeypatch):
    for kind in (None, "int8", "nf4"):
        layer = layer_of(12, 10, kind=kind)
        x = torch.randn(3, 12, requires_grad=True)
        close(passes(layer, x, torch.ones(()).expand(3, 10)), generally(monkeypatch, layer, x, torch.ones(3, 10)))
        dy = torch.ones(3, 10, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@needs_exchange
def test_a_weight_that_has_changed_since_the_forward_pass_is_an_error():
    layer, x = layer_of(12, 10), torch.randn(2, 12, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_pair_applied_is_the_linear_layer():
    layer, x = layer_of(12, 10), torch.randn(1, 12)
    for name in layer.experts:
        layer.set_state(name, "off")
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@needs_exchange
@pytest.mark.parametrize("kind", [None, "int8"])
def test_y_is_a_tensor_of_its_own(kind):
    """A view could not be changed in place, as a residual connection may do."""
    y = layer_of(12, 10, kind=kind)(torch.randn(2, 12, requires_grad=True))
    assert y._base is None
    y.mul_(2).sum().backward()
