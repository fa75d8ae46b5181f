"""Layers that share their input: `fedms_ext.group` gives what the layers give one by one."""
from __future__ import annotations

import copy
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, _C, gated, group, quantize, segmented
from fedms_ext.operators import siblings as operator
from fedms_ext.sparse.siblings import group_siblings

K, WIDTHS, RANKS = 48, (70, 33, 64), (3, 8, 1)

@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(operator, "FEWEST_VALUES", 0)


def made(kind: str | None = "int8", k: int = K, dropout: float = 0.0) -> list[ExpertLinear]:
    """Three layers with two experts each, of other widths, ranks and scales, all trained."""
    torch.manual_seed(0)
    layers = []
    for n, rank in zip(WIDTHS, RANKS):
        layer = ExpertLinear(k, n, bias=n != 33, experts={"a": LoRA(rank, 2 * n, dropout), "b": LoRA(rank + 1, 16, dropout)})
        for name in "ab":
            nn.init.normal_(layer.lora_b[name], std=0.1)
            layer.set_state(name, "trained")
        layers.append(layer)
    if kind:
        quantize(nn.ModuleList(layers), kind)
    return layers


def input_of(rows: int = 26, k: int = K, needs_x: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(2, rows // 2, k, generator=generator).requires_grad_(needs_x)


def results(layers, x, context=nullcontext):
    """The outputs, and the gradients of x and of every parameter, of one pass through all layers."""
    torch.manual_seed(1)
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    with context():
        ys = [layer(x) for layer in layers]
        loss = sum((i + 1.0) * y.sin().sum() for i, y in enumerate(ys))
    wanted = trained + [x] * x.requires_grad
    return [y.detach() for y in ys], torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()


def assert_same(layers, x, context=nullcontext, joined=True):
    """Grouped and one by one: the same bits of every y, dA, dB and dgate, and the same dx up to rounding."""
    ys, gradients = results(layers, x, context)
    calls = []
    forward = _C.siblings_forward
    try:
        _C.siblings_forward = lambda *args: calls.append(forward(*args)) or calls[-1]
        siblings = group(layers)
        again, grouped = results(layers, x, context)
    finally:
        _C.siblings_forward = forward
    assert bool(calls and calls[0] is not None) == joined
    assert all(map(torch.equal, ys, again))
    rest = len(gradients) - x.requires_grad
    for old, new in zip(gradients[:rest], grouped[:rest]):
        assert torch.equal(old, new) if old is not None else new is None
    for old, new in zip(gradients[rest:], grouped[rest:]):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    return siblings


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("rows", [2, 26, 130])
@pytest.mark.parametrize("kind, k", [("int8", 48), ("int8", 35), ("int8_rotated", 48)])
def test_outputs_have_the_same_bits(kind, k, rows, needs_x):
    siblings = assert_same(made(kind, k), input_of(rows, k, needs_x))
    assert siblings.together


@pytest.mark.parametrize("kind", [None, "nf4", "fp16"])
def test_other_weights_are_computed_one_by_one(kind):
    assert_same(made(kind), input_of(), joined=False)


@pytest.mark.parametrize("rows", [26, 130])
def test_the_gradient_of_x_is_the_sum_in_the_order_of_the_layers(rows):
    layers, x = made(), input_of(rows)
    dys = [torch.randn(2, rows // 2, n) for n in WIDTHS]
    apart = [torch.autograd.grad(layer(x), x, dy)[0] for layer, dy in zip(layers, dys)]
    group(layers)
    (dx,) = torch.autograd.grad([layer(x) for layer in layers], x, dys)
    assert torch.equal(dx, apart[0] + apart[1] + apart[2])


def test_bits_do_not_depend_on_the_number_of_threads():
    layers, x, threads = made(), torch.randn(300, K, requires_grad=True), torch.get_num_threads()
    group(layers)
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(results(layers, x))
    finally:
        torch.set_num_threads(threads)
    for ys, gradients in found[1:]:
        assert all(map(torch.equal, ys, found[0][0])) and all(map(torch.equal, gradients, found[0][1]))


def test_states_that_differ():
    layers = made()
    layers[0].set_state("a", "frozen")
    layers[0].set_state("b", "off")
    layers[1].set_state("a", "off")
    layers[1].set_state("b", "off")
    assert_same(layers, input_of())
    layers[2].set_state("a", "off")
    layers[2].set_state("b", "frozen")
    assert_same(layers, input_of())
    for layer in layers:
        layer.siblings = None
    assert_same(layers, input_of(needs_x=False))


def test_an_output_without_trained_parameters_needs_no_gradient():
    layers = made()
    for name in "ab":
        layers[0].set_state(name, "frozen")
    group(layers)
    x = input_of(needs_x=False)
    assert [layer(x).requires_grad for layer in layers] == [False, True, True]


@pytest.mark.parametrize("off", [False, True])
def test_gates(off):
    layers = made()
    if off:
        layers[1].set_state("a", "off")
    gate = torch.rand(2, 2)
    assert_same(layers, input_of(), lambda: gated(layers, gate))


def test_the_gradient_of_a_gate():
    layers, x, found = made(), input_of(), []
    for grouped in (False, True):
        gate = torch.rand(2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if grouped:
            group(layers)
        with gated(layers, gate):
            sum(layer(x).sin().sum() for layer in layers).backward()
        found.append(gate.grad)
    torch.testing.assert_close(*found)


def test_segments_are_computed_one_by_one():
    layers = made()
    assert_same(layers, input_of(), lambda: segmented(layers, [1, 1]), joined=False)


def test_dropout_draws_one_number_and_a_mask_for_each_layer():
    layers, x = made(dropout=0.5), input_of()
    group(layers)
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, ()))
    torch.manual_seed(3)
    ys = [layer(x) for layer in layers]
    gradients = torch.autograd.grad([y.sum() for y in ys], [x, layers[2].lora_a["a"]])
    alone = []
    for i, layer in enumerate(layers):
        alone.append(fedms_ext.expert_linear(
            x, layer.frozen, layer.bias, [*layer.lora_a.values()], [*layer.lora_b.values()],
            [lora.scale for lora in layer.experts.values()], dropout_p=0.5, seed=seed + i))
    assert all(map(torch.equal, ys, alone))
    expected = torch.autograd.grad([y.sum() for y in alone], [x, layers[2].lora_a["a"]])
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_dropout_in_some_of_the_layers_only():
    layers = made(dropout=0.5)
    for name in "ab":
        layers[1].set_state(name, "frozen")
    assert_same(layers, input_of(), joined=False)


def change_x(layers, x):
    with torch.no_grad():
        x.mul_(2)


def change_pair(layers, x):
    with torch.no_grad():
        layers[1].lora_b["a"].add_(1)


CHANGES = {
    "x in place": change_x,
    "a pair in place": change_pair,
    "a state": lambda layers, x: layers[1].set_state("a", "off"),
    "training mode": lambda layers, x: layers[1].eval(),
    "a new scale": lambda layers, x: layers[1].experts.update(a=LoRA(RANKS[1], 1.0)),
    "the weight": lambda layers, x: layers[1].frozen.data.copy_(made()[1].frozen.data),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_the_calls_is_seen(change):
    found = []
    for grouped in (False, True):
        layers, x = made(), input_of(needs_x=False)
        if grouped:
            group(layers)
        first = layers[0](x)
        change(layers, x)
        found.append([first, layers[1](x), layers[2](x)])
    assert all(map(torch.equal, *found))


def test_a_change_of_the_gradient_mode_is_seen():
    layers, x = made(), input_of()
    group(layers)
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad and layers[2](x).requires_grad


def test_layers_that_do_not_share_their_input_part_at_the_first_call():
    found = []
    for grouped in (False, True):
        layers, x, z = made(dropout=0.5), input_of(26), input_of(130)
        if grouped:
            siblings = group(layers)
        torch.manual_seed(5)
        ys = [layers[0](x), layers[1](z), layers[2](z)]
        found.append([*ys, *torch.autograd.grad([y.sum() for y in ys], [x, z]), torch.get_rng_state()])
    assert siblings.together is False
    assert all(map(torch.equal, *found))     # dropout too: the generator has drawn as many numbers


def test_layers_that_have_shared_their_input_stay_together():
    layers, x, z = made(), input_of(26), input_of(130)
    siblings = group(layers)
    expected = copy.deepcopy(layers)
    for layer in expected:
        layer.siblings = None
    for layer in layers:
        layer(x)
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        for i in order:
            for value in (x, z):
                assert torch.equal(layers[i](value), expected[i](value))
    assert siblings.together


def test_an_exception_between_the_calls_leaves_nothing_behind():
    layers, x = made(), input_of(needs_x=False)
    siblings = group(layers)
    with torch.no_grad(), pytest.raises(KeyError):
        layers[0](x)
        kept = weakref.ref(siblings._of_thread.held.outputs[1][0])
        raise KeyError("between the siblings")
    assert kept() is not None
    del x
    assert kept() is None
    assert_same(layers, input_of())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    layers, x = made(), input_of()

    def loss_of(x):
        return sum((i + 1.0) * layer(x).sin().sum() for i, layer in enumerate(layers))

    expected = torch.autograd.grad(loss_of(x), [x])[0]
    siblings = group(layers)
    for _ in range(2):
        x.grad = None
        checkpoint(loss_of, x, use_reentrant=reentrant).backward()
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    assert siblings.together


def test_activation_checkpointing_of_layers_that_do_not_share_their_input():
    layers, x, z = made(), input_of(26), input_of(130)
    expected = torch.autograd.grad(layers[0](x).sum() + layers[1](z).sum(), [x, z])
    siblings = group(layers)
    checkpoint(lambda x, z: layers[0](x).sum() + layers[1](z).sum(), x, z, use_reentrant=False).backward()
    assert siblings.together is None
    assert torch.equal(x.grad, expected[0]) and torch.equal(z.grad, expected[1])


def test_a_compiled_model_has_one_graph():
    layers, x = made(), input_of()
    expected = [layer(x) for layer in layers]
    group(layers)
    layers[0].frozen.for_dx()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: [layer(x) for layer in layers], backend="eager", fullgraph=True)
    for y, other in zip(compiled(x), expected):
        torch.testing.assert_close(y, other)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_in_which_layers_are_computed_one_by_one(context):
    layers, x = made(), input_of(needs_x=False)
    with context():
        expected = [layer(x.clone()) for layer in layers]
        group(layers)
        x = x.clone()
        assert all(map(torch.equal, expected, [layer(x) for layer in layers]))


def test_two_passes_from_two_outputs():
    layers, x = made(), input_of()
    expected = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in layers]
    group(layers)
    ys = [layer(x) for layer in layers]
    assert all(torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], dx) for y, dx in zip(ys, expected))


def test_differentiating_a_gradient_again_is_an_error():
    layers, x = made(), input_of()
    group(layers)
    (dx,) = torch.autograd.grad(sum(layer(x).sin().sum() for layer in layers), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_an_output_may_be_changed_in_place():
    layers, x = made(), input_of()
    expected = torch.autograd.grad(sum((layer(x) * 2).sin().sum() for layer in layers), x)[0]
    group(layers)
    (dx,) = torch.autograd.grad(sum(layer(x).mul_(2).sin().sum() for layer in layers), x)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_the_kernels_decline_take_the_operator(monkeypatch):
    layers, x = made(), input_of()
    expected = results(layers, x)
    group(layers)
    monkeypatch.setattr(_C, "siblings_backward", lambda *args: None)
    for old, new in zip(expected[1], results(layers, x)[1]):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_copies_are_groups_of_their_own():
    layers = nn.ModuleList(made())
    siblings = group(list(layers))
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert other[0].siblings is other[1].siblings is other[2].siblings is not siblings
        assert list(other[0].siblings.layers) == list(other)
        assert_same(list(other), input_of())
    assert "siblings" not in " ".join(layers.state_dict())
    alone = copy.copy(layers[1])     # a layer that the group does not know
    assert torch.equal(alone(input_of()), made()[1](input_of()))


def test_threads_do_not_see_one_another():
    layers, x, found = made(), input_of(), []
    group(layers)
    layers[0](x)
    worker = threading.Thread(target=lambda: found.append(layers[1](x)))
    worker.start()
    worker.join()
    own = layers[1](x)
    assert torch.equal(found[0], own) and found[0].grad_fn is not own.grad_fn


class Attention(nn.Module):
    def __init__(self, names: tuple[str, ...], other: int = K) -> None:
        super().__init__()
        for i, name in enumerate(names):
            self.add_module(name, nn.Linear(other if i == 0 else K, K))
        self.out = nn.Linear(K, K)


@pytest.mark.parametrize("names, other, found", [
    (("query", "key", "value"), K, 3), (("q_proj", "k_proj", "v_proj"), K, 3), (("gate_proj", "up_proj"), K, 2),
    (("q_proj", "v_proj"), K, 2), (("query", "key", "value"), 32, 0), (("first", "second"), K, 0),
])  # fmt: skip
def test_siblings_are_found_by_their_names(names, other, found):
    model = nn.Sequential(Attention(names, other), Attention(names, other))
    fedms_ext.attach(model, "all-linear", {"a": LoRA(2, 4)}, blocks="", group=True)
    for block in model:
        grouped = [layer for layer in fedms_ext.expert_layers(block).values() if layer.siblings is not None]
        assert len(grouped) == found and len({layer.siblings for layer in grouped}) <= 1
        assert block.out.siblings is None
    assert group_siblings(model) == []
    fedms_ext.detach(model)
    assert not any(hasattr(module, "siblings") for module in model.modules())


def test_attach_joins_nothing_on_a_cpu_by_itself(monkeypatch):
    model = nn.Sequential(Attention(("query", "key", "value")))
    fedms_ext.attach(model, "all-linear", {"a": LoRA(2, 4)}, blocks="", group=False)
    assert all(layer.siblings is None for layer in fedms_ext.expert_layers(model).values())
    joined = []
    monkeypatch.setattr("fedms_ext.nn.siblings.sibling_linears", lambda *args: joined.append(args))
    fedms_ext.attach(model, "all-linear", {"b": LoRA(2, 4)}, blocks="")
    x = torch.randn(4, K)
    model[0].query(x)
    assert not joined
    fedms_ext.attach(model, "all-linear", {"c": LoRA(2, 4)}, blocks="", group=True)
    model[0].query(x)
    assert joined


def test_a_new_group_replaces_the_old_one():
    layers = made()
    group(layers)
    siblings = group(layers[:2])
    assert layers[0].siblings is siblings and layers[2].siblings is None
    layers[1].leave()
    assert layers[0].siblings is None


def test_what_is_no_group_is_refused():
    layers = made()
    with pytest.raises(TypeError, match="takes layers with experts; this is a torch.nn.modules.linear.Linear"):
        group([*layers, nn.Linear(K, 3)])
    with pytest.raises(ValueError, match="got 1 layers"):
        group(layers[:1])
    with pytest.raises(ValueError, match="2 of them distinct"):
        group([layers[0], layers[1], layers[0]])
    with pytest.raises(ValueError, match=r"\[48, 20\] input features"):
        group([layers[0], ExpertLinear(20, 4, experts={})])
