"""`PeftLinear` on the CUDA kernels by its short way, one C++ call a pass. test_cuda.py runs this together with planned.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedms_ext
from grouped_layers import BF16, DEVICE, poisoned  # noqa: F401
from layers import error, refuse_general_way

peft = pytest.importorskip("peft")
if reason := fedms_ext.explain("cuda"):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def short_way(monkeypatch):
    """Fails where a layer takes the general way."""
    refuse_general_way(monkeypatch, "fedms_ext.nn.peft_linear")


def models_of(dtype=BF16, dropout=0.0, **ranks):
    """An accelerated layer 72 -> 40 with adapters of these ranks, and PEFT's own in float64."""
    made = None
    for name, rank in ranks.items():
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout)
        if made is None:
            made = peft.get_peft_model(nn.Sequential(nn.Linear(72, 40, dtype=dtype)), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    made.set_adapter(next(iter(ranks)))
    exact = copy.deepcopy(made).double()
    fedms_ext.accelerate(made)
    return made, exact


def passes(model, x, dy):
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *[p for p in model.parameters() if p.requires_grad]], dy)]


def check(model, exact, autocast=False):
    x, dy = torch.randn(33, 72).to(BF16), torch.randn(33, 40).to(BF16)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        found = passes(model, x.float() if autocast else x, dy)
    for got, want in zip(found, passes(exact, x.double(), dy.double()), strict=True):
        assert error(got, want) < (0.02 if autocast else 2 * torch.finfo(BF16).eps), error(got, want)
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_takes_the_short_way_and_is_right(short_way, autocast):
    model, exact = models_of(torch.float32 if autocast else BF16, one=8)
    found = check(model, exact, autocast)
    assert [t.dtype for t in found] == [BF16, torch.float32 if autocast else BF16, torch.float32, torch.float32]
    check(model, exact, autocast)
    layer = model.base_model.model[0]
    assert len(layer.plans) == 1 and layer.plans.last.plan is not None
    assert len(copy.deepcopy(layer).plans) == 0


def test_another_adapter_of_the_same_scale_has_a_plan_of_its_own(short_way):
    model, exact = models_of(one=8, two=5)
    for names in ("one", "two", "one", ["one", "two"]):
        for each in (model, exact):
            each.base_model.set_adapter(names)
        check(model, exact)
    for each in (model, exact):     # the same name and scale, another rank
        each.delete_adapter("two")
        each.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
        each.set_adapter("two")
    exact.double()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    fedms_ext.accelerate(model)
    check(model, exact)
    assert len(model.base_model.model[0].plans) == 4


def test_dropout_drops_and_what_peft_has_to_compute_it_computes(short_way):
    model, exact = models_of(dropout=0.5, one=8)
    x = torch.randn(33, 72).to(BF16)
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(1)
    assert torch.equal(first, model(x))
    model.eval(), exact.eval()
    assert error(model(x), exact(x.double())) < 2 * torch.finfo(BF16).eps
    with model.disable_adapter(), exact.disable_adapter():
        assert error(model(x), exact(x.double())) < 2 * torch.finfo(BF16).eps
