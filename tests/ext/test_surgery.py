"""attach, detach, merge, unmerge on whole models, and the tensors of an expert."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import BLOCKS, MODELS, WIDTH, Block, Chain, Stack, chain, llama, stack
from torch import nn

from fedms_ext import (
    ExpertLinear,
    LoRA,
    activate,
    attach,
    deactivate,
    detach,
    expert_layers,
    expert_tensors,
    find_blocks,
    merge,
    reset_expert,
    unmerge,
)

LORA = {"global": LoRA(3, 6), "local": LoRA(2, 2)}
BLOCK_NAMES = {
    "bert": "inner.encoder.layer", "vit": "inner.layers", "llama": "inner.layers", "stack": "inner.layers",
    "tuple stack": "inner.layers", "chain": "inner.blocks",
}  # fmt: skip


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def fill(model: nn.Module) -> None:
    """Gives every expert a B that is not zero."""
    for layer in expert_layers(model).values():
        for b in layer.lora_b.values():
            nn.init.normal_(b, std=0.1)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@torch.no_grad()
def test_attach_freezes_and_changes_nothing_and_detach_restores(name):
    model = MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = {key: type(module) for key, module in model.named_modules()}
    want = model.run()

    layers = attach(model, "all-linear", LORA)
    assert list(expert_layers(model)) == layers
    inside = [k for k, kind in modules.items() if kind is nn.Linear and k.startswith(find_blocks(model) + ".")]
    assert layers == inside and len(layers) % BLOCKS == 0
    assert not any(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(".lora_" in key or ".pairs." in key for key in after.keys() - before.keys())
    assert torch.equal(model.run(), want)
    assert sorted({layer.block for layer in expert_layers(model).values()}) == list(range(1, BLOCKS + 1))

    fill(model)
    assert error(model.run(), want) > 1e-3
    for expert in LORA:
        deactivate(model, expert)
    assert torch.equal(model.run(), want)

    detach(model)
    assert {key: type(module) for key, module in model.named_modules()} == modules
    assert list(model.state_dict()) == list(before) and torch.equal(model.run(), want)
    assert not any(attribute.startswith("fedms") for attribute in vars(model))


def test_blocks_are_found(name):
    if name in ("bert", "vit", "clip", "llama"):  # their names differ between versions of transformers
        assert len(MODELS[name]().get_submodule(find_blocks(MODELS[name]()))) == BLOCKS
    else:
        assert find_blocks(MODELS[name]()) == BLOCK_NAMES[name]


@torch.no_grad()
@pytest.mark.parametrize("other_applied", [True, False])
def test_merge_is_the_same_function_and_unmerge_the_same_bits(name, other_applied):
    model = MODELS[name]()
    attach(model, "all-linear", LORA)
    fill(model)
    activate(model, "global", depth=2, applied_depth=BLOCKS)
    activate(model, "local", depth=0, applied_depth=BLOCKS if other_applied else 0)
    want = model.run()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    states = {key: dict(layer.states) for key, layer in expert_layers(model).items()}
    merge(model, "global")
    assert error(model.run(), want) < 1e-5
    with pytest.raises(RuntimeError, match=r"experts \['global'\] are merged already"):
        merge(model, "local")
    with pytest.raises(RuntimeError, match="'global' is merged into the weight"):
        activate(model, "global", depth=1)
    unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {key: layer.states for key, layer in expert_layers(model).items()} == states
    assert torch.equal(model.run(), want)
    with pytest.raises(RuntimeError, match="no expert is merged"):
        unmerge(model)


@torch.no_grad()
def test_merged_weights_stay_after_detach():
    model = stack()
    attach(model, "all-linear", LORA)
    fill(model)
    deactivate(model, "local")
    want = model.run()
    merge(model, "global")
    detach(model)
    assert error(model.run(), want) < 1e-5


@torch.no_grad()
def test_experts_in_different_layers():
    model = stack()
    attach(model, ["up"], {"global": LoRA(3, 6)})
    attach(model, ["down"], {"local": LoRA(2, 2)})
    fill(model)
    want = model.run()
    assert [layer.applied for layer in expert_layers(model).values()] == [["global"], ["local"]] * BLOCKS
    merge(model, "global")
    assert error(model.run(), want) < 1e-5
    unmerge(model)
    assert torch.equal(model.run(), want)


# Targets


@pytest.mark.parametrize(
    "targets, endings",
    [
        (["up"], {"up"}),
        (["up", "down"], {"up", "down"}),
        (["layers.2.up"], {"2.up"}),
        (["inner.layers.2.up"], {"2.up"}),
        (r".*\.layers\.[01]\.(up|down)", {"0.up", "0.down", "1.up", "1.down"}),
        (("down",), {"down"}),
        ("all-linear", {"up", "down"}),
    ],
)
def test_targets(targets, endings):
    model = stack()
    linears = [key for key, module in model.inner.layers.named_modules() if type(module) is nn.Linear]
    want = [f"inner.layers.{key}" for key in linears if any(key.endswith(ending) for ending in endings)]
    assert attach(model, targets, LORA) == want == list(expert_layers(model))


def test_the_same_targets_as_peft():
    peft = pytest.importorskip("peft")
    for targets in (["q_proj", "v_proj"], "all-linear", r".*layers\.[13]\..*_proj"):
        ours, theirs = llama().inner, llama().inner
        names = attach(ours, targets, LORA)
        model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=targets))
        assert set(names) == set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "targets, message",
    [
        (["upp", "down"], r"targets \['upp'\] match no Linear layer; its layers end in down, embed, head, up"),
        (["p"], r"targets \['p'\] match no Linear layer"),
        ([], r"targets \[\] match no Linear layer"),
        ("up", "targets 'up' match no Linear layer"),  # a string is a regular expression for the whole name
        ("norm", "targets 'norm' match no Linear layer"),
        (["head"], "target 'inner.head' lies outside the blocks 'inner.layers'"),
        (r".*\.(up|embed)", "target 'inner.embed' lies outside the blocks"),
    ],
)
def test_wrong_targets_change_nothing(targets, message):
    model = stack()
    with pytest.raises(ValueError, match=message):
        attach(model, targets, LORA)
    assert not expert_layers(model) and all(p.requires_grad for p in model.parameters())


# Blocks


class Towers(nn.Module):
    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = Stack(blocks=left), Stack(blocks=right)


def test_two_towers_must_be_named():
    model = Towers(3, 3)
    with pytest.raises(ValueError, match=r"several lists of 3 blocks: left.layers, right.layers in Towers; pass blocks="):
        attach(model, ["up"], LORA)
    with pytest.raises(ValueError, match="target 'left.layers.0.up' lies outside the blocks 'right.layers'"):
        attach(model, ["up"], LORA, blocks="right.layers")
    layers = attach(model, "all-linear", LORA, blocks="right.layers")
    assert layers == [f"right.layers.{i}.{end}" for i in range(3) for end in ("up", "down")]
    # They are known from now on.
    assert attach(model, "all-linear", {"third": LoRA(1, 1)}) == layers
    with pytest.raises(ValueError, match="blocks='left.layers', but the model's experts are attached to .*'right.layers'"):
        attach(model, "all-linear", {"fourth": LoRA(1, 1)}, blocks="left.layers")
    assert find_blocks(Towers(2, 3)) == "right.layers"


def test_blocks_that_are_not_there():
    with pytest.raises(ValueError, match="no list of blocks in Linear; pass blocks="):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))  # layers, not blocks of layers
    with pytest.raises(ValueError, match="no module 'inner.blocks'"):
        attach(stack(), ["up"], LORA, blocks="inner.blocks")
    with pytest.raises(ValueError, match="'inner.head' is a Linear; a list of blocks is an nn.ModuleList or nn.Seq"):
        attach(stack(), ["up"], LORA, blocks="inner.head")


def test_lists_inside_blocks_are_not_the_blocks():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Block() for _ in range(9))

    model = nn.Module()
    model.layers = nn.ModuleList(Experts() for _ in range(2))
    assert find_blocks(model) == "layers"


@torch.no_grad()
def test_the_model_itself_may_be_the_list_of_blocks():
    model = nn.Sequential(Block(), Block(), Block())
    assert find_blocks(model) == ""
    assert attach(model, ["up"], LORA) == ["0.up", "1.up", "2.up"]
    fill(model)
    assert activate(model, "global", depth=1) == [3]
    assert [layer.block for layer in expert_layers(model).values()] == [1, 2, 3]


@torch.no_grad()
def test_a_layer_may_be_a_block():
    model = nn.Module()
    model.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert attach(model, "all-linear", LORA, blocks="layers") == ["layers.0", "layers.1"]
    assert [layer.block for layer in model.layers] == [1, 2]


def test_blocks_in_a_sequential_by_name_and_by_inspection():
    by_name, found = chain(), chain()
    assert attach(by_name, ["up"], LORA, blocks="inner.blocks") == attach(found, ["up"], LORA)
    assert isinstance(by_name.inner, Chain) and isinstance(by_name.inner.blocks[0].up, ExpertLinear)


# Experts


def test_experts_are_added_to_the_layers_that_are_there():
    model = stack()
    attach(model, ["up"], {"global": LoRA(3, 6)})
    attach(model, ["up", "down"], {"local": LoRA(2, 2)})
    experts = [list(layer.experts) for layer in expert_layers(model).values()]
    assert experts == [["global", "local"], ["local"]] * BLOCKS


@pytest.mark.parametrize("targets, experts, words", [
    (["up"], LoRA(1, 1), "experts are given as a dictionary of LoRA by name, got LoRA"),
    (["up"], {"a": 4}, "expert 'a' is 4, expected a LoRA"),
    ([3], LORA, r"targets=\[3\], expected 'all-linear', a regular expression, or a list of name endings"),
    (None, LORA, "targets=None, expected"),
    ("((", LORA, r"targets='\(\(' is no regular expression"),
])
def test_arguments_of_a_wrong_type_are_told_apart(targets, experts, words):
    model = stack()
    with pytest.raises((TypeError, ValueError), match=words):
        attach(model, targets, experts)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("values, words", [
    ((2.5, 8), "LoRA rank must be an integer, got 2.5"), ((4, "8"), "LoRA alpha must be a number, got '8'"),
    ((4, 8, None), "LoRA dropout must be a number, got None"),
])
def test_a_lora_of_no_numbers_is_refused(values, words):
    with pytest.raises(TypeError, match=words):
        LoRA(*values)


def test_refused_experts_change_nothing():
    model = stack()
    with pytest.raises(ValueError, match="no experts given; pass e.g."):
        attach(model, ["up"], {})
    with pytest.raises(ValueError, match=r"layer 'inner.layers.0.up': .* share one dropout mask"):
        attach(model, ["up"], {"a": LoRA(1, 1, dropout=0.1), "b": LoRA(1, 1, dropout=0.2)})
    with pytest.raises(ValueError, match=r"layer 'inner.layers.0.up': 'a.b' cannot be the name of an expert"):
        attach(model, ["up"], {"a.b": LoRA(1, 1)})
    assert all(p.requires_grad for p in model.parameters())

    attach(model, ["inner.layers.3.up"], LORA)
    before = list(model.state_dict())
    # Layers 0 to 2 have no such expert, layer 3 does: none is changed.
    with pytest.raises(ValueError, match=r"layer 'inner.layers.3.up': this layer already has an expert 'local'"):
        attach(model, ["up"], {"new": LoRA(1, 1), "local": LoRA(1, 1)})
    with pytest.raises(ValueError, match=r"layer 'inner.layers.3.up': .* share one dropout mask"):
        attach(model, ["up"], {"new": LoRA(1, 1, dropout=0.5)})
    assert list(model.state_dict()) == before and len(expert_layers(model)) == 1


def test_a_layer_with_two_names_is_refused():
    # Experts would reach one of its two places only.
    model = Stack()
    model.layers[2].up = model.layers[1].up
    with pytest.raises(ValueError, match=r"layers.1.up, layers.2.up are one and the same layer"):
        attach(model, ["up"], LORA)
    shared = Block()
    model.layers = nn.ModuleList([shared, shared])
    with pytest.raises(ValueError, match=r"layers.0.up, layers.1.up are one and the same layer"):
        attach(model, ["up"], LORA)


def test_expert_tensors():
    model = stack()
    attach(model, ["up", "down"], LORA)
    tensors = dict(expert_tensors(model, "global"))
    assert list(tensors)[:4] == [
        "inner.layers.0.up.lora_a", "inner.layers.0.up.lora_b",
        "inner.layers.0.down.lora_a", "inner.layers.0.down.lora_b",
    ]  # fmt: skip
    assert len(tensors) == 4 * BLOCKS
    first = model.inner.layers[0].up
    assert tensors["inner.layers.0.up.lora_a"] is first.lora_a["global"]
    assert tensors["inner.layers.0.up.lora_b"] is first.lora_b["global"]
    for call in (lambda: list(expert_tensors(model, "x")), lambda: merge(model, "x"), lambda: deactivate(model, "x")):
        with pytest.raises(KeyError, match=r"no layer has an expert 'x'; attached are \['global', 'local'\]"):
            call()


def test_reset_expert_depends_on_the_generator_alone():
    model = stack()
    attach(model, ["up", "down"], LORA)
    fill(model)

    def reset(seed: int) -> list[torch.Tensor]:
        reset_expert(model, "global", torch.Generator().manual_seed(seed))
        return [tensor.detach().clone() for _, tensor in expert_tensors(model, "global")]

    torch.manual_seed(1)
    first = reset(7)
    assert all(torch.equal(a, b) for a, b in zip(first, reset(7)))
    other = reset(8)
    assert all(not torch.equal(a, b) for a, b in zip(first[::2], other[::2]))
    assert not any(b.any() for b in first[1::2])
    assert all(a.abs().max() <= a.shape[1] ** -0.5 for a in first[::2])
    assert all(b.any() for name, b in expert_tensors(model, "local") if name.endswith("lora_b"))


def test_copied_models_are_apart():
    model = stack()
    attach(model, ["up"], LORA)
    fill(model)
    want = model.run()
    twin = copy.deepcopy(model)
    activate(twin, "global", depth=1)
    merge(twin, "local")
    assert torch.equal(model.run(), want) and not torch.equal(twin.run(), want)
    unmerge(twin)
    assert twin.inner.layers[3].up.lora_a["global"].requires_grad
    assert not model.inner.layers[3].up.lora_a["global"].requires_grad


# PyTorch's own encoder, which has a fused path around its Linear layers


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_experts_in_torchs_encoder_are_applied_outside_of_training(padded):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, BLOCKS).eval().requires_grad_(False)
    x = torch.randn(3, 7, WIDTH)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [5]]) if padded else None

    def run():  # of the real tokens: padding is zero or not, as the path has it
        y = model(x, src_key_padding_mask=padding)
        return y if padding is None else y[~padding]

    base = run()
    attach(model, ["linear1", "linear2"], {"e": LoRA(3, 6)})
    fill(model)
    with torch.no_grad():
        frozen = run()
    assert error(frozen, base) > 1e-2
    activate(model, "e", depth=1, applied_depth=BLOCKS)
    y = run()
    assert error(y, frozen) < 1e-6
    y.sum().backward()
    assert model.layers[-1].linear1.lora_b["e"].grad.any()
    merge(model, "e")
    detach(model)
    assert error(run(), frozen) < 1e-5
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers) and model.use_nested_tensor is True
