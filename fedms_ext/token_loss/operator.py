"""`token_log_prob` as PyTorch sees it: registration, fake, autograd and the checks of the arguments."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, eager, triton
from .call import HeadCall, empty_result
from .head import FrozenHead

_library = torch.library.Library("fedms_ext", "FRAGMENT")
# `packed` and `packed_scale` are the data and scale of a QuantizedWeight of the head, or None. `cap` 0 means no cap. The
# gradient is that of log_p by hidden, (n, D), made with the logits while they are there; (0, D) where nobody needs it.
_library.define(
    "token_log_prob(Tensor hidden, Tensor weight, Tensor? bias, Tensor? packed, Tensor? packed_scale, str kind, int group, "
    "Tensor labels, float scale, float cap, SymInt chunk, bool needs_gradient) "
    "-> (Tensor log_p, Tensor confidence, Tensor best, Tensor gradient)"
)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, packed_scale: Tensor | None, kind: str,
    group: int, labels: Tensor, scale: float, cap: float, chunk: int, needs_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    quantized = None if packed is None else (packed, packed_scale, kind, group)
    head = HeadCall(weight, bias, quantized, scale, cap or None)
    backend = next(b for b in (triton, cpu, eager) if b is eager or b.supports(hidden, head))
    return tuple(backend.forward(hidden, head, labels, chunk, needs_gradient))


_library.impl("token_log_prob", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fedms_ext::token_log_prob")
def _(hidden, weight, bias, packed, packed_scale, kind, group, labels, scale, cap, chunk, needs_gradient):
    return tuple(empty_result(hidden, needs_gradient))


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *head: Any) -> tuple[Tensor, Tensor, Tensor]:
        log_p, confidence, best, gradient = torch.ops.fedms_ext.token_log_prob(hidden, *head, True)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(confidence, best)
        return log_p, confidence, best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * upstream[:, None], *[None] * 10


class TokenStatistics(NamedTuple):
    """Of each position: log_p (n,), the log-probability of its label, differentiable; confidence (n, 2), the entropy in nats
    and the largest log-probability; best (n,) int64, the most probable token."""

    log_p: Tensor
    confidence: Tensor
    best: Tensor


def token_log_prob(hidden: Tensor, head: FrozenHead, labels: Tensor, chunk: int = 128) -> TokenStatistics:
    """Compute the log-probability of one token at each position under a frozen head, with memory for the logits of `chunk`
    positions.

    The gradient of a chunk is computed together with its logits, from the float weight (an int8 product would lose it: see
    `csrc/include/fedms/token_loss.h`), and multiplied in the backward pass. Under an int8 head, a CPU with AVX-512 BF16 rounds
    the probabilities and the float weight to bfloat16 in that product. Any loss that is a function of log_p is therefore
    differentiated correctly: a mean, weights by position, or `mixture_log_prob` of the outputs of two heads.

    Args:
        hidden: (n, D), floating. Float32 on the CPU is computed in C++, tensors on a GPU in Triton, others in PyTorch.
        head: The head with V tokens. It gets no gradient.
        labels: (n,) int64, each in 0..V-1, on the device of `hidden`.
        chunk: Number of positions whose logits are in memory at the same time, at least 1. In C++ it is those of 1,536 tokens at a
            time, on other backends those of all V.

    Returns:
        `TokenStatistics`, in the dtype of `hidden`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, device, label or the chunk is wrong.
    """
    _check(hidden, head, labels, chunk)
    quantized = head.quantized
    packed, packed_scale = (None, None) if quantized is None else quantized.operands
    kind, group = ("", 0) if quantized is None else (quantized.kind, quantized.group)
    arguments = (head.weight.detach(), None if head.bias is None else head.bias.detach(), packed, packed_scale, kind, group,
                 labels, head.scale, head.cap or 0.0, chunk)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return TokenStatistics(*_TokenLogProb.apply(hidden, *arguments))
    return TokenStatistics(*torch.ops.fedms_ext.token_log_prob(hidden, *arguments, False)[:3])


def _check(hidden: Tensor, head: FrozenHead, labels: Tensor, chunk: int) -> None:
    tokens, width = head.weight.shape
    if not hidden.is_floating_point() or hidden.dtype != head.weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, expected the dtype of the head's weight, {head.weight.dtype}")
    if hidden.dim() != 2 or hidden.shape[1] != width:
        raise ValueError(f"hidden has the shape {tuple(hidden.shape)}, expected (n, {width}) for a head of {tokens} tokens")
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}, expected torch.int64 of shape "
                         f"({len(hidden)},): one token a position")
    if not hidden.device == labels.device == head.weight.device:
        raise ValueError(f"hidden is on {hidden.device}, labels on {labels.device} and the head on {head.weight.device}; "
                         "move them to one device")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1 position")
    if labels.device.type == "cpu" and len(labels) and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= tokens:
            raise ValueError(f"labels hold {low if low < 0 else high}, expected tokens 0 to {tokens - 1}; leave out positions "
                             "without a label")


def mixture_log_prob(log_p: Tensor, gate: Tensor) -> Tensor:
    """Return log p of a mixture of the experts' probabilities, p = sum over e of gate_e p_e, at each position, (n,).

    The gradient of log p_e is the responsibility of the expert, g_e p_e / p. The gradient of its hidden state is that times onehot
    - p_e, through the head.

    Args:
        log_p: (n, E), each expert's log-probability of the label, as `token_log_prob` returns it.
        gate: (n, E) weights, at least 0, with sum 1. A weight of 0 leaves its expert out.
    """
    tiny = torch.finfo(gate.dtype).tiny
    return torch.logsumexp(log_p + gate.clamp_min(tiny).log(), dim=-1)
