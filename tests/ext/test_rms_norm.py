"""The RMS norm in one C++ call, and which norms of a model are turned into it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fedms_ext import _C, use_rms_norm
from fedms_ext.nn.rms_norm import RMSNorm

needs_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange API"
)


class OddRMSNorm(nn.RMSNorm):
    """The factor is 1 + weight, as in Gemma."""

    def forward(self, x):
        return super().forward(x) * (1 + self.weight) / self.weight


def model(width=24):
    found = nn.ModuleDict({"plain": nn.RMSNorm(width, eps=1e-5), "odd": OddRMSNorm(width, eps=1e-5), "free": nn.RMSNorm(width),
                           "bare": nn.RMSNorm(width, eps=1e-5, elementwise_affine=False), "layer": nn.LayerNorm(width)})
    nn.init.normal_(found["plain"].weight, 2.0)
    return found.requires_grad_(False)


@needs_exchange
@pytest.mark.parametrize("width", [1, 5, 16, 17, 576, 1000])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (1, 1, 4)])
def test_the_kernel_in_float64(width, shape):
    x, weight = torch.randn(*shape, width) * 3, torch.randn(width)
    y = _C.rms_norm(x, weight, 1e-2)
    wide = x.double()
    want = weight * wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-7)


@needs_exchange
def test_bits_do_not_depend_on_threads_or_other_rows():
    x, weight, threads = torch.randn(2000, 576), torch.randn(576), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_C.rms_norm(x, weight, 1e-5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][7:8], _C.rms_norm(x[7:8], weight, 1e-5))


@needs_exchange
def test_what_is_not_plain_is_declined():
    x, weight = torch.randn(3, 8), torch.randn(8)
    for odd in (x.double(), x.T, torch.randn(3, 7), torch.randn(0, 8), torch._neg_view(x), x.to("meta")):
        assert _C.rms_norm(odd, weight, 1e-5) is None
    for odd in (weight.double(), torch.randn(16)[::2], torch.randn(1, 8)):
        assert _C.rms_norm(x, odd, 1e-5) is None


def test_norms_of_another_formula_stay():
    found = model()
    assert use_rms_norm(found) == 1 and use_rms_norm(found) == 0
    assert {name for name, module in found.items() if type(module) is RMSNorm} == {"plain"}
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(twin["plain"]) is RMSNorm and twin.state_dict().keys() == model().state_dict().keys()


def test_the_kernel_runs_where_nothing_is_differentiated(monkeypatch):
    found, x = model(), torch.randn(2, 3, 24)
    want = found["plain"](x)
    use_rms_norm(found)
    calls, kernel = [], _C.rms_norm
    monkeypatch.setattr(_C, "rms_norm", lambda *args: calls.append(args) or kernel(*args))
    torch.testing.assert_close(found["plain"](x), want)
    with torch.inference_mode():
        torch.testing.assert_close(found["plain"](x), want)
    assert len(calls) == 2
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(found["plain"](leaf).sum(), leaf)
    assert len(calls) == 2 and dx.abs().max() > 0
