"""`fedms_ext.group` on the CUDA kernels: layers that share their input in one call a pass, against float64. test_cuda.py runs this as
it runs numerics.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fedms_ext
from fedms_ext import ExpertLinear, group
from fedms_ext.backends import cuda_group
from fedms_ext.operators import planned_siblings
from grouped_layers import (  # noqa: F401
    BF16, DEVICE, FP16, check, compare, dys_of, input_of, launches, layers_of, pairs_of, passes, poisoned, results,
    skip_without_kernels, wanted,
)
from layers import error
from sampled import FULL

skip_without_kernels()


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
