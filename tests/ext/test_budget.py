"""fedms_ext.budget against counts by hand and by PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BLOCKS, MODELS, WIDTH, bert, stack
from torch.utils.flop_counter import FlopCounterMode

from fedms_ext import LoRA, activate, attach, budget, deactivate, quantize, reference


def with_expert(model, rank=3):
    attach(model, "all-linear", {"e": LoRA(rank, 6)})
    deactivate(model, "e")
    return model


@pytest.fixture
def counted(monkeypatch):
    """PyTorch's count of the operations of a call. It cannot look into our operator: the reference stands in."""

    def count(run) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        return counter.get_total_flops()

    monkeypatch.setattr("fedms_ext.nn.expert_linear.expert_linear", plain_expert_linear)
    return count


def plain_expert_linear(x, weight, bias, lora_a, lora_b, scale, gate, active, dropout_p, seed, segments):
    return reference.expert_linear(x, weight, bias, lora_a, lora_b, scale, gate, active)


def test_costs_of_a_block_by_hand():
    model = with_expert(stack(), rank=3)
    weights = 2 * WIDTH * 2 * WIDTH  # up and down
    pairs = 2 * 3 * (WIDTH + 2 * WIDTH)
    assert budget.block_costs(model) == [budget.BlockCost(weights, 0, WIDTH)] * BLOCKS
    activate(model, "e", depth=1, applied_depth=2)
    costs = budget.block_costs(model)
    assert [cost.lora for cost in costs] == [0, 0, pairs, pairs]
    assert costs[3].forward(tokens=10, length=5) == 10 * (2 * weights + 2 * pairs + 4 * 5 * WIDTH)
    assert costs[3].backward(tokens=10, length=5) == 10 * (2 * weights + 4 * pairs + 8 * 5 * WIDTH)


def test_counts_a_conv1d_without_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=50, n_positions=16, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2Model(config)
    attach(model, ["c_attn"], {"e": LoRA(3, 6)})
    weights = WIDTH * (3 * WIDTH + WIDTH + 4 * WIDTH + 4 * WIDTH)   # c_attn with experts; both c_proj and c_fc without
    assert budget.block_costs(model) == [budget.BlockCost(weights, 3 * (WIDTH + 3 * WIDTH), WIDTH)] * 2


def test_sums_over_the_blocks_asked_for():
    model = with_expert(bert())
    activate(model, "e", depth=1)
    whole = budget.forward_flops(model, 3, 7)
    assert whole == budget.forward_flops(model, 3, 7, last=2) + budget.forward_flops(model, 3, 7, first=2)
    assert budget.forward_flops(model, 3, 7, first=BLOCKS) == budget.forward_flops(model, 0, 7) == 0
    one = budget.backward_flops(model, 3, 7)
    activate(model, "e", depth=BLOCKS)
    assert budget.backward_flops(model, 3, 7) == BLOCKS * one > 0
    deactivate(model, "e")
    assert budget.backward_flops(model, 3, 7) == 0


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("depth", [0, 1, BLOCKS])
def test_forward_is_what_pytorch_counts(counted, name, depth):
    model = with_expert(MODELS[name]())
    activate(model, "e", depth=depth)
    model.inner.set_attn_implementation("eager")
    length = 7 if name == "bert" else 5  # four patches and the class token
    with torch.no_grad():
        got = counted(model.run)
    below = 0 if name == "bert" else counted(lambda: model.inner.embeddings(model.inputs["pixel_values"]))
    assert budget.forward_flops(model, 3, length) == got - below


@pytest.mark.parametrize("depth", [1, 2, BLOCKS])
def test_backward_is_what_pytorch_counts_but_for_the_lowest_input(counted, depth):
    model = with_expert(bert())
    activate(model, "e", depth=depth)
    model.inner.set_attn_implementation("eager")
    y = model.run()
    got = counted(lambda: y.sum().backward())
    # The lowest trained block's query, key and value layers need no dx; the model counts it.
    lowest = 3 * 3 * 7 * (2 * WIDTH * WIDTH + 2 * 3 * WIDTH)
    assert budget.backward_flops(model, 3, 7) == got + lowest


def test_needs_experts():
    with pytest.raises(ValueError, match="no experts are attached"):
        budget.forward_flops(stack(), 1, 1)


# Memory

def test_the_peak_is_what_tensors_hold_at_once():
    with budget.PeakMemory() as memory:
        a = torch.ones(1000)  # 4000 bytes
        b = a.view(10, 100) * 2  # 4000 more; the view holds nothing of its own
        del a
        c = torch.cat([b, b])  # 8000
        b.add_(1)
        del b
    assert memory.peak == 12000 and memory.now == c.nbytes
    del c
    assert memory.now == 0


def test_what_is_kept_for_the_backward_pass_counts():
    x, w = torch.ones(50, 20), torch.ones(30, 20, requires_grad=True)
    with budget.PeakMemory() as memory:
        torch.nn.functional.linear(x, w).square().sum()
    without = memory.peak
    with budget.PeakMemory() as memory:
        torch.nn.functional.linear(x, w).square().sum().backward()
    assert memory.now == w.grad.nbytes and memory.peak > without >= 2 * 50 * 30 * 4


@pytest.mark.parametrize("name", ["bert", "vit", "stack"])
@pytest.mark.parametrize("depth", [0, 1, BLOCKS])
def test_two_small_traces_foretell_a_batch(name, depth):
    model = with_expert(MODELS[name]())
    activate(model, "e", depth=depth)
    whole = {key: value[:1].repeat(9, *[1] * (value.dim() - 1)) for key, value in model.inputs.items()}

    def step(samples):
        model.inputs = {key: value[:samples] for key, value in whole.items()}
        y = model.run()
        if depth:
            y.square().sum().backward()
        model.zero_grad()

    foretold = budget.memory_of(step)
    with budget.PeakMemory() as memory:
        step(9)
    assert abs(foretold.of(9) - memory.peak) <= 0.05 * memory.peak


def test_weights_count_once_and_a_transpose_when_it_is_there():
    model = with_expert(stack())
    plain = sum(p.nbytes for p in model.parameters())
    assert budget.weight_bytes(model) == plain
    model.again = model.inner
    assert budget.weight_bytes(model) == plain
    del model.again
    activate(model, "e", depth=2)
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    frozen = [model.get_submodule(name).frozen for name in quantize(model)]
    forward = budget.weight_bytes(model)
    assert forward == plain - linear + sum(weight.nbytes for weight in frozen)
    model.run().sum().backward()
    assert budget.weight_bytes(model) > forward


def test_trained_parameters_follow_the_activation():
    model = with_expert(stack(), rank=3)
    assert budget.trained_parameters(model) == 0
    activate(model, "e", depth=2, applied_depth=3)
    assert budget.trained_parameters(model) == 2 * 2 * 3 * (WIDTH + 2 * WIDTH)
