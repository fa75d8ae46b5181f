"""The operator in C++, csrc/cpu/loss: logits, softmax and gradient of a chunk of positions in one call."""
from __future__ import annotations

import torch
from torch import Tensor

from fedms_ext import _C
from fedms_ext.quantization.formats import EIGHT_BITS

from .call import HeadCall, Result, empty_result


def supports(hidden: Tensor, head: HeadCall) -> bool:
    """float32 on the CPU, with the logits from the float weight or from int8."""
    tensors = (hidden, head.weight) if head.bias is None else (hidden, head.weight, head.bias)
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and head.weight.is_contiguous() and (
        head.quantized is None or head.quantized[2] in EIGHT_BITS)


def forward(hidden: Tensor, head: HeadCall, labels: Tensor, chunk: int, needs_gradient: bool) -> Result:
    """Compute log-probabilities and, if asked, gradients by the C++ kernel, `chunk` positions at a time."""
    result = empty_result(hidden, needs_gradient)
    chunk = min(chunk, max(len(hidden), 1))
    packed, packed_scale = head.quantized[:2] if head.quantized else (None, None)
    _C.token_log_prob(hidden.contiguous(), head.weight.detach(), packed, packed_scale,
                      None if head.bias is None else head.bias.detach().contiguous(), labels.contiguous(), head.scale,
                      head.cap or 0.0, chunk, hidden.new_empty(chunk * _C.TOKEN_STRETCH), result.log_p, result.confidence,
                      result.best, result.gradient if needs_gradient else None)
    return result
