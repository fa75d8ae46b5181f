"""The operator in PyTorch, a chunk of positions at a time: for any device and dtype."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms_ext.backends.base import Weight

from .call import HeadCall, Result, empty_result

def raw_logits(head: HeadCall, hidden: Tensor) -> Tensor:
    """Return the logits (n, V) before scale and cap."""
    weight = head.weight
    if head.quantized is not None:
        weight = Weight(*head.quantized, *weight.shape).expanded(hidden.dtype)
    return F.linear(hidden, weight, head.bias)


def scaled(head: HeadCall, logits: Tensor) -> Tensor:
    """Apply the head's scale and soft cap, cap * tanh(logits / cap), to logits (n, V)."""
    logits = logits * head.scale
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def forward(hidden: Tensor, head: HeadCall, labels: Tensor, chunk: int, needs_gradient: bool) -> Result:
    """Compute log-probabilities and, if asked, gradients by PyTorch, `chunk` positions at a time."""
    result = empty_result(hidden, needs_gradient)
    for first in range(0, len(hidden), chunk):
        rows = slice(first, first + chunk)
        logits = scaled(head, raw_logits(head, hidden[rows]))
        log_p, wanted = logits.log_softmax(-1), labels[rows, None]
        p = log_p.exp()
        result.log_p[rows] = log_p.gather(1, wanted).squeeze(1)
        result.confidence[rows] = torch.stack([-(p * log_p).sum(-1), log_p.amax(-1)], -1)
        result.best[rows] = logits.argmax(-1)
        if needs_gradient:
            p = p.neg_().scatter_add_(1, wanted, torch.ones_like(wanted, dtype=p.dtype))
            if head.cap is not None:
                p *= 1 - (logits / head.cap).square()
            result.gradient[rows] = (p * head.scale) @ head.weight
    return result
