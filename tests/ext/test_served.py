"""Which backend serves a product, as `profiling.Served` counts it, and as the operators in fact run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, QuantizedWeight
from fedms_ext.backends import cpu, eager
from fedms_ext.profiling import PYTORCH, Product, Served


def layer(kind: str | None, rank: int = 4) -> ExpertLinear:
    made = ExpertLinear.from_linear(nn.Linear(64, 48), {"e": LoRA(rank, 8)})
    made.set_state("e", "trained")
    if kind is not None:
        made.freeze(QuantizedWeight(made.weight, kind))
    return made


def count(module: nn.Module) -> Served:
    x = torch.randn(2, 5, 64, requires_grad=True)
    with Served() as counted:
        module(x).sum().backward()
    return counted


@pytest.mark.parametrize("kind", [None, "int8", "nf4", "fp16"])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_cpu_kernels_serve_what_they_are_faster_at(monkeypatch, kind, kernels):
    monkeypatch.setattr(cpu, "_largest_ranks", lambda rows: (4, 4) if kernels else (0, 0))
    calls = []
    for module in (cpu, eager):
        for name in ("forward", "backward"):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda call, f=function, s=module.name: calls.append(s) or f(call))
    operator = "expert_linear"
    counted = count(layer(kind))
    assert set(counted.calls.values()) == {1}
    servers = {product.name: server for server, product in counted.calls}
    assert servers == {operator: calls[0], f"{operator}_backward": calls[1]} and len(calls) == 2
    assert (kernels, kind) not in [(False, None), (False, "fp16")] or calls == ["eager", "eager"]
    assert Product(operator, 10, 64, 48, 4.0) in [product for _, product in counted.calls]


def test_shares_add_up_to_what_flop_counter_counts():
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(nn.Linear(64, 64), layer("int8"))
    counted = count(net)
    with FlopCounterMode(display=False) as want:
        net(torch.randn(2, 5, 64, requires_grad=True)).sum().backward()
    assert sum(counted.flops.values()) == want.get_total_flops()
    shares = counted.backends()
    assert set(shares) == {"cpu", PYTORCH} and shares[PYTORCH][0] == 3
    assert sum(calls for calls, _ in shares.values()) == sum(counted.calls.values())


def test_attention_is_counted():
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with Served() as counted:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    products = 2 * 2 * 3 * 5 * 7 * 8
    assert [server for server, _ in counted.calls] == [PYTORCH, PYTORCH]
    assert list(counted.flops.values()) == [2 * products, 5 * products]     # the backward pass computes q k^T again


def test_a_backend_by_name_serves_all():
    with fedms_ext.use_backend("eager"):
        assert {server for server, _ in count(layer("int8")).calls} == {"eager"}
