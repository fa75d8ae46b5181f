"""The CUDA C++ kernels of csrc/cuda.

They take bf16 and fp16 layers whose sides are multiples of 8 (of 16 along K for an int8 weight), with a total rank of 256 at
most and up to eight segments. Experts in float32 are rounded to x's dtype for the products; their gradients are summed and
returned in float32.

They are chosen on a GPU on which this build has passed its tests, of which `make gpu` leaves a record, for the shapes at which
they were measured to be faster than the other backends: a kernel that never ran is no default. FEDMS_BACKEND=cuda forces them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import device as devices
from . import eager, fastest, triton
from .base import FLOATING, Backend, BackwardCall, Call, ForwardCall, Gradients, Lora, dense_rows, empty_gradients, scale_on
from .cuda_plan import Plan, shape_of, shared_plan

name = "cuda"

LARGEST_RANK = 256  # of all experts together; above it the branch is no longer narrow

_kernels = devices.cuda_kernels()


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; see `Backend.unavailable`."""
    return devices.no_cuda_kernels()


def supports(call: Call) -> str | None:
    """Return why this backend cannot compute a call, or None; see `Backend.supports`."""
    x, lora, weight = call.input, call.lora, call.weight
    if (reason := devices.unfit_input(x, devices.runs_cuda(x.device))) is not None:
        return reason
    if not lora.a or lora.rank > LARGEST_RANK or len(lora.segments or ()) > _kernels.MOST_SEGMENTS:
        return f"it takes a total rank from 1 to {LARGEST_RANK}, and at most {_kernels.MOST_SEGMENTS} segments"
    if lora.a[0].dtype not in (x.dtype, torch.float32):
        return f"it takes experts in {x.dtype} or torch.float32, but they are in {lora.a[0].dtype}"
    if x.numel() == 0 or weight.n == 0 or weight.n % 8 or weight.k % 8:
        return f"both sides of the weight must be multiples of 8, and x must have rows; the weight is {(weight.n, weight.k)}"
    return _unreadable(call)


def _unreadable(call: Call) -> str | None:
    """Return why the kernels cannot read the weight, or None if they can."""
    x, weight = call.input, call.weight
    if isinstance(call, BackwardCall) and not call.needs.dx:
        return None
    if weight.kind == FLOATING:
        return None if weight.data.dtype == x.dtype else f"the weight is {weight.data.dtype}, but x is {x.dtype}"
    # Forward an int8 weight is (N, K), backward (K, N): its rows are read in pieces of 16 bytes.
    if weight.kind != "int8" or weight.data.dtype != torch.int8:
        return f"of quantized weights it takes int8 that lies on the GPU, but this one is {weight.kind}"
    return f"a row of the int8 weight {(weight.n, weight.k)} is no multiple of 16" if weight.data.shape[1] % 16 else None


def prefers(call: Call) -> bool:
    """Return whether the kernels passed their tests on this GPU and are faster for this shape than what would run otherwise."""
    if not devices.has_passed(devices.properties(call.input.device).capability):
        return False
    rival: Backend = triton if triton.unavailable() is None and triton.supports(call) is None else eager
    return fastest.is_faster(name, (forward, backward), rival, call)


def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """Compute y (..., N) and S, the experts' inner products that the backward pass needs; see `Backend.forward`."""
    x, weight, bias, lora = call
    plan = shared_plan(shape_of(x, weight, lora))
    rows = _aligned_rows(x)
    y, s = x.new_empty(*x.shape[:-1], weight.n), x.new_empty(len(rows), plan.rank)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan.forward(rows, _aligned_rows(weight.data), weight.scale, bias, *_branch(plan, lora, x.device), y, s, None)
    return y, s


def backward(call: BackwardCall) -> Gradients:
    """Compute the gradients that a call asks for; see `Backend.backward`."""
    dy, x, weight, lora, s, needs = call
    plan = shared_plan(shape_of(dy, weight, lora))
    rows = _aligned_rows(dy)
    dx = dy.new_empty(*dy.shape[:-1], weight.k) if needs.dx else None
    dgate = dy.new_empty(len(rows), lora.gate.shape[-1], dtype=torch.float32) if needs.dgate else None
    da, db = empty_gradients(lora, needs)
    plan.backward(
        rows, _aligned_rows(x) if any(needs.da) else None, _aligned_rows(weight.data) if needs.dx else None,
        weight.scale, *_branch(plan, lora, dy.device), None if s is None else s.contiguous(), None, dx, dgate, da, db,
    )  # fmt: skip
    return dx, None if dgate is None else dgate.view(lora.gate.shape).to(lora.gate.dtype), da, db


def _branch(plan: Plan, lora: Lora, device: torch.device) -> tuple[object, ...]:
    """Return A, B, scale, gate, dropout and seed as a plan takes them."""
    a, b, gate = lora.a, lora.b, lora.gate_rows()
    if plan.reads_expert_in_place:
        a, b = [_aligned_rows(a[0])], [_aligned_rows(b[0])]
    scale = scale_on(lora.scale, device).to(torch.float32)
    return a, b, scale, None if gate is None else gate.to(torch.float32), lora.dropout_p, lora.seed


def _aligned_rows(x: Tensor) -> Tensor:
    """Return x (..., K) as (M, K) with rows that start at multiples of 16 bytes."""
    return dense_rows(x, 16)
