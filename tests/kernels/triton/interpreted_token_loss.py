"""The kernel of the language models' loss under Triton's interpreter, on the CPU. Run by test_processes.py."""

from __future__ import annotations

import interpreter  # noqa: F401  (first: it sets TRITON_INTERPRET)
import pytest
import torch

from fedms_ext import reference
from fedms_ext.token_loss import FrozenHead, token_log_prob, triton


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(triton, "_LARGEST_BLOCK", 64)    # so that small vocabularies take several blocks
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("n, d, v, cap, scale, bias", [
    (1, 1, 1, None, 1.0, False), (5, 24, 301, None, 0.7, True), (9, 16, 64, 5.0, 2.0, False), (3, 8, 65, None, 1.0, True)])
def test_against_float64(dtype, tolerance, n, d, v, cap, scale, bias):
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    head = FrozenHead(torch.randn(v, d).to(dtype), torch.randn(v).to(dtype) if bias else None, scale=scale, cap=cap)
    labels = torch.randint(v, (n,))
    assert triton.supports(hidden, None)
    want = reference.token_log_prob(hidden.double(), head.weight.double(), labels,
                                    None if head.bias is None else head.bias.double(), scale, cap)
    got = token_log_prob(hidden, head, labels, 4)
    gradients = [torch.autograd.grad(of.sum(), hidden)[0].double() for of in (want[0], got.log_p)]
    for expected, found in ((want[0], got.log_p), (want[1], got.confidence), gradients):
        error = (found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1.0)
        assert error < tolerance
    if dtype == torch.float32:
        assert torch.equal(got.best, want[2])
