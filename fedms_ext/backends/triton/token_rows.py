"""Compute log-probabilities from rows of logits: the Triton kernel of `fedms_ext.token_loss`."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(z_row, columns, tokens, scale, cap, HAS_CAP: tl.constexpr):
    """Return BLOCK logits in float32, scaled and capped. Positions after the end of the vocabulary hold -inf."""
    inside = columns < tokens
    z = tl.load(z_row + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_CAP:
        e = tl.exp(-2 * tl.abs(z / cap))  # tanh in the form that loses nothing for large |z|
        tanh = (1 - e) / (1 + e)
        z = cap * tl.where(z < 0, -tanh, tanh)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def token_rows(z, z_stride, labels, log_p, confidence, best, tokens, scale, cap, HAS_CAP: tl.constexpr,
               NEEDS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Process one row of logits z (rows, tokens), given before scale and cap, in each program.

    The kernel writes log_p (rows,), confidence (rows, 2) and best (rows,) as described in `TokenStatistics`. With NEEDS_GRADIENT it also
    overwrites z by the gradient of log_p with respect to z. Sums are computed in float32 over a running maximum (Milakov and Gimelshein,
    arXiv 1805.02867).
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = z + row * z_stride
    label = tl.load(labels + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)  # of exp(z - largest)
    weighted = tl.full((), 0.0, tl.float32)  # of (z - largest) exp(z - largest)
    at_label = tl.full((), 0.0, tl.float32)
    where = tl.full((), 0, tl.int64)
    for first in range(0, tokens, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = _read(z_row, columns, tokens, scale, cap, HAS_CAP)
        found = tl.max(values, 0)
        where = tl.where(found > largest, first + tl.argmax(values, 0), where)
        now = tl.maximum(largest, found)
        step = tl.where(total > 0, largest - now, 0.0)
        weighted = (weighted + total * step) * tl.exp(step)
        total = total * tl.exp(step)
        below = tl.where(columns < tokens, values - now, 0.0)
        e = tl.where(columns < tokens, tl.exp(below), 0.0)
        total += tl.sum(e, 0)
        weighted += tl.sum(below * e, 0)
        at_label += tl.sum(tl.where(columns == label, values, 0.0), 0)
        largest = now
    log_total = tl.log(total)
    tl.store(log_p + row, at_label - largest - log_total)
    tl.store(confidence + 2 * row, log_total - weighted / total)
    tl.store(confidence + 2 * row + 1, -log_total)
    tl.store(best + row, where)
    if NEEDS_GRADIENT:
        for first in range(0, tokens, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            values = _read(z_row, columns, tokens, scale, cap, HAS_CAP)
            g = tl.where(columns == label, 1.0, 0.0) - tl.exp(values - largest) / total
            if HAS_CAP:
                g *= 1 - (values / cap) * (values / cap)
            tl.store(z_row + columns, (g * scale).to(z.dtype.element_ty), mask=columns < tokens)
