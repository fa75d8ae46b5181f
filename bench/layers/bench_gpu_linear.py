"""One expert linear layer on a GPU, beside its peers: forward, and forward + backward; and layers that share their input, together
and one by one.

    python -m bench.layers.bench_gpu_linear [--quick] [--seconds S] [--json FILE] [--rehearse]

All ratios are to the bare frozen GEMM: F.linear, and for forward + backward F.linear and the GEMM of dx; the floor is the
one of gpu_work.py. Peers: PEFT, PEFT compiled, NeMo AutoModel's Triton kernels beside a frozen GEMM (where nemo-automodel
is installed), and the operator sequences of Unsloth (`addmm_` into the frozen GEMM's output, dx written by `addmm_`) and of
LoRAFusion (S apart, then one GEMM that adds it; dS and dB from dy), both written anew here on cuBLAS.

Of layers that share their input the ratios are to the bare frozen GEMMs of all, forward and backward, and PyTorch's sums of their dx.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bench.harness.gpu_clock import Report
from bench.kernels.work import SHAPES, Work
from torch import Tensor

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, expert_linear

QUICK = SHAPES[:3]
CUDA = "fedms, CUDA C++"  # csrc/cuda, which is not the default
REHEARSAL = [(64, 48, 70, 8)]
# Layers that share their input: K, the N of each, rows, the rank of each. Query, key and value; with fewer heads of key and value;
# the gate and the up projection of an MLP.
SIBLINGS = [(4096, (4096,) * 3, 8192, 16), (768, (768,) * 3, 12608, 16), (4096, (4096, 1024, 1024), 8192, 16),
            (4096, (14336,) * 2, 8192, 16), (384, (384,) * 3, 2048, 8)]  # fmt: skip
QUICK_SIBLINGS = SIBLINGS[:2]
SIBLINGS_REHEARSAL = [(64, (48, 40), 70, 8)]


def unsloth(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Unsloth's order of operators (LoRA_W of its fast_lora), without bias and dropout, as there."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            y = x @ weight.t()
            y.addmm_(x @ a.t(), b.t(), alpha=scale)
            ctx.save_for_backward(x, a, b)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, a, b = ctx.saved_tensors
            da = ((dy @ b).t() @ x).mul_(scale)
            db = (dy.t() @ (x @ a.t())).mul_(scale)
            dx = dy @ weight
            dx.addmm_(dy @ b, a, alpha=scale)
            return dx, da, db

    return Layer.apply(x, a, b)


def lorafusion(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """LoRAFusion's split, on cuBLAS: S is kept, the base product takes it up (addmm), dS and dB are made from dy."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            s = x @ a.t()
            ctx.save_for_backward(x, a, b, s)
            return torch.addmm(s @ b.t(), x, weight.t(), beta=scale)

        @staticmethod
        def backward(ctx, dy):
            x, a, b, s = ctx.saved_tensors
            ds = (dy @ b).mul_(scale)
            return torch.addmm(ds @ a, dy, weight), ds.t() @ x, (dy.t() @ s).mul_(scale)

    return Layer.apply(x, a, b)


def nemo(kernels: ModuleType, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """NeMo AutoModel's LoRATritonFunction, its branch added to the frozen layer's output as in its TritonLinearLoRA."""

    class Branch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            return kernels.lora_forward_wrapper(x, a.t(), b.t(), res=None, scale=scale, dtype=x.dtype)

        @staticmethod
        def backward(ctx, dy):
            x, a, b = ctx.saved_tensors
            da, dx = kernels.lora_da_dx_update_wrapper(x.t(), dy, b, a, scale, dtype=x.dtype)
            return dx, da.t(), kernels.lora_db_update_wrapper(a, x.t(), dy, scale, x.dtype)

    return F.linear(x, weight) + Branch.apply(x, a, b)


def nemo_kernels() -> ModuleType | None:
    try:
        return importlib.import_module("nemo_automodel.components._peft.lora_kernel")
    except ImportError:
        return None


def peft_layer(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> torch.nn.Module:
    import peft

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    base.weight.data = weight
    rank = a.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return layer


Operator = Callable[[Tensor], Tensor]


def operators(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, compiled: Sequence[str] = ("PEFT", "fedms")
) -> dict[str, tuple[Operator, list[Tensor]]]:
    """Each peer as a function of x, and the parameters that it trains. `compiled`: of which, on a GPU, by torch.compile too."""
    merged = weight + scale * (b @ a).detach()
    found: dict[str, tuple[Operator, list[Tensor]]] = {
        "bare GEMM": (lambda x: F.linear(x, weight), []),
        "merged W": (lambda x: F.linear(x, merged), []),
        "fedms, none applied": (lambda x: expert_linear(x, weight, None, [a], [b], [scale], active=[False]), []),
        "fedms": (lambda x: expert_linear(x, weight, None, [a], [b], [scale]), [a, b]),
        "fedms, dropout 0.1": (lambda x: expert_linear(x, weight, None, [a], [b], [scale], None, None, 0.1, 7), [a, b]),
        "Unsloth's operators": (lambda x: unsloth(x, weight, a, b, scale), [a, b]),
        "LoRAFusion's operators": (lambda x: lorafusion(x, weight, a, b, scale), [a, b]),
    }
    if weight.is_cuda and (kernels := nemo_kernels()):
        found["NeMo AutoModel's kernels"] = (lambda x: nemo(kernels, x, weight, a, b, scale), [a, b])
    if "cuda" in fedms_ext.available():
        found[CUDA] = found["fedms"]
    try:
        layer = peft_layer(weight, a.detach().clone(), b.detach().clone(), scale)
        trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        found["PEFT"] = (layer, trained)
        for name in compiled if weight.is_cuda else ():  # what the compiler makes of it on the CPU is another matter
            operator, parameters = found[name]
            found[f"{name}, compiled"] = (torch.compile(operator, dynamic=False), parameters)
    except ImportError:
        pass  # the report names the peers that it has
    return found


def forward_only(operator: Operator, x: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return operator(x)

    return call


def both(operator: Operator, x: Tensor, dy: Tensor, trained: list[Tensor]) -> Callable[[], object]:
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(operator(x), [x, *trained], dy)


def on_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def there() -> object:
        with fedms_ext.use_backend(name):
            return call()

    return there


def run(report: Report, shapes: list[tuple[int, int, int, int]]) -> None:
    for number, (k, n, rows, rank) in enumerate(shapes):
        torch.manual_seed(0)
        like = dict(dtype=report.dtype, device=report.clock.device)
        x, dy = torch.randn(rows, k, **like), torch.randn(rows, n, **like)
        weight = torch.randn(n, k, **like) / k**0.5
        a = (torch.randn(rank, k, **like) / k**0.5).requires_grad_()
        b = torch.randn(n, rank, **like).requires_grad_()
        # Compilation takes longer than all the timing: a quick run does it for the peer and the shape of that goal.
        compiled = ("PEFT", "fedms") if not report.quick else ("PEFT",) if number == 0 else ()
        peers = operators(weight, a, b, 0.5, compiled)
        for what, floor, calls in (
            ("forward", Work(k, n, rows, rank).floor, {name: forward_only(op, x) for name, (op, _) in peers.items()}),
            ("forward + backward", Work(k, n, rows, rank).floor_of_both,
             {name: both(op, x, dy, trained) for name, (op, trained) in peers.items()}),
        ):  # fmt: skip
            if CUDA in calls:
                calls[CUDA] = on_backend("cuda", calls[CUDA])
            facts = dict(k=k, n=n, rows=rows, rank=rank, dtype=str(report.dtype), what=what, floor=floor)
            report.add(f"{k} -> {n}, {rows} rows, rank {rank}, {what}, floor {floor:.3f}", facts, calls, "bare GEMM")


def sibling_layers(k: int, ns: Sequence[int], rank: int, like: dict[str, Any]) -> list[ExpertLinear]:
    """Layers k -> n with one trained expert each, whose B is not zero."""
    layers = []
    for n in ns:
        layer = ExpertLinear(k, n, bias=False, experts={"only": LoRA(rank, alpha=rank)}, **like)
        layer.set_state("only", "trained")
        torch.nn.init.normal_(layer.lora_b["only"])
        layers.append(layer)
    return layers


def of_siblings(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, dys: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of layers that share x, with the gradients of x and of all experts."""
    trained = [p for layer in layers if isinstance(layer, ExpertLinear) for p in layer.parameters() if p.requires_grad]
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad([layer(x) for layer in layers], [x, *trained], dys)


def run_siblings(report: Report, shapes: list[tuple[int, tuple[int, ...], int, int]]) -> None:
    for k, ns, rows, rank in shapes:
        torch.manual_seed(0)
        like = dict(dtype=report.dtype, device=report.clock.device)
        x, dys = torch.randn(rows, k, **like), [torch.randn(rows, n, **like) for n in ns]
        layers = sibling_layers(k, ns, rank, like)
        calls = {
            "bare GEMM": of_siblings([partial(F.linear, weight=layer.weight) for layer in layers], x, dys),
            "fedms, one by one": of_siblings(layers, x, dys),
        }
        if "cuda" in fedms_ext.available():
            grouped = sibling_layers(k, ns, rank, like)
            fedms_ext.group(grouped)
            calls[f"{CUDA}, one by one"] = on_backend("cuda", calls["fedms, one by one"])
            calls[f"{CUDA}, together"] = on_backend("cuda", of_siblings(grouped, x, dys))
            with patch("fedms_ext.backends.fastest.fastest_of", return_value="together"):  # whether it is faster or not
                calls[f"{CUDA}, together"]()
        facts = dict(k=k, ns=ns, rows=rows, rank=rank, dtype=str(report.dtype), what="siblings")
        title = f"{k} -> {', '.join(map(str, ns))} from one input, {rows} rows, rank {rank} each, forward + backward"
        report.add(title, facts, calls, "bare GEMM")


def main() -> None:
    report = Report(__doc__, seconds=0.3, quick_seconds=0.05)
    run(report, REHEARSAL if report.rehearse else QUICK if report.quick else SHAPES)
    run_siblings(report, SIBLINGS_REHEARSAL if report.rehearse else QUICK_SIBLINGS if report.quick else SIBLINGS)
    report.close()


if __name__ == "__main__":
    main()
