"""Sparsely Activated LoRA is real: below the first trained block autograd records nothing and keeps nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BLOCKS, MODELS
from torch import Tensor, nn

from fedms_ext import ConstantPrefix, LoRA, activate, attach, expert_layers
from fedms_ext.sparse.activation import blocks_of


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]()
    attach(model, "all-linear", {"global": LoRA(3, 6), "local": LoRA(2, 2)})
    return model


class Trace:
    """One forward pass: its output, and how many tensors autograd kept while each block ran (0: before the first,
    BLOCKS + 1: after the last)."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [0] * (BLOCKS + 2)
        self.kept_shapes: set[tuple[int, ...]] = set()
        self.now = 0
        handles = []
        for number, block in enumerate(blocks_of(model), start=1):
            handles += [
                block.register_forward_pre_hook(lambda *_, n=number: self._enter(n)),
                block.register_forward_hook(lambda *_, n=number: self._leave(n)),
            ]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            self.output = model.run()
        for handle in handles:
            handle.remove()

    def _enter(self, number: int) -> None:
        self.now = number

    def _leave(self, number: int) -> None:
        self.now = BLOCKS + 1 if number == BLOCKS else 0

    def _keep(self, tensor: Tensor) -> Tensor:
        self.kept[self.now] += 1
        return tensor


def graph_leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors of the graph below `output`: those that accumulate a gradient."""
    leaves, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def graph_size(output: Tensor) -> int:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("depth", range(1, BLOCKS + 1))
def test_nothing_below_the_first_trained_block(model, depth):
    # Frozen pairs below it are applied, as at a client with a small budget: they record nothing either.
    activate(model, "global", depth=depth, applied_depth=BLOCKS)
    trace = Trace(model)
    first = BLOCKS - depth + 1
    assert trace.kept[:first] == [0] * first
    assert all(trace.kept[first : BLOCKS + 1])

    trained = [
        pair["global"] for layer in expert_layers(model).values() if layer.block >= first
        for pair in (layer.lora_a, layer.lora_b)
    ]  # fmt: skip
    leaves = graph_leaves(trace.output)
    assert {id(leaf) for leaf in leaves} == {id(pair) for pair in trained}

    trace.output.sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if any(p is pair for pair in trained)}


def test_the_graph_grows_with_the_depth_alone(model):
    sizes = []
    for depth in range(1, BLOCKS + 1):
        activate(model, "global", depth=depth, applied_depth=BLOCKS)
        sizes.append(graph_size(model.run()))
    steps = {after - before for before, after in zip(sizes, sizes[1:])}
    # One more block, one more block's nodes. Only the lowest differs: its input needs no gradient.
    assert len(steps) == 1 and steps.pop() > 0


def test_without_trained_pairs_there_is_no_graph(model):
    activate(model, "global", depth=0, applied_depth=BLOCKS)
    trace = Trace(model)
    assert not trace.output.requires_grad and not any(trace.kept)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_replayed_prefix_has_the_same_graph(model, depth):
    activate(model, "global", depth=depth, applied_depth=BLOCKS)
    full = model.run()
    prefix = ConstantPrefix(model)
    hidden = prefix.capture(model.run)
    assert hidden.grad_fn is None
    with prefix.replay(hidden):
        replayed = Trace(model)
    assert not any(replayed.kept[: BLOCKS - depth + 1])
    assert graph_size(replayed.output) == graph_size(full)
    assert {id(t) for t in graph_leaves(replayed.output)} == {id(t) for t in graph_leaves(full)}


def test_a_frozen_pair_above_the_first_trained_block_keeps_no_input(model):
    # Trained at the bottom, frozen above: gradients pass through the upper blocks, but their x is not needed.
    layer = next(layer for layer in reversed(expert_layers(model).values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)

    def kept() -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
        return shapes

    layer.set_state("global", "frozen"), layer.set_state("local", "off")
    assert (5, layer.in_features) not in kept()
    layer.set_state("global", "trained")
    assert (5, layer.in_features) in kept()
