"""Layers on the CUDA kernels that share their input, what they are compared with in float64, and two fixtures of their tests."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, reference
from fedms_ext.backends import cuda_group, device
from fedms_ext.operators import planned_siblings
from layers import error

DEVICE = device.current().type
BF16, FP16 = torch.bfloat16, torch.float16


def skip_without_kernels():
    """Skip a module of tests where no CUDA kernels compute groups."""
    if reason := fedms_ext.explain("cuda"):
        pytest.skip(reason, allow_module_level=True)
    if device.properties(device.current()).capability != (9, 0):
        pytest.skip("a group needs compute capability 9.0", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that the kernels are given holds NaN, which stays where they do not write. Groups are faster."""
    monkeypatch.setenv("FEDMS_TUNE", "0")
    monkeypatch.setattr(planned_siblings.fastest, "fastest_of", lambda *args: "together")
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills all new memory with NaN, that of C++ too
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    with fedms_ext.use_backend("cuda"):
        assert torch.empty(1).isnan()
        yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def passes(monkeypatch):
    """The passes of groups that ran, in order."""
    found = []
    for name in ("forward", "backward"):
        first = getattr(cuda_group.GroupPlan, f"_first_{name}")
        monkeypatch.setattr(cuda_group.GroupPlan, f"_first_{name}", lambda self, *args, first=first, name=name: (
            found.append(name), first(self, *args), setattr(self, name, lambda *args: getattr(self, f"_first_{name}")(*args))
        ) and None)
    return found


def launches():
    """How many kernels the emulator has launched."""
    counter = ctypes.CDLL(os.environ["FEDMS_CUDA_EMULATED"]).fedms_launches
    counter.restype = ctypes.c_int64
    return counter()


def layers_of(k, ns, ranks, dtype=BF16, dropout=0.0):
    """Layers k -> n with experts of other ranks and scales, all trained; every second one has no bias."""
    layers = []
    for number, (n, own) in enumerate(zip(ns, ranks, strict=True)):
        experts = {f"e{i}": LoRA(rank, alpha=(1.5 + number) * rank, dropout=dropout) for i, rank in enumerate(own)}
        layer = ExpertLinear.from_linear(nn.Linear(k, n, bias=number % 2 == 0, dtype=dtype), experts)
        for name in experts:
            layer.set_state(name, "trained")
            nn.init.normal_(layer.lora_b[name])
        layers.append(layer)
    return layers


def pairs_of(layers):
    return [p for layer in layers for p in (*layer.lora_a.values(), *layer.lora_b.values()) if p.requires_grad]


def results(layers, x, dys, gate=None):
    """Every y that has a dy, and the gradients of x, the gate and all trained pairs, None for those that no y depends on."""
    with fedms_ext.gated(layers, gate):
        ys = [layer(x) for layer in layers]
    inputs = [t for t in (x, gate, *pairs_of(layers)) if t is not None and t.requires_grad]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    found = torch.autograd.grad([ys[i] for i in used], inputs, [dys[i] for i in used], allow_unused=True)
    return [*[ys[i].detach() for i in used], *found]


def wanted(layers, x, dys, gate=None):
    """What `results` has to be, in float64."""
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in (x, gate, *pairs_of(layers)) if t is not None}
    of = lambda t: wide.get(id(t), t.detach().double())  # noqa: E731
    ys = [
        reference.expert_linear(
            of(x), layer.weight.double(), None if layer.bias is None else layer.bias.double(), [*map(of, layer.lora_a.values())],
            [*map(of, layer.lora_b.values())], [lora.scale for lora in layer.experts.values()], None if gate is None else of(gate),
        )
        for layer in layers
    ]  # fmt: skip
    inputs = [t for t in wide.values() if t.requires_grad]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    found = torch.autograd.grad([ys[i] for i in used], inputs, [dys[i].double() for i in used], allow_unused=True)
    return [*[ys[i].detach() for i in used], *found]


def compare(got, want, dtype):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g is None) == (w is None), i
        # Rounded operands and a rounded S: errors of a few units of the last place of the layers' dtype.
        assert g is None or error(g, w) < 3 * torch.finfo(dtype).eps, (i, error(g, w))


def dys_of(layers, x):
    return [torch.randn(*x.shape[:-1], layer.out_features).to(x.dtype) for layer in layers]


def check(layers, x, dys=None, gate=None):
    dys = dys_of(layers, x) if dys is None else dys
    got = results(layers, x, dys, gate)
    compare(got, wanted(layers, x, dys, gate), x.dtype)
    return got


def input_of(*shape, dtype=BF16, needs=True):
    return torch.randn(shape).to(dtype).requires_grad_(needs)
