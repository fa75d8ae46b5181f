"""States, requires_grad and the state dict say the same, and what passes a layer by is refused."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fedms_ext
from fedms_ext.backends import registry
from fedms_ext import LoRA, activate, attach, dequantize, detach, expert_layers, gated, merge, quantize, unmerge
from fedms_ext.nn.linear import reader

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([block() for _ in range(3)]), nn.Linear(D, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in expert_layers(model).values():
            for b in layer.lora_b.values():
                b.normal_(0, 0.1)


def net(depth: int = 3, **experts: LoRA) -> Net:
    model = Net()
    attach(model, "all-linear", experts or {"g": LoRA(4, 8)})
    fill(model)
    for expert in experts or ("g",):
        activate(model, expert, depth=depth)
    return model


X = torch.randn(5, D, generator=torch.Generator().manual_seed(3))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return ((a - b).norm() / b.norm()).item() < tolerance


# One truth


def test_states_follow_requires_grad():
    model = net()
    layer = model.blocks[0].up
    model.requires_grad_(False)
    assert layer.states == {"g": "frozen"} and fedms_ext.prefix_depth(model) == 3
    layer.lora_a["g"].requires_grad_(True)
    assert layer.states == {"g": "trained"} and fedms_ext.prefix_depth(model) == 0


def test_a_second_attach_leaves_what_is_trained():
    model = net()
    model.head.requires_grad_(True)
    asked = {name for name, p in model.named_parameters() if p.requires_grad}
    attach(model, ["up"], {"other": LoRA(2, 2)})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == asked
    assert model.blocks[0].up.states == {"g": "trained", "other": "frozen"}


def test_a_reloaded_model_computes_what_was_saved():
    saved = net(depth=1, g=LoRA(4, 8), h=LoRA(2, 8, rslora=True))
    model = net(depth=3, g=LoRA(4, 32), h=LoRA(2, 8))
    assert not close(model(X), saved(X))
    model.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert torch.equal(model(X), saved(X))
    for name, layer in expert_layers(model).items():
        assert layer.states == expert_layers(saved)[name].states and layer.experts["g"].alpha == 8
        assert layer.lora_a["g"].requires_grad == (layer.states["g"] == "trained")


@pytest.mark.parametrize("numbers", [[4, 8, 0, 0], [3, 8, 0, 0, 1], [4, float("nan"), 0, 0, 1], [4, 8, 2, 0, 1], [4, 8, 0, 0, 7],
                                     [float("inf"), 8, 0, 0, 1]])
def test_a_foreign_pair_is_refused(numbers):
    model = net()
    state = {**model.state_dict(), "blocks.0.up.pairs.g": torch.tensor(numbers, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match="blocks.0.up.pairs"):
        model.load_state_dict(state)
    assert model.blocks[0].up.experts["g"] == LoRA(4, 8)


def test_the_rank_of_a_saved_pair_is_told():
    model = net()
    state = {**model.state_dict(), "blocks.0.up.pairs.g": torch.tensor([3, 8, 0, 0, 1], dtype=torch.float64)}
    with pytest.raises(RuntimeError, match="the saved expert has the rank 3, this layer's has 4; attach it with the rank"):
        model.load_state_dict(state)


def test_a_state_dict_loaded_into_a_merged_model_is_not_undone_by_unmerge():
    saved, model = net(), net()
    merge(model, "g")
    model.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert close(model(X), saved(X))
    with pytest.raises(RuntimeError, match="no expert is merged"):
        unmerge(model)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp16"])
def test_what_was_quantized_is_what_is_checked(kind):
    first, second = Net().requires_grad_(False), Net().requires_grad_(False)
    weights = [copy.deepcopy(m.state_dict()) for m in (first, second)]
    quantize(first, kind), quantize(second, kind)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="is not the weight that was quantized"):
        dequantize(second, weights[1])
    dequantize(second, weights[0])
    assert torch.equal(second.head.weight, weights[0]["head.weight"])


def test_codes_of_another_format_are_refused():
    first, second = Net().requires_grad_(False), Net().requires_grad_(False)
    quantize(first, "nf4"), quantize(second, "int4")
    with pytest.raises(RuntimeError, match="identity says nf4/64, expected a weight quantized to int4/64"):
        second.load_state_dict(first.state_dict())
    state = {**second.state_dict(), "head.frozen.identity": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="head.frozen.identity"):
        second.load_state_dict(state)


def test_a_quantized_model_is_not_quantized_again():
    model = net()
    quantize(model, "int8")
    with pytest.raises(ValueError, match="Net is quantized already; call fedms_ext.dequantize"):
        quantize(model, "nf4")


# Layers stay what they are


@pytest.mark.parametrize("change", [
    lambda m: attach(m, "all-linear", {"g": LoRA(4, 8)}),
    lambda m: quantize(m.requires_grad_(False), "fp16"),
    lambda m: (attach(m, "all-linear", {"g": LoRA(4, 8)}), quantize(m, "fp16"), detach(m)),
])  # fmt: skip
def test_hooks_and_references_stay(change):
    model = Net()
    layer = model.blocks[1].up
    layer.mark = "kept"
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    want = model(X).detach()
    change(model)
    assert model.blocks[1].up is layer and layer.mark == "kept" and close(model(X), want, 5e-3)


def test_detach_and_dequantize_leave_no_trace():
    model = Net().requires_grad_(False)
    weights, before = copy.deepcopy(model.state_dict()), [dict.fromkeys(vars(m)) for m in model.modules()]
    attach(model, "all-linear", {"g": LoRA(4, 8)})
    quantize(model)
    dequantize(model, weights)
    detach(model)
    after = [dict.fromkeys(vars(m)) for m in model.modules()]
    after[0].pop("fedms_blocks", None)
    assert after == before and list(model.state_dict()) == list(weights)


@pytest.mark.parametrize("run", [lambda m: attach(m, "all-linear", {"g": LoRA(4, 8)}), quantize])
def test_a_replaced_forward_is_refused(run):
    model = Net().requires_grad_(False)
    layer = model.blocks[1].up
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    with pytest.raises(ValueError, match="'blocks.1.up'.*its forward method was replaced"):
        run(model)
    assert not any(isinstance(m, fedms_ext.FrozenLinear) for m in model.modules())


@pytest.mark.parametrize("spoil", [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    lambda layer: parametrizations.weight_norm(layer),
    lambda layer: nn.utils.spectral_norm(layer),
])  # fmt: skip
def test_computed_weights_are_refused_or_left_alone(spoil):
    model = Net().requires_grad_(False)
    spoil(model.blocks[1].down)
    model.requires_grad_(False).eval()
    want = model(X)
    with pytest.raises(ValueError, match="blocks.1.down"):
        attach(model, "all-linear", {"g": LoRA(4, 8)})
    assert not expert_layers(model)
    assert "blocks.1.down" not in quantize(model, "fp16") and close(model(X), want, 5e-3)


def test_merge_leaves_a_shared_weight_to_the_other_place():
    model = Net()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    attach(model, ["blocks.0.up"], {"g": LoRA(4, 8)})
    fill(model)
    want, weight = model(X).detach(), model.blocks[2].up.weight
    merge(model, "g")
    assert close(model(X), want)
    unmerge(model)
    assert model.blocks[0].up.weight is weight and close(model(X), want)


# Read from outside


class Reads(Block):
    def forward(self, x):
        if self.up.weight.dtype.is_floating_point and isinstance(self.down.weight, torch.Tensor):
            x = x + 0
        return x + self.down(torch.relu(nn.functional.linear(x, self.up.weight, self.up.bias)))


def test_layers_that_are_passed_by_are_named():
    model = Net(Reads)
    assert reader(model, "blocks.0.up").endswith("Reads") and reader(model, "blocks.0.down") is None
    with pytest.raises(ValueError, match=r"'blocks.0.up' \(read by .*Reads\)"):
        attach(model, ["up"], {"g": LoRA(4, 8)})
    with pytest.warns(UserWarning, match="blocks.0.up"):
        layers = attach(model, "all-linear", {"g": LoRA(4, 8)})
    assert layers == [f"blocks.{i}.down" for i in range(3)]
    with pytest.raises(ValueError, match="out_proj"):
        attach(nn.Sequential(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "l": nn.Linear(8, 8)})), ["out_proj"],
               {"g": LoRA(4, 8)}, blocks="")


@pytest.mark.parametrize("kind", ["int8", "int8_rotated", "fp16", "nf4"])
def test_a_quantized_weight_that_is_read_is_expanded(kind):
    layer = nn.Linear(64, 8).requires_grad_(False).bfloat16()
    weight = layer.weight.clone()
    quantize(layer, kind)
    assert layer.weight.dtype == torch.bfloat16 and close(layer.weight.float(), weight.float(), 0.2)
    assert "weight" not in layer.state_dict()


# Merging


def test_merge_takes_what_is_applied():
    model = net(depth=1)
    want = model(X).detach()
    merge(model, "g")
    assert close(model(X), want) and model.blocks[0].up.merged is None
    unmerge(model)
    assert close(model(X), want)
    fedms_ext.deactivate(model, "g")
    with pytest.raises(RuntimeError, match="'g' is off in every layer"):
        merge(model, "g")


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_merge_that_is_not_finite_changes_nothing(value):
    model = net(g=LoRA(4, 8e3))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.blocks[2].down.lora_b["g"][0, 0] = value
    with pytest.raises(ValueError, match="'blocks.2.down'.*infinity or a NaN"):
        merge(model, "g")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "lora_b" not in k)


def test_no_merge_below_a_gate():
    model = net()
    with gated(expert_layers(model), torch.full((5, 1), 0.5)), pytest.raises(RuntimeError, match="a gate or segments"):
        merge(model, "g")


# Threads


def test_a_gate_belongs_to_its_thread():
    model = net(a=LoRA(4, 8), b=LoRA(4, 8))
    layers = expert_layers(model)
    entered, done, found = threading.Barrier(2), threading.Barrier(2), {}

    def run(i: int) -> None:
        gate = torch.zeros(1, 2)
        gate[0, i] = 1
        with torch.no_grad(), gated(layers, gate):
            entered.wait()
            found[i] = model(X)
            done.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    for i, other in ((0, "b"), (1, "a")):
        fedms_ext.deactivate(model, other)
        assert close(found[i], model(X))
        activate(model, other, depth=3)
    assert all(layer.routes == [] for layer in layers.values())


def test_backends_named_by_two_threads():
    first, second = fedms_ext.use_backend("eager"), fedms_ext.use_backend("cpu")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert registry._forced[-1][0].name == "cpu"
    second.__exit__(None, None, None)
    assert registry._forced == []


# Names and classes


@pytest.mark.parametrize("name", ["training", "_parameters", "keys", "", "a.b", "forward", "_forward_hooks"])
def test_names_that_clash_are_refused(name):
    model = Net()
    with pytest.raises(ValueError, match="cannot be the name of an expert"):
        attach(model, "all-linear", {name: LoRA(4, 8)})
    assert not expert_layers(model)


def test_exclude_and_overrides():
    model = Net()
    layers = attach(model, "all-linear", {"g": LoRA(4, 8)}, exclude=["blocks.0.up"],
                    overrides={"up": {"g": LoRA(2, 2)}, "2.up": {"g": LoRA(1, 1)}})
    assert "blocks.0.up" not in layers and model.blocks[1].up.experts["g"] == LoRA(2, 2)
    assert model.blocks[2].up.experts["g"] == LoRA(1, 1) and model.blocks[1].down.experts["g"] == LoRA(4, 8)
    assert "head" not in quantize(model, exclude=["head"])
    with pytest.raises(ValueError, match=r"overrides name the experts \['x'\]"):
        attach(model, "all-linear", {"h": LoRA(4, 8)}, overrides={"up": {"x": LoRA(2, 2)}})


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.zeros(8, D, D)), nn.Linear(D, 8)


def test_what_stays_unquantized_is_told():
    model = nn.Sequential(Routed()).requires_grad_(False)
    with pytest.warns(UserWarning, match="of the bytes of the frozen weights are not quantized.*0.experts"):
        quantize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(Net().requires_grad_(False))


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        model = Net().requires_grad_(False)
    with pytest.raises(ValueError, match="'blocks.0.up' cannot be quantized: its weight is offloaded"):
        quantize(model)
