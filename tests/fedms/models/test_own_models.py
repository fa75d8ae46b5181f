"""Models that are not built in: every architecture attaches, trains at every depth, replays its prefix, saves, loads."""
from __future__ import annotations

import json
import time

import huggingface_hub
import numpy as np
import pytest
import saved_models
import torch
from PIL import Image

from fedms import models
from fedms.config import ModelTable, config_from_dict
from fedms.data import ImageInputs
from fedms.models import ModelError, ModuleModel, causal_lm
from fedms_ext import ConstantPrefix, LoRA, activate, attach, expert_layers, merge, prefix_depth

KINDS = [*saved_models.TEXT, *saved_models.IMAGES, "timm"]
TEXTS = ["the film was good", "bad", "a very plain photo of the dog and the cat"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return lambda kind: root / kind if (root / kind).is_dir() else saved_models.save(kind, root / kind)


def photos(n=3, size=(20, 24)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def load(kind, folder_of, **keys):
    if kind == "timm":
        return saved_models.given_as_object()
    return models.load(ModelTable(id=str(folder_of(kind)), **keys))


def batch_of(model):
    if model.reads == "text":
        inputs = model.tokenize(TEXTS, 10)
    else:
        prepared = model.prepare(photos())
        inputs = ImageInputs(prepared, model.image_tokens, "photos",
                             model.pixel_transform if prepared.dtype == torch.uint8 else None)
    return inputs.batch(torch.arange(3))


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_at_every_depth(kind, folder_of):
    model = load(kind, folder_of)
    batch, module = batch_of(model), model.module
    with torch.no_grad():
        plain = model.features(batch)
    assert plain.shape == (3, model.feature_dim) and plain.dtype == torch.float32
    assert (plain - plain[0]).abs().max() > 1e-4        # it sees its input
    assert model.width == saved_models.WIDTH and not any(p.requires_grad for p in module.parameters())

    attach(module, "all-linear", {"global": LoRA(2, 4)}, blocks=model.blocks)
    with torch.no_grad():
        assert torch.equal(model.features(batch), plain)
    for layer in expert_layers(module).values():
        torch.nn.init.normal_(layer.lora_b["global"], std=0.05)
    assert {layer.block for layer in expert_layers(module).values()} == set(range(1, saved_models.BLOCKS + 1))

    for depth in range(saved_models.BLOCKS + 1):
        activate(module, "global", depth=depth, applied_depth=saved_models.BLOCKS)
        whole = model.features(batch)
        prefix = ConstantPrefix(module)
        assert prefix.depth == prefix_depth(module) == saved_models.BLOCKS - depth
        if prefix.depth:
            hidden = prefix.capture(lambda: model.features(batch))
            tokens = batch["input_ids"].shape[1] if model.reads == "text" else model.image_tokens
            assert hidden.shape == (3, tokens, model.width)
            with prefix.replay(hidden):
                assert torch.equal(model.features(batch), whole)
        if depth:
            whole.square().sum().backward() if kind == "timm" else whole[:, 0].sum().backward()
        for name, layer in expert_layers(module).items():
            grads = [layer.lora_a["global"].grad, layer.lora_b["global"].grad]
            if layer.block <= saved_models.BLOCKS - depth:
                assert grads == [None, None], name
            else:
                assert all(torch.isfinite(g).all() for g in grads)
                assert any(g.abs().max() > 0 for g in grads) or layer.block == saved_models.BLOCKS, name
        module.zero_grad()
    merge(module, "global")
    assert torch.allclose(model.features(batch), whole, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "timm"])
def test_a_saved_model_is_the_same_when_loaded(kind, folder_of, tmp_path):
    model = load(kind, folder_of)
    model.save(tmp_path)
    again = models.load(ModelTable(id=str(tmp_path), pooling=model.pooling))
    assert again.fingerprint == model.fingerprint and again.blocks == model.blocks
    with torch.no_grad():
        assert torch.equal(again.features(batch_of(again)), model.features(batch_of(model)))


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_padding_does_not_change_a_text(kind, folder_of):
    model = load(kind, folder_of)
    inputs = model.tokenize(TEXTS, 10)
    with torch.no_grad():
        together = model.features(inputs.batch(torch.arange(3)))
        alone = torch.cat([model.features(inputs.batch(torch.tensor([i]))) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_a_token_that_only_the_tokenizer_has_is_told_and_may_pad(kind, folder_of):
    model = load(kind, folder_of)
    known = model.module.config.vocab_size
    fill = [f"<filler {i}>" for i in range(known - len(model.tokenizer))]
    model.tokenizer.add_tokens(fill)
    model.tokenizer.add_special_tokens({"pad_token": "<new padding>"})
    assert model.tokenizer.pad_token_id >= known
    batch = model.tokenize(["a", "a longer text"], 10).batch(torch.arange(2))
    assert int(batch["input_ids"].max()) < known and model.features(batch).isfinite().all()
    model.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="writes '<new>' as token .* call model.resize_token_embeddings"):
        model.tokenize(["a <new>"], 10)


@pytest.mark.parametrize("kind, own", [("bert", "mean"), ("llama", "last"), ("gemma", "last")])
def test_pooling(kind, own, folder_of):
    hidden = load(kind, folder_of).module(**batch_of(load(kind, folder_of))).last_hidden_state[1]
    expected = {"mean": hidden[:3].mean(0), "cls": hidden[0], "last": hidden[2]}      # <s> bad </s>, then padding
    for pooling in ("auto", *expected):
        model = load(kind, folder_of, pooling=pooling)
        want = expected[own if pooling == "auto" else pooling]
        assert torch.allclose(model.features(batch_of(model))[1], want / want.norm(), atol=1e-5), pooling


def test_a_sentence_encoders_own_pooling_is_found(folder_of, tmp_path):
    folder = saved_models.save("bert", tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert models.load(ModelTable(id=str(folder))).pooling == "cls"
    assert models.load(ModelTable(id=str(folder), pooling="mean")).pooling == "mean"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_towers_give_the_models_own_zero_shot_logits(kind, folder_of):
    """Against transformers alone: its processor, both towers, its logits."""
    import transformers

    model, folder = load(kind, folder_of), folder_of(kind)
    pair = transformers.AutoModel.from_pretrained(folder).eval()
    prompts = ["a photo of a cat", "the dog"]
    text = saved_models.tokenizer()(prompts, padding="max_length" if kind == "siglip" else True, truncation=True, max_length=12,
                                   return_tensors="pt")
    inputs = {"input_ids": text["input_ids"], **({} if kind == "siglip" else {"attention_mask": text["attention_mask"]})}
    images = saved_models.processor(kind)(photos(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = pair(pixel_values=images, **inputs).logits_per_image
        features = model.features(batch_of(model))
    got = features @ model.class_embeddings(tuple((p,) for p in prompts)).T / model.zero_shot_temperature
    bias = float(getattr(pair, "logit_bias", torch.zeros(1)).detach())
    assert torch.allclose(got + bias, want, atol=1e-4)
    assert not any("text" in name for name in expert_layers_of(model))


def expert_layers_of(model):
    return attach(model.module, ["q_proj", "v_proj"], {"global": LoRA(2, 2)}, blocks=model.blocks)


@pytest.mark.parametrize("kind", saved_models.IMAGES)
def test_images_are_prepared_as_the_models_processor_does(kind, folder_of):
    model = load(kind, folder_of)
    for images in (photos(), [image.convert("L") for image in photos()], [image.convert("RGBA") for image in photos()]):
        want = saved_models.processor(kind)([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        prepared = model.prepare(images)
        assert prepared.dtype == torch.uint8
        got = ImageInputs(prepared, model.image_tokens, "", model.pixel_transform).batch(torch.arange(3))["pixel_values"]
        assert torch.allclose(got, want, atol=1e-5)


# What cannot be loaded

def test_only_safetensors(tmp_path, folder_of):
    folder = saved_models.save("bert", tmp_path / "model")
    weights = models.load(ModelTable(id=str(folder))).module.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"(?s)holds no \*.safetensors.*pickle.*save_pretrained"):
        models.load(ModelTable(id=str(folder)))


def test_code_of_a_repository_is_not_run(tmp_path):
    folder = saved_models.save("bert", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({
        **config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="model.trust_remote_code = true"):
        models.load(ModelTable(id=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_id, message", [
    ("./nowhere", "is no folder"), ("a/b/c", "is no folder"), ("{empty}", "holds no config.json")])
def test_a_folder_that_is_no_model(model_id, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        models.load(ModelTable(id=model_id.format(empty=tmp_path)))


@pytest.mark.parametrize("language", [False, True])
def test_a_hub_id_without_a_network_is_answered_at_once(monkeypatch, language):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")     # where nobody listens
    load, start = causal_lm.load if language else models.load, time.monotonic()
    with pytest.raises(ModelError, match=r"'no-org/no-model' .* http://127.0.0.1:9 cannot be reached .*hf download no-org/no-model"):
        load(ModelTable(id="no-org/no-model"))
    assert time.monotonic() - start < 15        # huggingface_hub alone asks for 23 seconds
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the environment variable HF_HUB_OFFLINE is set"):
        load(ModelTable(id="no-org/no-model"))


def test_damaged_and_incomplete_folders(tmp_path):
    folder = saved_models.save("clip", tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded.*copy it again"):
        models.load(ModelTable(id=str(folder)))
    weights.write_bytes(whole)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="without a usable image processor.*image_processor.save_pretrained"):
        models.load(ModelTable(id=str(folder)))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="without a usable tokenizer"):
        models.load(ModelTable(id=str(folder)))


@pytest.mark.parametrize("keys, message", [
    ({"blocks": "nothing"}, "model.blocks: the model has no module 'nothing'"),
    ({"blocks": "embeddings"}, "model.blocks: 'embeddings' is a "),
    ({"pooling": "last"}, 'model.pooling: "last" is for text'),
])
def test_keys_that_do_not_fit_a_vision_model(keys, message, folder_of):
    with pytest.raises(ModelError, match=message):
        load("vit", folder_of, **keys)


def test_a_pair_of_towers_pools_itself(folder_of):
    with pytest.raises(ModelError, match="model.pooling: got 'cls', but .* pools its image tower itself"):
        load("clip", folder_of, pooling="cls")


def test_a_vision_model_embeds_no_prompts(folder_of):
    assert load("vit", folder_of).zero_shot_temperature is None
    with pytest.raises(ModelError, match="reads images, not text"):
        load("vit", folder_of).class_embeddings((("a cat",), ("a dog",)))


def test_what_a_module_must_say():
    with pytest.raises(ModelError, match="no list of blocks at 'layers'"):
        ModuleModel(saved_models.TimmViT(), blocks="layers", prepare=saved_models.pixels, features=lambda m, x: x)
    with pytest.raises(ModelError, match=r"expected float32 \(B, D\)"):
        ModuleModel(saved_models.TimmViT(), blocks="blocks", prepare=saved_models.pixels,
                    features=lambda m, x: m.forward_features(x["pixel_values"]))
    with pytest.raises(ModelError, match="one of prepare="):
        ModuleModel(saved_models.TimmViT(), blocks="blocks", features=lambda m, x: x)


@pytest.mark.parametrize("table, key", [
    ({"model": {"id": "minilmm"}}, "model.id"), ({"data": {"name": "sentimnt"}}, "data.name"),
    ({"model": {"pooling": "cls"}}, "model.pooling"), ({"data": {"client": "x"}}, "data.client"),
    ({"data": {"name": "my.csv", "path": "x"}}, "data.path"), ({"data": {"name": "my.csv", "prompt": "no"}}, "data.prompt"),
    ({"data": {"name": "my.csv", "classes": ["a", "a"]}}, "data.classes"),
])
def test_the_run_file_says_what_does_not_fit(table, key):
    with pytest.raises(ValueError) as caught:
        config_from_dict(table)
    assert [line.split(":")[0] for line in caught.value.problems] == [key]


def test_own_names_pass_the_run_file():
    config = config_from_dict({"model": {"id": "org/name", "head": "text"}, "data": {"name": "photos"}})
    assert config.model.id == "org/name" and config.data.name == "photos"
