"""`cast_frozen`: frozen weights in the 16 bits that autocast would round them to at every pass."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fedms_ext
from fedms_ext import LoRA, budget, cast_frozen, expert_layers

BF16, FP16 = torch.bfloat16, torch.float16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """A model of two blocks, with a frozen layer outside of them and a head that is trained."""

    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(9, 24), nn.ModuleList([Block(), Block()])
        self.last, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def made():
    torch.manual_seed(0)
    net = Net()
    fedms_ext.attach(net, ["up"], {"a": LoRA(4, 8)}, blocks="blocks")
    net.head.requires_grad_(True)
    for layer in expert_layers(net).values():
        nn.init.normal_(layer.lora_b["a"])
    fedms_ext.activate(net, "a", depth=1, applied_depth=2)
    return net


IDS = torch.arange(12).view(3, 4) % 9


def pass_of(net, dtype):
    with torch.autocast("cpu", dtype):
        y = net(IDS)
    trained = [p for p in net.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)]


class Rounded(TorchDispatchMode):
    """Counts the values that are converted to a dtype from a parameter's own memory."""

    def __init__(self, net, dtype):
        super().__init__()
        self.memory, self.dtype, self.values = {p.data_ptr() for p in net.parameters() if not p.requires_grad}, dtype, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self.dtype and args[0].data_ptr() in self.memory:
            self.values += args[0].numel()
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_model_under_autocast_computes_the_same_bits_without_converting_a_frozen_weight(dtype):
    net = made()
    held = copy.deepcopy(net)
    layers = cast_frozen(held, dtype)
    assert layers == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"]
    for found, wanted in zip(pass_of(held, dtype), pass_of(net, dtype), strict=True):
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    counts = []
    for each in (net, held):
        with Rounded(each, dtype) as rounded:
            pass_of(each, dtype)
        counts.append(rounded.values)
    # Of the held model only the pairs that are frozen, (4, 24) and (40, 4), are still converted.
    own = [p for name in layers for n, p in net.get_submodule(name).named_parameters() if "lora" not in n]
    assert counts[0] - counts[1] == sum(p.numel() for p in own)
    assert counts[1] == 4 * 24 + 40 * 4


def test_half_of_the_bytes_are_left_and_all_else_stays_in_float32():
    net = made()
    before, linear = budget.weight_bytes(net), 2 * (24 * 40 + 40 + 40 * 24) + 24 * 24 + 24
    cast_frozen(net, BF16)
    assert before - budget.weight_bytes(net) == 2 * linear
    low = {name for name, p in net.named_parameters() if p.dtype == BF16}
    assert low == {f"{name}.{kind}" for name in ("blocks.0.up", "blocks.1.up", "last") for kind in ("weight", "bias")} | {
        "blocks.0.down.weight", "blocks.1.down.weight"}
    assert {p.dtype for name, p in net.named_parameters() if name not in low} == {torch.float32}


def test_a_weight_beyond_the_range_of_fp16_is_refused_and_nothing_is_changed():
    net = made()
    net.last.weight.data[0, 0] = 65519.0     # the largest that is rounded to a number
    cast_frozen(copy.deepcopy(net), FP16)
    net.last.weight.data[0, 0] = 65520.0
    with pytest.raises(ValueError, match=r"last.weight has a value of magnitude 6.55e\+04, beyond the range of float16; use bfloat16"):
        cast_frozen(net, FP16)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    cast_frozen(net, BF16)
    with pytest.raises(ValueError, match="cannot cast frozen weights to torch.float32; expected torch.bfloat16 or torch.float16"):
        cast_frozen(net, torch.float32)


def test_layers_that_are_not_plain_frozen_ones_are_left_out():
    net = made()
    net.blocks[0].down.double()
    fedms_ext.quantize(net.blocks[1], "int8")
    net.blocks[0].up.weight.requires_grad_(True)
    net.tied = nn.Linear(24, 9, bias=False)
    net.tied.weight = net.embedding.weight
    assert cast_frozen(net, BF16) == ["last"] and net.embedding.weight.dtype == torch.float32
    assert net.blocks[0].down.weight.dtype == torch.float64


def test_quantizing_merging_and_detaching_afterwards():
    net = made()
    wanted = net.blocks[0].up.weight.to(BF16)
    cast_frozen(net, BF16)
    layer = net.blocks[0].up
    fedms_ext.merge(net, "a")
    assert torch.equal(layer.weight, (wanted.float() + layer.delta("a")).to(BF16))
    fedms_ext.unmerge(net)
    assert torch.equal(layer.weight, wanted)
    fedms_ext.quantize(net, "int8")
    assert layer.frozen.dtype == BF16 and pass_of(net, BF16)[0].isfinite().all()
    twin = made()
    fedms_ext.dequantize(net, {f"{name}.weight": twin.get_submodule(name).weight for name in cast_frozen(twin, BF16)})
    assert torch.equal(layer.weight, wanted)
    fedms_ext.detach(net)
    assert type(net.blocks[0].up) is nn.Linear and net.blocks[0].up.weight.dtype == BF16


def test_an_encoder_layer_of_pytorch_calls_its_layers_in_evaluation_mode():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval().requires_grad_(False)
    held, x = copy.deepcopy(layer), torch.randn(2, 3, 16, requires_grad=True)
    assert cast_frozen(held, BF16) == ["linear1", "linear2"]
    with torch.autocast("cpu", BF16):
        found, wanted = held(x), layer(x)
        alone = held(x.detach())        # without gradients PyTorch would take its fused path, which takes no weights of two dtypes
    assert torch.equal(found, wanted) and torch.allclose(alone, wanted, atol=0.05)
