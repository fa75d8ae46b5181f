"""Versions of an expert side by side, against each of them alone."""
from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

import fedms_ext
from fedms_ext import ExpertBank, LoRA

COUNTS = (1, 0, 2)


def attached(name):
    torch.manual_seed(0)
    model = tiny_models.MODELS[name]()
    fedms_ext.attach(model, "all-linear", {"own": LoRA(3, 5.0), "other": LoRA(2, 1.0)})
    fedms_ext.activate(model, "own", depth=2)
    fedms_ext.deactivate(model, "other")
    return model, fedms_ext.expert_layers(model)


def versions(layers, count=len(COUNTS), rank=3):
    """Random pairs in the layers that apply the expert."""
    return [{name: (nn.Parameter(torch.randn(rank, layer.in_features)), nn.Parameter(torch.randn(layer.out_features, rank)))
             for name, layer in layers.items() if layer.applied} for _ in range(count)]


@pytest.mark.parametrize("name", ["bert", "llama", "chain"])
def test_each_version_is_the_model_with_that_expert_alone(name):
    model, layers = attached(name)
    own = versions(layers)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    weights = torch.randn_like(model.run())
    with ExpertBank(layers, "own", own).used(COUNTS):
        out = model.run()
    (out * weights).sum().backward()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())

    start = 0
    for version, count in zip(own, COUNTS):
        found = {layer: [p.grad for p in pair] for layer, pair in version.items()}
        if count == 0:
            assert all(grad is None for pair in found.values() for grad in pair)
            continue
        with torch.no_grad():
            for layer, (a, b) in version.items():
                layers[layer].lora_a["own"].copy_(a)
                layers[layer].lora_b["own"].copy_(b)
        rows = slice(start, start + count)
        model.zero_grad()
        alone = model.run()
        (alone[rows] * weights[rows]).sum().backward()
        torch.testing.assert_close(out[rows], alone[rows], rtol=1e-4, atol=1e-5)
        for layer, grads in found.items():
            wanted = layers[layer].lora_a["own"].grad, layers[layer].lora_b["own"].grad
            for grad, want in zip(grads, wanted):
                assert (grad - want).norm() <= 1e-4 * want.norm() + 1e-6, (layer, grad, want)
        start += count


def test_the_layers_get_their_own_experts_back_even_after_an_error():
    model, layers = attached("chain")
    before = model.run()
    bank = ExpertBank(layers, "own", versions(layers))
    with pytest.raises(ValueError, match="segments must be 3 numbers of samples, 3 in all"), bank.used((1, 1, 2)):
        model.run()
    assert torch.equal(model.run(), before)


def test_versions_that_do_not_fit_are_refused():
    _, layers = attached("chain")
    first, second = versions(layers, 2)
    removed = next(iter(second))
    del second[removed]
    with pytest.raises(ValueError, match=f"the versions of 'own' have pairs in different layers: \\['{removed}'\\]"):
        ExpertBank(layers, "own", [first, second])
    with pytest.raises(ValueError, match=r"version_0 of .*: A is \(2, 24\) and B \(48, 2\), expected \(3, 24\) and \(48, 3\)"):
        ExpertBank(layers, "own", versions(layers, 1, rank=2))
