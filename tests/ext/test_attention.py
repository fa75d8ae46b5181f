"""Attention of short sequences: the C++ kernels against the definition in float64, what they leave to PyTorch, and a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fedms_ext
from fedms_ext import _C, attention

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange API")
ISAS = fedms_ext.build_info()["isa_available"]
NAN = float("nan")
ROUNDS = fedms_ext.build_info()["bf16_products"]
SHAPES = [(1, 1, 1, 2, 1), (2, 3, 5, 7, 4), (1, 2, 48, 64, 32), (2, 1, 97, 33, 17), (1, 2, 50, 131, 64)]
KINDS = ["none", "row", "expanded", "head"]


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """New tensors that nothing wrote to hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def isa(request):
    before = fedms_ext.build_info()["isa_used"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def operands(batch, heads, queries, keys, width):
    """q, k, v and the gradient of the result as a model has them: heads between the values of a token."""
    return [torch.randn(batch, rows, heads, width).transpose(1, 2) for rows in (queries, keys, keys, queries)]


def definition(q, k, v, mask, scale):
    logits = scale * q.double() @ k.double().transpose(-1, -2)
    logits = logits if mask is None else logits + mask.double()
    largest = logits.amax(-1, keepdim=True)
    weights = torch.where(largest == -torch.inf, 0.0, (logits - largest.clamp_min(-1e300)).exp())
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300) @ v.double()


def close(got, want, tolerance=2e-6):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and (a.double() - b).norm() <= tolerance * b.norm().clamp_min(1e-20), (a.double() - b).norm() / b.norm()


def mask_of(kind, batch, heads, queries, keys, _):
    """A mask, or None, that leaves the first key to every query."""
    sizes = {"row": (batch, 1, queries, keys), "expanded": (batch, 1, 1, keys), "head": (1, heads, queries, keys)}
    mask = None if kind == "none" else torch.randn(sizes[kind])
    if mask is not None:
        mask[..., 1:][mask[..., 1:] > 0.5] = -torch.inf
    return mask.expand(batch, 1, queries, keys) if kind == "expanded" else mask


def both_passes(q, k, v, dout, mask, scale, rounded=False):
    """The result and the gradients of q, k and v, by the C++ kernels."""
    out, softmax = _C.attention_forward(q, k, v, mask, scale, rounded)
    gradients = _C.attention_backward(dout, q, k, v, mask, scale, rounded, softmax)
    return [t.transpose(1, 2) for t in (out, *gradients)]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(isa, shape, kind):
    q, k, v, dout = operands(*shape)
    mask = mask_of(kind, *shape)
    got = both_passes(q, k, v, dout, mask, 0.3)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want = definition(*wide, mask, 0.3)
    # With a single key that takes part the gradients of q and k are 0 but for rounding.
    expected = [want, *torch.autograd.grad(want, wide, dout.double())]
    scale = expected[3].norm()
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * torch.maximum(b.norm(), scale)


def with_rounded_operands(q, k, v, dout, mask, scale):
    """The result and the gradients in float64, where the operands of every product are rounded to bfloat16 first."""

    def rounded(t):
        return t.bfloat16().double()

    q, k, v, dout = map(rounded, (q, k, v, dout))
    logits = scale * q @ k.transpose(-1, -2) + (0.0 if mask is None else mask.double())
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    total = e.sum(-1, keepdim=True)
    p, dp = e / total, dout @ v.transpose(-1, -2)
    dlogits = rounded(scale * p * (dp - (p * dp).sum(-1, keepdim=True)))
    return [rounded(e) @ v / total, dlogits @ k, dlogits.transpose(-1, -2) @ q, rounded(p).transpose(-1, -2) @ dout]


@pytest.mark.skipif(not ROUNDS, reason="this CPU has no AVX-512 BF16, or another instruction set was chosen")
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 193, 66, 65), (1, 1, 100, 512, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_rounded_operands(shape, kind):
    given = operands(*shape)
    mask = mask_of(kind, *shape)
    got, expected = both_passes(*given, mask, 0.3, rounded=True), with_rounded_operands(*given, mask, 0.3)
    scale = expected[3].norm()
    # What is rounded inside, the exponentials and the logits' gradients, may differ by one unit where float32 lies at a tie.
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 2e-4 * torch.maximum(b.norm(), scale)
    exact = both_passes(*given, mask, 0.3)
    for a, b in zip(got, exact, strict=True):
        assert (a - b).norm() <= 2e-2 * torch.maximum(b.norm(), scale)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_only_a_cpu_that_multiplies_bfloat16_rounds(isa):
    given = operands(1, 2, 9, 11, 8)
    exact, rounded = (both_passes(*given, None, 0.3, rounded=choice) for choice in (False, True))
    assert fedms_ext.build_info()["bf16_products"] == (ROUNDS and isa == "avx512")
    assert all(torch.equal(a, b) for a, b in zip(exact, rounded, strict=True)) != fedms_ext.build_info()["bf16_products"]


@pytest.mark.parametrize("rounded", [False, True])
def test_a_row_that_is_masked_everywhere_is_zero_and_gives_no_gradient(rounded):
    q, k, v, dout = operands(1, 2, 3, 20, 8)
    mask = torch.zeros(1, 1, 3, 20)
    mask[:, :, 1] = -torch.inf
    out, dq, dk, dv = both_passes(q, k, v, dout, mask, 1.0, rounded)
    assert not out[:, :, 1].any() and not dq[:, :, 1].any()
    rest = [t[:, :, [0, 2]] for t in (q, dout)]
    wide = [t.double().requires_grad_() for t in (rest[0], k, v)]
    want = torch.autograd.grad(definition(*wide, None, 1.0), wide, rest[1].double())
    close([dk, dv], want[1:], 2e-2 if rounded and ROUNDS else 2e-6)


@pytest.mark.parametrize("rounded", [False, True])
def test_nan_and_large_logits_stay_in_their_rows(rounded):
    q, k, v, _ = operands(2, 2, 6, 40, 16)
    clean = _C.attention_forward(q, k, v, None, 1.0, rounded)[0]
    bad = q.clone()
    bad[0, 1, 3, 2] = NAN
    out = _C.attention_forward(bad, k, v, None, 1.0, rounded)[0]
    assert out[0, 3, 1].isnan().all()
    out[0, 3, 1] = clean[0, 3, 1]
    assert torch.equal(out, clean)
    q, k, v = (t.bfloat16().float() for t in (300 * q, k, v))  # which no kernel has to round
    large = _C.attention_forward(q, k, v, None, 1.0, rounded)[0].transpose(1, 2)
    close([large], [definition(q, k, v, None, 1.0)], 5e-3 if rounded else 1e-4)  # float32 rounds logits of some thousands


@pytest.mark.parametrize("rounded", [False, True])
def test_bits_repeat_on_any_number_of_threads(rounded):
    given = operands(8, 4, 64, 64, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(both_passes(*given, None, 0.2, rounded))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bool_mask", [False, True])
def test_the_function_is_pytorchs(bool_mask):
    q, k, v, dout = (t.requires_grad_() for t in operands(2, 3, 10, 12, 8))
    mask = torch.rand(2, 1, 10, 12) > 0.3 if bool_mask else None
    pairs = []
    for out in (attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)):
        pairs.append([out, *torch.autograd.grad(out, (q, k, v), dout.detach())])
    close(*pairs)
    ones = torch.ones(()).expand(2, 3, 10, 8)  # a gradient without values of its own
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(torch.autograd.grad(attention(q, k, v, mask), q, ones), torch.autograd.grad(sdpa, q, ones.contiguous()))


def test_what_is_left_to_pytorch():
    q, k, v, _ = operands(1, 2, 5, 6, 4)
    for odd in (
        (q.double(), k.double(), v.double()), (q[0], k[0], v[0]), (q, k[:, :, :0], v[:, :, :0]), (q, k[:, :, :, ::2], v),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
    ):  # fmt: skip
        assert _C.attention_forward(*odd, None, 1.0, False) is None
    for mask in (torch.zeros(1, 2, 5, 5), torch.zeros(5, 6), torch.zeros(2, 2, 5, 6), torch.zeros(1, 1, 5, 6).double()):
        assert _C.attention_forward(q, k, v, mask, 1.0, False) is None
    doubles = q.double(), k.double(), v.double()
    torch.testing.assert_close(attention(*doubles), F.scaled_dot_product_attention(*doubles))
    with pytest.raises(RuntimeError):
        attention(q, k[..., :3], v)


def test_a_compiled_call_has_one_graph_and_is_pytorchs():
    q, k, v, _ = operands(1, 2, 5, 6, 4)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, fullgraph=True, backend="eager")
    close([compiled(q, k, v)], [2 * F.scaled_dot_product_attention(q, k, v).double()])


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, vocab_size=50)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    batch["attention_mask"][0, 5:] = 0
    return model, batch


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the kernel's calls."""
    calls, kernel = [], _C.attention_forward
    monkeypatch.setattr(_C, "attention_forward", lambda *args: calls.append(args) or kernel(*args))
    return calls


def test_a_transformers_model_uses_it(bert, calls):
    model, batch = bert
    target = torch.randn(3, 9, 24)

    def found():
        out = model(**batch).last_hidden_state
        return [out, *torch.autograd.grad(out, list(model.parameters())[:3], target)]

    want = found()
    assert fedms_ext.use_attention(model) and not fedms_ext.use_attention(model)
    close(found(), [t.double() for t in want], 1e-5)
    assert len(calls) == (2 if fedms_ext.build_info()["isa_used"] == "avx512" else 0)
    assert not fedms_ext.use_attention(torch.nn.Linear(2, 2))


@pytest.mark.skipif(fedms_ext.build_info()["isa_used"] != "avx512", reason="the kernel is used with AVX-512")
@pytest.mark.parametrize(("kind", "rounded"), [("int8", True), ("nf4", True), ("bf16", False)])
def test_only_blocks_whose_layers_round_their_inputs_round_in_attention(bert, calls, kind, rounded):
    model, batch = bert
    fedms_ext.use_attention(model.requires_grad_(False))
    fedms_ext.quantize(model, kind, exclude=r".*layer\.1\..*")
    model(**batch)
    assert [args[-1] for args in calls] == [rounded, False]
