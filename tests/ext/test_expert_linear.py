"""fedms_ext.ExpertLinear: states, gate, dropout, merging, saving, and what it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedms_ext import ExpertLinear, LoRA, PairState, gated, philox_mask, reference

K, N = 13, 9


def layer_with(*ranks: int, bias: bool = True, dropout: float = 0.0, dtype=torch.float32) -> ExpertLinear:
    """An ExpertLinear whose experts e0, e1, ... have random A and B, all frozen."""
    experts = {f"e{i}": LoRA(rank, alpha=1.5 * rank + i, dropout=dropout) for i, rank in enumerate(ranks)}
    layer = ExpertLinear(K, N, bias, experts=experts, dtype=dtype)
    for b in layer.lora_b.values():
        nn.init.normal_(b)
    return layer


def reference_of(layer: ExpertLinear, x, gate=None, dropout_p=0.0, seed=None):
    """The definition in float64 for the applied experts of a layer; `gate` has a column for each expert."""
    return reference.expert_linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double(),
        [a.double() for a in layer.lora_a.values()], [b.double() for b in layer.lora_b.values()],
        [lora.scale for lora in layer.experts.values()], gate,
        [state is not PairState.OFF for state in layer.states.values()], dropout_p, seed,
    )  # fmt: skip


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def test_lora_scale():
    assert LoRA(8, 16).scale == 2.0
    assert LoRA(16, 8, rslora=True).scale == 2.0


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rank=0, alpha=1), "rank must be at least 1, got 0"),
        (dict(rank=2, alpha=1, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (dict(rank=2, alpha=1, dropout=-0.1), "got -0.1"),
        (dict(rank=2, alpha=math.nan), "alpha must be finite, got nan"),
    ],
)
def test_lora_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**values)


@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_layer_is_the_linear_layer_whose_parameters_it_shares(bias):
    linear = nn.Linear(K, N, bias)
    x = torch.randn(4, 3, K)
    want = linear(x)
    layer = ExpertLinear.from_linear(linear, {"a": LoRA(3, 6), "b": LoRA(1, 1)})
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert torch.allclose(layer(x), want, rtol=0, atol=0)  # B = 0 adds zeros
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.lora_b["a"].any() and layer.lora_a["a"].abs().max() <= 1 / math.sqrt(K)
    for expert in ("a", "b"):
        layer.set_state(expert, "off")
    assert torch.equal(layer(x), want)


def test_a_starts_as_in_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    inner = nn.Sequential(nn.Linear(K, N))
    torch.manual_seed(6)
    model = peft.get_peft_model(inner, peft.LoraConfig(r=4, target_modules=["0"]))
    # PEFT's Linear is initialized twice: by its constructor, and then as LoRA.
    torch.manual_seed(6)
    nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)
    layer = ExpertLinear.from_linear(inner[0].base_layer, {"e": LoRA(4, 8)})
    assert torch.equal(layer.lora_a["e"], model.base_model.model[0].lora_A["default"].weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("states", list(itertools.product(PairState, repeat=2)))
def test_states(bias, states):
    layer = layer_with(3, 2, bias=bias)
    for expert, state in zip(layer.experts, states):
        layer.set_state(expert, state)
    x = torch.randn(5, K, requires_grad=True)
    y = layer(x)
    assert error(y, reference_of(layer, x)) < 1e-6
    assert layer.applied == [e for e, state in zip(layer.experts, states) if state is not PairState.OFF]
    if not layer.applied:
        assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.square().sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None
    for expert, state in zip(layer.experts, states):
        for pair in (layer.lora_a[expert], layer.lora_b[expert]):
            assert (pair.grad is not None) == (state is PairState.TRAINED)


def test_without_trained_pairs_nothing_is_recorded():
    layer = layer_with(3)
    assert not layer(torch.randn(2, K)).requires_grad


def test_leaving_the_trained_state_drops_the_gradient():
    layer = layer_with(2)
    layer.set_state("e0", "trained")
    layer(torch.randn(3, K)).sum().backward()
    layer.set_state("e0", PairState.FROZEN)
    assert layer.lora_a["e0"].grad is None and not layer.lora_b["e0"].requires_grad


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
@pytest.mark.parametrize("states", [("trained", "frozen", "trained"), ("frozen", "off", "trained")])
@pytest.mark.parametrize("rows", [1, 4])
def test_gate(shape, states, rows):
    layer = layer_with(3, 1, 4)
    for expert, state in zip(layer.experts, states):
        layer.set_state(expert, state)
    x = torch.randn(*shape, K, requires_grad=True)
    gate = torch.randn(rows, 3, requires_grad=True)
    with gated([layer], gate):
        y = layer(x)
    assert layer.gate is None
    doubled = gate.detach().double().requires_grad_()
    want = reference_of(layer, x, doubled.view(rows, *[1] * (len(shape) - 1), 3))
    assert error(y, want) < 1e-6
    dy = torch.randn_like(y)
    (got,), (expected,) = torch.autograd.grad(y, gate, dy), torch.autograd.grad(want, doubled, dy.double())
    assert error(got, expected) < 1e-5
    assert [bool(column.any()) for column in got.T] == [state != "off" for state in states]


def test_the_gate_is_taken_off_after_an_error():
    layer = layer_with(2)
    with pytest.raises(ZeroDivisionError), gated({"layer": layer}, torch.ones(1, 1)):
        1 / 0
    assert layer.gate is None


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (2,), (4, 1, 2)])
def test_a_wrong_gate_is_refused(shape):
    layer = layer_with(2, 2)
    with gated([layer], torch.ones(shape)), pytest.raises(ValueError, match=r"gate must be \(B, E\) = \(4, 2\)"):
        layer(torch.randn(4, 5, K))


def test_dropout_is_drawn_in_training_and_only_for_trained_pairs():
    layer = layer_with(3, 2, dropout=0.4)
    x = torch.randn(50, K)
    assert torch.equal(layer(x), layer(x))  # training mode, but all pairs frozen
    layer.set_state("e1", "trained")
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, ()))
    assert error(y, reference_of(layer, x, dropout_p=0.4, seed=seed)) < 1e-6
    assert not philox_mask(seed, *x.shape, 0.4).all()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert error(layer(x), reference_of(layer, x)) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_dtypes(dtype, tolerance):
    layer = layer_with(3, dtype=dtype)
    layer.set_state("e0", "trained")
    x = torch.randn(6, K, dtype=dtype)
    y = layer(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype and layer.lora_a["e0"].dtype == wide and error(y, reference_of(layer, x)) < tolerance


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [PairState.FROZEN, PairState.TRAINED])
def test_merge_keeps_the_function_and_unmerge_the_bits(dtype, state):
    layer = layer_with(3, 2, dtype=dtype)
    layer.set_state("e1", "frozen")
    layer.set_state("e0", "frozen")
    x = torch.randn(6, K, dtype=dtype)
    want, weight = reference_of(layer, x), layer.weight.clone()
    layer.set_state("e0", state)
    layer.merge("e0")
    assert layer.applied == ["e1"] and not torch.equal(layer.weight, weight)
    assert error(layer(x), want) < (1e-6 if dtype == torch.float32 else 2e-2)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and layer.states["e0"] is state
    assert layer.lora_a["e0"].requires_grad == (state is PairState.TRAINED)


def test_a_merged_expert_cannot_be_applied_on_top():
    layer = layer_with(3)
    layer.merge("e0")
    for state in ("frozen", "trained"):
        with pytest.raises(RuntimeError, match=f"'e0' is merged into the weight; unmerge it before it is {state}"):
            layer.set_state("e0", state)
    layer.set_state("e0", "off")
    with pytest.raises(RuntimeError, match="'e0' is merged already"):
        layer.merge("e0")
    layer.unmerge()
    with pytest.raises(RuntimeError, match="no expert is merged"):
        layer.unmerge()


def test_delta_is_what_an_expert_adds():
    layer = layer_with(3)
    x = torch.randn(4, K)
    added = layer(x) - F.linear(x, layer.weight, layer.bias)
    assert layer.delta("e0").shape == (N, K) and torch.allclose(x @ layer.delta("e0").T, added, atol=1e-5)


def test_leaving_after_merging_is_the_same_function():
    layer = layer_with(3)
    x = torch.randn(4, K)
    want = layer(x)
    layer.merge("e0")
    layer.leave()
    assert type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"]
    assert vars(layer).keys() == vars(nn.Linear(K, N)).keys()
    assert torch.allclose(layer(x), want, atol=1e-5)


# Copies and files


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies(way):
    layer = layer_with(3, 2)
    layer.set_state("e0", "trained"), layer.set_state("e1", "off")
    if way == "state_dict":
        assert set(layer.state_dict()) == {
            "weight", "bias", "lora_a.e0", "lora_a.e1", "lora_b.e0", "lora_b.e1", "pairs.e0", "pairs.e1",
        }  # fmt: skip
        twin = layer_with(3, 2)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert twin.states == layer.states and twin.experts == layer.experts
    x = torch.randn(4, K)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.lora_b["e0"].add_(1.0)
    assert not torch.equal(twin(x), layer(x))


def test_a_merged_layer_can_be_copied_and_unmerged():
    layer = layer_with(3)
    weight = layer.weight.clone()
    layer.merge("e0")
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, weight) and not torch.equal(layer.weight, weight)


def test_printed_form():
    layer = layer_with(3, 2)
    layer.set_state("e1", "off")
    assert "experts=(e0: r=3 frozen, e1: r=2 off)" in repr(layer)


# What is refused


def test_only_a_linear_layer_is_converted():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (nn.LayerNorm(3), Own(3, 3), layer_with(2)):
        with pytest.raises(TypeError, match=f"from_linear takes an nn.Linear; this is a .*{type(module).__name__}: "):
            ExpertLinear.from_linear(module, {"e": LoRA(2, 2)})


def test_refused_experts():
    layer = layer_with(2, dropout=0.1)
    with pytest.raises(ValueError, match=r"already has an expert 'e0'; it has \['e0'\]"):
        layer.add_expert("e0", LoRA(2, 2, dropout=0.1))
    with pytest.raises(ValueError, match=r"share one dropout mask.*\{'e0': 0.1, 'e1': 0.2\}"):
        layer.add_expert("e1", LoRA(2, 2, dropout=0.2))
    for name in ("", "a.b", "type", "keys", "forward"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be the name of an expert"):
            layer.add_expert(name, LoRA(2, 2, dropout=0.1))
    assert list(layer.experts) == ["e0"] and len(list(layer.parameters())) == 4


@pytest.mark.parametrize("call", ["set_state", "merge"])
def test_unknown_expert(call):
    with pytest.raises(KeyError, match=r"no expert 'x' in this layer; it has \['e0'\]"):
        getattr(layer_with(2), call)("x", *(["off"] if call == "set_state" else []))


def test_unknown_state():
    with pytest.raises(ValueError, match="state is 'asleep', expected off, frozen, trained"):
        layer_with(2).set_state("e0", "asleep")
