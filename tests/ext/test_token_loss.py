"""`fedms_ext.token_loss` against float64, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedms_ext
from fedms_ext import _C, reference
from fedms_ext.token_loss import FrozenHead, mixture_log_prob, token_log_prob

# (positions, width, tokens, cap, scale, bias)
SHAPES = [(1, 1, 1, None, 1.0, False), (7, 24, 301, None, 1.0, True), (37, 16, 50, 5.0, 0.7, False),
          (130, 70, 999, None, 2.0, True), (3, 33, 4099, 30.0, 1.0, True), (0, 8, 5, None, 1.0, False)]


@pytest.fixture(params=[isa for isa in fedms_ext.build_info()["isa_available"] if isa != "avxvnni"])
def isa(request):
    before = fedms_ext.build_info()["isa_used"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def case(n: int, d: int, v: int, cap: float | None, scale: float, bias: bool, dtype: torch.dtype = torch.float32):
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype)
    head = FrozenHead(weight, torch.randn(v, dtype=dtype) if bias else None, scale=scale, cap=cap)
    return hidden, head, torch.randint(v, (n,))


def expected(hidden: Tensor, head: FrozenHead, labels: Tensor):
    bias = None if head.bias is None else head.bias.double()
    return reference.token_log_prob(hidden.double(), head.weight.double(), labels, bias, head.scale, head.cap)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_against_float64(isa, shape, chunk):
    hidden, head, labels = case(*shape)
    want, got = expected(hidden, head, labels), token_log_prob(hidden, head, labels, chunk)
    upstream = torch.linspace(-1, 2, len(labels))
    want_gradient, = torch.autograd.grad((want[0] * upstream).sum(), hidden)
    gradient, = torch.autograd.grad((got.log_p * upstream).sum(), hidden)
    torch.testing.assert_close(got.log_p.double(), want[0], rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(got.confidence.double(), want[1], rtol=2e-6, atol=2e-5)
    assert torch.equal(got.best, want[2])
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=2e-5)


def test_every_value_is_written_whatever_the_memory_held():
    torch.use_deterministic_algorithms(True)    # new memory is then full of NaN
    try:
        hidden, head, labels = case(9, 12, 77, None, 1.0, True)
        got = token_log_prob(hidden, head, labels, 4)
        got.log_p.sum().backward()
        assert all(value.isfinite().all() for value in (got.log_p, got.confidence, hidden.grad))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int8_rotated"])
def test_neither_threads_nor_chunks_change_the_bits(dtype):
    hidden, head, labels = case(70, 96, 1500, None, 1.0, False)
    head = FrozenHead(head.weight, dtype=dtype)

    def bits(threads: int, chunk: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        log_p = token_log_prob(hidden, head, labels, chunk).log_p
        return [log_p, *torch.autograd.grad(log_p.sum(), hidden)]

    before = torch.get_num_threads()
    try:
        first = bits(1, 128)
        for threads, chunk in ((2, 128), (3, 64), (5, 7)):
            assert all(map(torch.equal, first, bits(threads, chunk)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_gradcheck(cap):
    hidden, head, labels = case(5, 4, 11, cap, 0.8, True, torch.float64)
    assert torch.autograd.gradcheck(lambda h: token_log_prob(h, head, labels, 2).log_p, hidden)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient):
    hidden, head, labels = case(5, 4, 11, None, 1.0, True)
    torch.library.opcheck(torch.ops.fedms_ext.token_log_prob, (
        hidden.detach(), head.weight, head.bias, None, None, "", 0, labels, 1.0, 0.0, 2, needs_gradient))


def test_bfloat16_runs_in_pytorch():
    hidden, head, labels = case(6, 16, 40, None, 1.0, False, torch.bfloat16)
    got = token_log_prob(hidden, head, labels, 4)
    assert got.log_p.dtype == torch.bfloat16
    torch.testing.assert_close(got.log_p.double(), expected(hidden, head, labels)[0], rtol=3e-2, atol=0.2)


def test_a_stretch_of_impossible_tokens_counts_for_nothing(isa):
    """The sums over the vocabulary begin with tokens whose logits are all minus infinity."""
    hidden, head, _ = case(5, 8, 3500, None, 1.0, True)
    head.bias[:1700] = float("-inf")
    labels = torch.randint(1700, 3500, (5,))
    got = token_log_prob(hidden, head, labels)
    possible = FrozenHead(head.weight[1700:].clone(), head.bias[1700:].clone())
    want = expected(hidden, possible, labels - 1700)
    torch.testing.assert_close(got.log_p.double(), want[0], rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(got.confidence.double(), want[1], rtol=2e-6, atol=2e-5)
    assert torch.equal(got.best, want[2] + 1700)
    gradient, = torch.autograd.grad(got.log_p.sum(), hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(want[0].sum(), hidden)[0], rtol=1e-5, atol=2e-5)


def test_the_gradient_of_a_nearly_certain_token_keeps_its_digits(isa):
    """The label has all but 1e-5 of the probability, so the gradient is a small difference from the label's row of the weight."""
    hidden, head, labels = case(6, 32, 4099, None, 1.0, False)
    with torch.no_grad():
        head.weight.mul_(0.1)
        rows = head.weight[labels]
        hidden.copy_(rows * (20 / rows.square().sum(1, keepdim=True)))
    got, want = token_log_prob(hidden, head, labels), expected(hidden, head, labels)
    gradient, = torch.autograd.grad(got.log_p.sum(), hidden)
    exact, = torch.autograd.grad(want[0].sum(), hidden)
    assert float(want[0].detach().exp().min()) > 0.99 and relative(gradient, exact) < 1e-5


# An int8 head

def language_head() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states whose distribution has a head and a long tail, as a language model's has; tokens; the weight."""
    weight = 0.5 * torch.randn(4096, 64)
    labels = torch.randint(4096, (96,))
    hidden = (0.1 * weight[labels] + 0.2 * torch.randn(96, 64)).requires_grad_()
    return hidden, labels, weight


def test_an_int8_head_has_its_gradient_from_the_float_weight():
    """Backward through an int8 product loses the gradient: onehot - p has one value near 1 and 4,095 small ones that hold
    most of the probability, which all are rounded to zero."""
    hidden, labels, weight = language_head()
    exact, = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), hidden)
    head = FrozenHead(weight, dtype="int8")
    ours, = torch.autograd.grad(-token_log_prob(hidden, head, labels).log_p.sum(), hidden)
    both_ways, = torch.autograd.grad(F.cross_entropy(
        fedms_ext.expert_linear(hidden, head.quantized, None), labels, reduction="sum"), hidden)
    assert relative(ours, exact) < 0.02
    assert relative(both_ways, exact) > 5 * relative(ours, exact)


@pytest.mark.parametrize("n, d, v", [(1, 1, 1), (9, 5, 77), (70, 70, 1999), (3, 33, 4099), (13, 130, 96)])
def test_the_gradient_of_an_int8_head_is_that_of_its_logits_through_the_float_weight(isa, n, d, v):
    """Two rounded operands of 8 significant bits, where the CPU multiplies bfloat16 with AVX-512; else float32."""
    hidden, head, labels = case(n, d, v, None, 0.8, False)
    head = FrozenHead(head.weight, scale=0.8, dtype="int8")
    gradient, = torch.autograd.grad(token_log_prob(hidden, head, labels, 6).log_p.sum(), hidden)
    p = head(hidden).double().softmax(-1)
    want = 0.8 * (F.one_hot(labels, v).double() - p) @ head.weight.double()
    terms = 0.8 * (p.square() @ head.weight.double().square()).sqrt()
    error = (gradient.double() - want).abs()
    assert (error <= 1e-5 + (2**-7 if isa == "avx512" else 0) * terms).all()


def test_an_int8_head_has_the_logits_of_the_int8_product():
    hidden, labels, weight = language_head()
    head = FrozenHead(weight, dtype="int8")
    logits = head(hidden)
    assert 1e-4 < relative(logits, hidden.detach() @ weight.T) < 0.02
    got = token_log_prob(hidden, head, labels)
    torch.testing.assert_close(got.log_p.detach(), logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1))
    assert torch.equal(got.best, logits.argmax(-1))


# Mixtures

def test_mixture_of_probabilities_equals_autograd_on_full_logits():
    weight, labels = torch.randn(301, 16, dtype=torch.float64), torch.randint(301, (37,))
    states = [torch.randn(37, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    raw = torch.randn(37, 2, dtype=torch.float64, requires_grad=True)

    def plain() -> Tensor:
        p = torch.stack([(h @ weight.T).softmax(-1) for h in states], 1)
        mixed = (raw.softmax(1).unsqueeze(-1) * p).sum(1)
        return -mixed.gather(1, labels[:, None]).log().mean()

    def chunked() -> Tensor:
        head = FrozenHead(weight)
        log_p = torch.stack([token_log_prob(h, head, labels, 8).log_p for h in states], 1)
        return -mixture_log_prob(log_p, raw.softmax(1)).mean()

    found = [[loss.detach(), *torch.autograd.grad(loss, (*states, raw))] for loss in (plain(), chunked())]
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_gate_of_zero_leaves_its_expert_out():
    log_p = torch.tensor([[-1e30, -2.0], [-3.0, -4.0]])
    gate = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(mixture_log_prob(log_p, gate), torch.tensor([-2.0, -3.0]))
    torch.testing.assert_close(reference.mixture_log_prob(log_p, gate), torch.tensor([-2.0, -3.0]))


# Refusals

@pytest.mark.parametrize("change, message", [
    (dict(labels=torch.tensor([0, 11])), "labels hold 11, expected tokens 0 to 10"),
    (dict(labels=torch.tensor([-100, 3])), "labels hold -100, .*leave out positions"),
    (dict(labels=torch.tensor([1])), r"shape \(1,\), expected torch.int64 of shape \(2,\)"),
    (dict(hidden=torch.randn(2, 5)), r"hidden has the shape \(2, 5\), expected \(n, 4\)"),
    (dict(chunk=0), "chunk is 0, expected at least 1"),
])
def test_refuses_what_does_not_fit(change, message):
    arguments = {"hidden": torch.randn(2, 4), "head": FrozenHead(torch.randn(11, 4)), "labels": torch.tensor([0, 10]), **change}
    with pytest.raises(ValueError, match=message):
        token_log_prob(**arguments)


@pytest.mark.parametrize("arguments, message", [
    (dict(weight=torch.randn(3)), "expected floating"), (dict(cap=0.0), "cap is 0.0"), (dict(scale=float("nan")), "scale is nan"),
    (dict(dtype="nf4"), "expected fp32, int8 or int8_rotated"), (dict(bias=torch.randn(4)), r"expected \(3,\)")])
def test_a_head_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrozenHead(**{"weight": torch.randn(3, 2), **arguments})


def test_nan_stays_nan_and_minus_infinity_is_never_the_answer(isa):
    hidden, head, labels = case(4, 8, 50, None, 1.0, True)
    head.bias[7] = float("-inf")
    labels[:] = 3
    poisoned = hidden.detach().clone()
    poisoned[1, 2] = float("nan")
    got = token_log_prob(poisoned, head, labels)
    assert got.log_p.isnan().tolist() == [False, True, False, False]
    assert (got.best[[0, 2, 3]] != 7).all() and got.confidence[[0, 2, 3]].isfinite().all()
