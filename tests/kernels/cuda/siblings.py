"""`fedms_ext.group` on the CUDA kernels: layers that share their input in one call a pass, against float64. test_cuda.py runs this as
it runs numerics.py."""

from __future__ import annotations

import copy
import ctypes
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedms_ext
from fedms import data, models
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import own_loss_of
from fedms_ext import ExpertLinear, LoRA, group, reference
from fedms_ext.backends import cuda_group, cuda_plan, device
from fedms_ext.operators import planned_siblings
from layers import error
from sampled import FULL

if reason := fedms_ext.explain("cuda"):
    pytest.skip(reason, allow_module_level=True)

DEVICE = device.current().type
BF16, FP16 = torch.bfloat16, torch.float16
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


# Sizes that end inside a tile, a step of a sibling's reduction and a step of the ranks; key and value narrower than the query.
@pytest.mark.parametrize("dtype, rows, k, ns, ranks", [
    (BF16, (150,), 72, (136, 40, 40), [(5, 3)] * 3),
    (FP16, (2, 65), 200, (48, 72), [(16, 16), (32,)]),
    (BF16, (1,), 8, (8, 8), [(1,), (1,)]),
    (FP16, (130,), 24, (40, 16, 8, 24), [(3,), (16,), (9, 2), (1,)]),
    (BF16, (66,), 24, (16, 72), [(1, 2) * 5, (2, 1, 1) * 3]),  # more outputs than a launch of strips has room for
], ids=str)  # fmt: skip
def test_a_group_is_right_and_its_bits_repeat(passes, dtype, rows, k, ns, ranks):
    layers, x = layers_of(k, ns, ranks, dtype), input_of(*rows, k, dtype=dtype)
    group(layers)
    dys = dys_of(layers, x)
    first = check(layers, x, dys)
    assert passes == ["forward", "backward"]
    assert all(map(torch.equal, first, results(layers, x, dys)))


@pytest.mark.parametrize("tile", [2, 3, 4] if FULL or DEVICE != "cpu" else [3])
def test_every_tile(passes, monkeypatch, tile):
    """With more tiles than the four multiprocessors of the emulator, and more steps than stages."""
    layers, x = layers_of(328, (520, 264, 136), [(9,), (16,), (4, 4)]), input_of(300, 328)
    siblings = group(layers)
    layers[0](x)
    (planned,) = siblings.plans.values()
    planned.plan._kernels.forward_tile = planned.plan._kernels.dx_tile = tile
    monkeypatch.setattr(cuda_group.GroupPlan, "_choose", lambda *args: False)
    check(layers, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator counts")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("needs, wanted_launches", [(True, 3 + 3), (False, 3 + 2)])
def test_few_launches(needs, wanted_launches, autocast):
    dtype = torch.float32 if autocast else BF16
    layers, x = layers_of(72, (136, 40, 40), [(8,)] * 3, dtype), input_of(20, 72, dtype=dtype, needs=needs)
    group(layers)
    dys = [dy.bfloat16() for dy in dys_of(layers, x)]
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        results(layers, x, dys)
        before = launches()
        results(layers, x, dys)
    assert launches() - before == wanted_launches  # experts side by side, every S, every y; every dS, dx, all of dA and dB


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


@pytest.mark.parametrize("of_gate", [(6, 2), (1, 2), (6, 5, 2)], ids=str)
def test_a_gate_of_samples_or_of_tokens(passes, of_gate):
    layers, x = layers_of(40, (24, 72), [(3, 8), (16, 1)]), input_of(6, 5, 40)
    group(layers)
    gate = torch.randn(of_gate, requires_grad=True)
    rows = gate if len(of_gate) == 3 else gate[:, None]
    dys = dys_of(layers, x)
    got = results(layers, x, dys, gate)
    want = wanted(layers, x, dys, rows.expand(6, 5, 2).detach().requires_grad_())
    want[3] = want[3].sum_to_size(rows.shape).view(of_gate)
    compare(got, want, BF16)
    assert passes == ["forward", "backward"]


def test_only_the_gradients_that_are_needed():
    layers = layers_of(72, (40, 24), [(3, 5), (8,)])
    group(layers)
    layers[0].set_state("e0", "frozen")
    layers[1].set_state("e0", "frozen")
    check(layers, input_of(140, 72))
    x = input_of(140, 72, needs=False)
    assert [layer(x).requires_grad for layer in layers] == [True, False]
    check(layers, x, [dys_of(layers, x)[0], None])
    layers[0].set_state("e1", "frozen")
    check(layers, input_of(140, 72))  # the gradient of x alone
    layers[1].set_state("e0", "trained")
    layers[1].lora_a["e0"].requires_grad_(False)
    check(layers, input_of(270, 72, needs=False), [None, *dys_of(layers[1:], torch.empty(270, 72, dtype=BF16))])


def test_strips_that_are_split_along_the_rows(passes):
    """Two strips of dB alone, for four multiprocessors."""
    layers = layers_of(24, (40, 16), [(3,), (9, 8)])
    for layer in layers:
        layer.lora_a.requires_grad_(False)
    group(layers)
    check(layers, input_of(390, 24, needs=False))
    assert passes == ["forward", "backward"]


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_an_output_without_a_gradient(left_out):
    layers, x = layers_of(72, (136, 40, 40), [(5, 3)] * 3), input_of(33, 72)
    group(layers)
    dys = dys_of(layers, x)
    dys[left_out] = None
    gate = torch.randn(33, 2, requires_grad=True)
    check(layers, x, dys)
    check(layers, x, dys, gate)


def test_a_layer_that_is_called_alone(passes):
    layers = layers_of(72, (40, 24), [(8,), (8,)])
    siblings = group(layers)
    for _ in range(3):
        x = input_of(33, 72)
        check(layers[:1], x)
    assert siblings.together is False and passes == ["forward"]


def test_an_input_that_changes_in_place(passes):
    layers, x = layers_of(72, (40, 24), [(8,), (8,)]), input_of(33, 72, needs=False)
    siblings = group(layers)
    before, dys = x.clone(), dys_of(layers, x)
    first = layers[0](x)
    x.mul_(2)
    second = layers[1](x)
    compare([first], wanted(layers[:1], before, dys[:1])[:1], BF16)
    compare([second], wanted(layers[1:], x, dys[1:])[:1], BF16)
    assert passes == ["forward"] and siblings.together is False


def refused(layers, x):
    """The layers are computed one by one, and rightly."""
    siblings = group(layers)
    check(layers, x)
    assert not [planned for planned in siblings.plans.values() if planned is not None] and siblings._apart
    return siblings


@pytest.mark.parametrize("ns, ranks", [((40, 24), [(33,), (17,)]), ((8,) * 5, [(1,)] * 5)], ids=str)
def test_too_many_ranks_or_layers(passes, ns, ranks):
    refused(layers_of(72, ns, ranks), input_of(33, 72))
    assert not passes


def test_dropout_draws_the_seeds_of_layers_by_themselves(passes):
    layers, x = layers_of(72, (40, 24), [(8,), (8,)], dropout=0.3), input_of(33, 72)
    torch.manual_seed(3)
    apart = [layer(x) for layer in layers]
    group(layers)
    torch.manual_seed(3)
    assert all(map(torch.equal, apart, [layer(x) for layer in layers])) and not passes


def test_what_was_refused_is_not_tried_again(monkeypatch):
    layers, x = layers_of(72, (40, 24), [(33,), (17,)]), input_of(33, 72)
    refused(layers, x)
    monkeypatch.setattr(ExpertLinear, "as_sibling", None)
    check(layers, x)


def test_an_input_that_the_kernels_cannot_read():
    layers, x = layers_of(72, (40, 24), [(8,), (8,)]), torch.randn(72, 34).bfloat16().t().requires_grad_()
    group(layers)
    check(layers, x)


def test_gradients_that_the_kernels_cannot_read(passes):
    layers, x = layers_of(72, (40, 24), [(8,), (8,)]), input_of(34, 72)
    group(layers)
    odd = torch.randn(34 * 24 + 1).bfloat16()[1:].view(34, 24)  # not at a multiple of 16 bytes
    check(layers, x, [torch.randn(40).bfloat16().expand(34, 40), odd])
    assert passes == ["forward", "backward"]


def test_both_ways_are_measured(passes, monkeypatch):
    """The first pass of a shape is run in both ways; the one that is named is taken."""
    layers, x = layers_of(72, (40, 24), [(8,), (8, 2)]), input_of(34, 72)
    tried = []

    def choose(device, shape, ways):
        found = []
        for name, way in ways.items():
            found.append([result.clone() for result in way()])
            tried.append(name)
        for one, other in zip(*found, strict=True):
            assert error(other, one) < 0.02
        return "one by one"

    monkeypatch.setattr(planned_siblings.fastest, "fastest_of", choose)
    refused(layers, x)
    assert tried == ["one by one", "together"] and passes == ["forward", "backward"]
    refused(layers, input_of(34, 72, needs=False))
    with fedms_ext.gated(layers[1:], torch.randn(34, 2)), fedms_ext.gated(layers[:1], torch.randn(34, 1)):
        layers[0](x)
    assert len(tried) == 6
    refused(layers, torch.randn(72, 35).bfloat16().t().requires_grad_())  # which the kernels cannot read
    assert len(tried) == 6


def test_without_a_measurement_they_are_computed_one_by_one(monkeypatch, passes):
    monkeypatch.undo()
    monkeypatch.setenv("FEDMS_TUNE", "0")
    refused(layers_of(72, (40, 24), [(8,), (8,)]), input_of(34, 72))
    assert not passes


def test_a_backward_pass_that_is_observed_and_a_second_derivative():
    layers, x = layers_of(72, (40, 24), [(8,), (8,)]), input_of(34, 72)
    group(layers)
    dys = dys_of(layers, x)
    ys = [layer(x) for layer in layers]
    with torch.profiler.profile():
        got = torch.autograd.grad(ys, [x, *pairs_of(layers)], dys)
    compare(got, wanted(layers, x, dys)[2:], BF16)
    (dx,) = torch.autograd.grad([(layer(x).float() ** 2).sum() for layer in layers], x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_activation_checkpointing(passes):
    layers, x = layers_of(72, (40, 24), [(8,), (8,)]), input_of(34, 72)
    group(layers)
    dys = dys_of(layers, x)
    first = results(layers, x, dys)
    ys = checkpoint(lambda x: tuple(layer(x) for layer in layers), x, use_reentrant=False)
    assert all(map(torch.equal, first[2:], torch.autograd.grad(ys, [x, *pairs_of(layers)], dys)))
    assert passes == ["forward", "backward", "forward", "forward", "backward"]


@pytest.mark.skipif(DEVICE == "cpu", reason="for a GPU")
def test_replays_of_a_graph(passes):
    layers, x = layers_of(200, (136, 40, 40), [(8,)] * 3), input_of(150, 200)
    group(layers)
    dys = dys_of(layers, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(layers, x, dys)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(layers, x, dys)
    assert passes == ["forward", "backward"] * 2
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert all(map(torch.equal, captured, results(layers, x, dys)))
