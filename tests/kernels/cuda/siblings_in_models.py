"""Groups of layers as models run them: under autocast, in a client's training step, and in a PEFT model. test_cuda.py runs this together
with siblings.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedms_ext
from fedms import data, models
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import own_loss_of
from fedms_ext import group
from grouped_layers import (  # noqa: F401
    BF16, DEVICE, FP16, check, compare, dys_of, input_of, launches, layers_of, passes, poisoned, results,
    skip_without_kernels, wanted,
)
from layers import error

skip_without_kernels()


def rounded(layers, x, dtype):
    """Copies of layers and an input whose x, W and bias are what autocast makes of them; A and B stay float32."""
    layers = copy.deepcopy(layers)
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    return layers, x.detach().to(dtype).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("of_x", [torch.float32, BF16])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(passes, dtype, of_x, gated):
    """x is converted once; all else is as if x, the weights and the biases had autocast's dtype from the start."""
    layers = layers_of(72, (136, 40, 40), [(5, 3)] * 3, torch.float32)
    x, gate = input_of(2, 33, 72, dtype=of_x), torch.rand(2, 2, requires_grad=True) if gated else None
    dys = [dy.to(dtype) for dy in dys_of(layers, x)]
    typed, half = rounded(layers, x, dtype)
    with torch.autocast(DEVICE, dtype):
        apart = results(layers, x, dys, gate)
        assert not passes
        siblings = group(layers)
        got = results(layers, x, dys, gate)
    assert passes == ["forward", "backward"] and siblings.together
    assert [t.dtype for t in got] == [t.dtype for t in apart] == [dtype] * 3 + [of_x] + [torch.float32] * (len(got) - 4)
    want = wanted(typed, half, dys, None if gate is None else gate[:, None].expand(2, 33, 2).detach().requires_grad_())
    if gated:
        want[4] = want[4].sum(1)
    compare(got, want, dtype)
    compare(apart, want, dtype)
    group(typed)
    for found, same in zip(got, results(typed, half, dys, gate), strict=True):
        assert torch.equal(found, same.to(found.dtype))


def test_what_is_held_is_not_used_outside_of_autocast(passes):
    layers, x = layers_of(72, (40, 24), [(8,), (8,)]), input_of(34, 72)
    group(layers)
    with torch.autocast(DEVICE, FP16):
        first = layers[0](x)
    second = layers[1](x)
    assert (first.dtype, second.dtype) == (FP16, BF16) and passes == ["forward"]
    compare([second.detach()], wanted(layers[1:], x, [second.detach()])[:1], BF16)


def test_float64_is_left_alone_by_autocast(passes):
    layers, x = layers_of(72, (40, 24), [(8,), (8,)], torch.float64), input_of(34, 72, dtype=torch.float64)
    group(layers)
    with torch.autocast(DEVICE, BF16), fedms_ext.use_backend("eager"):
        check(layers, x)
    assert not passes


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator counts")
def test_a_clients_step_in_bf16_joins_its_siblings(passes):
    """A step as `fedms run` takes it, under autocast: the query, key and value of both trained blocks are joined."""
    config = load_config("digits", [
        "data.max_samples=24", 'model.targets=["q_proj","k_proj","v_proj"]', "clients.count=1", "clients.unseen=0", "lora.rank=4",
        "run.threads=1", "run.device=cpu", "run.dtype=bf16",
    ])  # fmt: skip
    foundation = models.load(config.model)
    model = ExpertModel(foundation, data.load(config.data, foundation), config)
    tensors = {name: torch.randn(t.shape) / 4 if name.endswith("lora_b") else t for name, t in model.initial(0).items()}
    model.load("global", tensors, depth=2, applied_depth=2)
    loss = own_loss_of(model, "global")(Subset(torch.arange(8)))
    batch = loss.read(torch.arange(8))
    grouped, found = {layer: layer.siblings for layer in model.layers.values()}, []
    for siblings in (True, False):
        for layer, own in grouped.items():
            layer.siblings = own if siblings else None
        for _ in range(2):
            before = launches()
            y = loss.compute(*batch)
            found.append([y.detach(), *torch.autograd.grad(y, loss.params)])
        found[-1].append(launches() - before)
        if siblings:
            assert passes == ["forward", "forward", "backward", "backward"] * 2
    together, apart = found[1], found[3]
    # The lower block needs no gradient of x. One by one: three launches forward, five backward, or four without dx.
    assert (together.pop(), apart.pop()) == (2 * (3 + 3) - 1, 3 * (2 * (3 + 5) - 1))
    for got, want in zip(together, apart, strict=True):
        assert error(got, want) < 0.02
    assert len(passes) == 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(72, n, dtype=BF16) for n in (136, 40, 40))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_accelerated_peft_model(passes, autocast):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(Attention()), peft.LoraConfig(
        r=8, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False))  # fmt: skip
    if autocast:
        model.float()
    apart, x = copy.deepcopy(model), input_of(33, 72, dtype=torch.float32 if autocast else BF16)
    fedms_ext.accelerate(apart, group=False)
    fedms_ext.accelerate(model)
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    assert len({layer.siblings for layer in layers}) == 1 and layers[0].siblings.on_cpu is False
    dys, found = [torch.randn(33, n).to(BF16) for n in (136, 40, 40)], []
    for each in (model, apart):
        with torch.autocast(DEVICE, BF16, enabled=autocast):
            ys = each(x)
        found.append([*ys, *torch.autograd.grad(ys, [x, *[p for p in each.parameters() if p.requires_grad]], dys)])
    assert passes == ["forward", "backward"] and layers[0].siblings.together
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    compare(*found, BF16)
    # What changes between the calls is seen, and what PEFT has to compute it computes.
    with model.disable_adapter(), apart.disable_adapter(), torch.autocast(DEVICE, BF16, enabled=autocast):
        assert all(map(torch.equal, model(x), apart(x)))
    model.eval()
    assert len(passes) == 2
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        first = layers[0](x)
        with torch.no_grad():
            layers[1].lora_B["default"].weight.zero_()
        compare([first, layers[1](x)], [found[1][0], layers[1].base_layer(x)], BF16)
