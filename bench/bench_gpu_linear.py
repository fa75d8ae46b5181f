"""One expert linear layer on a GPU, beside its peers: forward, and forward + backward.

    python bench/bench_gpu_linear.py [--quick] [--json FILE] [--rehearse]

All ratios are to the bare frozen GEMM: F.linear, and for forward + backward F.linear and the GEMM of dx. Peers: PEFT,
PEFT compiled, NeMo AutoModel's Triton kernels beside a frozen GEMM (where nemo-automodel is installed), and the operator
sequences of Unsloth (`addmm_` into the frozen GEMM's output, dx written by `addmm_`) and of LoRAFusion (S apart, then one
GEMM that adds it; dS and dB from dy), both written anew here on cuBLAS.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from gpu_timing import Clock, compare, table
from torch import Tensor

import fedms_ext
from fedms_ext import expert_linear

# (K, N, rows, total rank): the shapes with goals first, then those where a narrow or a short layer may lose.
SHAPES = [
    (4096, 4096, 8192, 32),
    (768, 768, 12608, 32),
    (4096, 14336, 8192, 32),
    (768, 3072, 12608, 32),
    (3072, 768, 12608, 32),
    (14336, 4096, 8192, 32),
    (4096, 4096, 8192, 8),
    (4096, 4096, 8192, 128),
    (4096, 4096, 64, 32),
    (4096, 4096, 512, 32),
    (384, 384, 2048, 8),
]
QUICK = SHAPES[:3]
CUDA = "fedms, CUDA C++"  # csrc/cuda, which is not the default
REHEARSAL = [(64, 48, 70, 8)]


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


def operators(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> dict[str, tuple[Operator, list[Tensor]]]:
    """Each peer as a function of x, and the parameters that it trains."""
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
        if weight.is_cuda:  # what the compiler makes of it on the CPU is another matter
            found["PEFT, compiled"] = (torch.compile(layer, dynamic=False), trained)
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


def run(clock: Clock, shapes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> list[dict[str, object]]:
    results = []
    for k, n, rows, rank in shapes:
        torch.manual_seed(0)
        like = dict(dtype=dtype, device=clock.device)
        x, dy = torch.randn(rows, k, **like), torch.randn(rows, n, **like)
        weight = torch.randn(n, k, **like) / k**0.5
        a = (torch.randn(rank, k, **like) / k**0.5).requires_grad_()
        b = torch.randn(n, rank, **like).requires_grad_()
        peers = operators(weight, a, b, 0.5)
        for title, calls in {
            "forward": {name: forward_only(operator, x) for name, (operator, _) in peers.items()},
            "forward + backward": {name: both(operator, x, dy, trained) for name, (operator, trained) in peers.items()},
        }.items():
            if CUDA in calls:
                calls[CUDA] = on_backend("cuda", calls[CUDA])
            measured = compare(clock, calls, base="bare GEMM")
            results.append(dict(k=k, n=n, rows=rows, rank=rank, dtype=str(dtype), what=title, results=measured))
            print(table(f"{k} -> {n}, {rows} rows, rank {rank}, {title}", measured), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three shapes with goals")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: shows that it runs, no more")
    options = parser.parse_args()
    clock = Clock("cpu", 0.0) if options.rehearse else Clock("cuda", 0.05 if options.quick else 0.3)
    shapes = REHEARSAL if options.rehearse else QUICK if options.quick else SHAPES
    print(f"backends: {', '.join(fedms_ext.available())}\n")
    results = run(clock, shapes, torch.float32 if options.rehearse else torch.bfloat16)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
