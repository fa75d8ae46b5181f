"""The operator on a GPU: cuBLAS multiplies, one Triton kernel turns a chunk of logits into statistics and their gradient."""
from __future__ import annotations

import torch
from torch import Tensor

from fedms_ext.backends import device as devices

from . import eager
from .call import HeadCall, Result, empty_result

if devices.no_triton() is None:
    import triton

    from fedms_ext.backends.triton.token_rows import token_rows

_LARGEST_BLOCK = 4096  # logits that a program holds at a time


def supports(hidden: Tensor, head: HeadCall) -> bool:
    """Return whether the tensors have 32 or 16 bits and are on a GPU; under Triton's interpreter, on the CPU."""
    if devices.no_triton() is not None or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return devices.runs_triton(hidden.device)


def forward(hidden: Tensor, head: HeadCall, labels: Tensor, chunk: int, needs_gradient: bool) -> Result:
    """Compute log-probabilities and, if asked, gradients by the Triton kernel, `chunk` positions at a time."""
    result = empty_result(hidden, needs_gradient)
    tokens = len(head.weight)
    # float32 whatever the dtype of the logits: these sums have a term for every token.
    log_p, confidence = (hidden.new_empty((len(hidden), *shape), dtype=torch.float32) for shape in ((), (2,)))
    for first in range(0, len(hidden), chunk):
        rows = slice(first, first + chunk)
        logits = eager.raw_logits(head, hidden[rows]).contiguous()
        token_rows[(len(logits),)](
            logits, logits.stride(0), labels[rows], log_p[rows], confidence[rows], result.best[rows], tokens, head.scale,
            1.0 if head.cap is None else head.cap, HAS_CAP=head.cap is not None, NEEDS_GRADIENT=needs_gradient,
            BLOCK=min(_LARGEST_BLOCK, triton.next_power_of_2(tokens)),
        )  # fmt: skip
        if needs_gradient:
            torch.matmul(logits, head.weight, out=result.gradient[rows])
    result.log_p.copy_(log_p)
    result.confidence.copy_(confidence)
    return result
