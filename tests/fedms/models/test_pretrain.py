"""Pretraining: both tasks learn, the same seed gives the same bits, weights are cached by their recipe."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fedms import models
from fedms.config import registry
from fedms.models import pretrain
from fedms.models import ModelError
from fedms.models.vit import RECIPES

TINY = replace(RECIPES["vit-digits-pretrained"], width=16, blocks=2, heads=2, epochs=3, batch=32)


def images(n=128):
    """Smooth and each of its own, so that what is hidden can be told from what is seen, and one from another."""
    small = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=8, mode="bilinear")


@pytest.mark.parametrize("task", ["mae", "views"])
def test_a_task_learns_and_repeats(task):
    losses = []
    recipe = replace(TINY, task=task, epochs=12)
    before = torch.get_rng_state()
    first = pretrain.pretrain(recipe, images(), lambda step, steps, loss: losses.append(loss))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(losses) == 12 * 4 and sum(losses[-4:]) < 0.95 * sum(losses[:4])
    again = pretrain.pretrain(replace(recipe, epochs=1), images())
    same = pretrain.pretrain(replace(recipe, epochs=1), images())
    assert all(torch.equal(again[name], same[name]) for name in again)
    assert any(not torch.equal(first[name], again[name]) for name in first)


def test_weights_are_made_once_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    name = "vit-digits-pretrained"
    monkeypatch.setitem(RECIPES, name, TINY)
    with pytest.raises(ModelError, match=f"not pretrained yet; run `fedms pretrain {name}`"):
        models.load(SimpleNamespace(id=name))
    file, made = pretrain.ensure(name)
    assert made and file.parent == tmp_path / "pretrained" and pretrain.ensure(name) == (file, False)
    model = models.load(SimpleNamespace(id=name))
    features = model.features({"pixel_values": images(5)})
    assert features.shape == (5, model.feature_dim) == (5, 64) and model.pretrained_on == "digits"
    assert TINY.weights(name) != replace(TINY, epochs=4).weights(name)

    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged weights"):
        models.load(SimpleNamespace(id=name))
    assert pretrain.ensure(name, force=True)[1] and models.load(SimpleNamespace(id=name)).fingerprint == model.fingerprint


def test_features_keep_where_things_are(tmp_path, monkeypatch):
    """Each quarter of the features is the mean over that quarter of the patches."""
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.setitem(RECIPES, "vit-digits-pretrained", TINY)
    pretrain.ensure("vit-digits-pretrained")
    model = models.load(SimpleNamespace(id="vit-digits-pretrained"))
    pixels = torch.rand(2, 1, 8, 8)
    tokens = model.module((pixels - TINY.mean) / TINY.std).last_hidden_state[:, 1:].view(2, 4, 4, 16)
    expected = torch.stack([tokens[:, r:r + 2, c:c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)], 2).flatten(1)
    assert torch.allclose(model.features({"pixel_values": pixels}), expected, atol=1e-6)


def test_the_command_line_names_the_models_that_there_are():
    assert set(registry.pretrained_models()) == set(RECIPES)
