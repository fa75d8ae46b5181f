"""`[model] frozen`: the same run on a quantized foundation model."""
from __future__ import annotations

import pytest
import torch

import fedms_ext
from fedms import data, models
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.errors import ConfigError
from fedms.training.expert_model import ExpertModel

SMALL = ["run.method=fedms", "data.max_samples=300", "clients.count=3", "clients.unseen=0", "stage1.rounds=2", "stage2.rounds=1",
         "data.partition=iid", "run.threads=1"]
# With the features of fp32. Exact arithmetic on the 4-bit weights gives 0.957 (nf4) and 0.984 (int4) for the worst of 300 samples.
COSINE = {"int8": 0.995, "int8_rotated": 0.995, "bf16": 0.9999, "fp16": 0.999999, "nf4": 0.95, "int4": 0.98}


def resident(frozen: str, *sets: str) -> ExpertModel:
    config = load_config("digits", [*SMALL, f"model.frozen={frozen}", *sets])
    foundation = models.load(config.model)
    return ExpertModel(foundation, data.load(config.data, foundation), config)


@pytest.mark.parametrize("frozen", COSINE)
def test_every_layer_is_quantized_and_gradients_flow_to_all_blocks(frozen):
    model = resident(frozen)
    model.initial(0)
    assert all(layer.frozen is not None for layer in model.layers.values())
    tensors = model.read("global")
    model.load("global", tensors, depth=model.blocks, applied_depth=model.blocks)
    part = Subset(torch.arange(20))
    model.opinion("global", part, torch.arange(20)).square().mean().backward()
    trained = model.trainable("global")
    assert all(p.grad is not None for p in trained.values())
    assert {model.block_of[name] for name in trained if name in model.block_of} == set(range(1, model.blocks + 1))


def test_some_layers_stay_in_full_precision():
    model = resident("int8", 'model.full_precision=["layers.0.mlp.fc1", "v_proj"]')
    kept = {name for name, layer in model.layers.items() if layer.frozen is None}
    assert kept == {name for name in model.layers if name.endswith(("layers.0.mlp.fc1", "v_proj"))} and 1 < len(kept) < len(model.layers)
    with pytest.raises(ConfigError, match="model.full_precision: no Linear layer's name ends in 'down'; their names end in"):
        resident("int8", 'model.full_precision=["down"]')


@pytest.mark.parametrize("frozen", COSINE)
def test_features_stay_close_to_those_of_fp32(frozen):
    config = load_config("digits", SMALL)
    exact = models.load(config.model)
    model, part = resident(frozen), Subset(torch.arange(40))
    want = exact.features(model.dataset.inputs.batch(part.indices))
    got = model.features(part)
    assert torch.nn.functional.cosine_similarity(got, want).min() > COSINE[frozen]


@pytest.mark.parametrize("frozen", COSINE)
def test_the_kernels_add_little_to_the_error_of_the_format(frozen):
    model, part = resident(frozen), Subset(torch.arange(40))
    got = model.features(part)
    model = resident(frozen)
    with fedms_ext.use_backend("eager"):  # the weights written out as float32, and x as it is
        exact = model.features(part)
    assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.999


def test_corrections_are_refused_by_a_quantized_layer():
    model = resident("int8")
    model.initial(0)
    name, layer = next(iter(model.layers.items()))
    with pytest.raises(ValueError, match="cannot be added to a quantized weight"):
        model.corrections.replace({f"correction/{name}": torch.zeros(layer.out_features, layer.in_features)})
    assert model.corrections.tensors == {}
