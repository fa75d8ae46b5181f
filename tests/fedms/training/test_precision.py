"""`[run] dtype`: activations of 16 bits, and the scaling of fp16's gradients."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedms import data, models
from fedms.config import load_config
from fedms.data import ClientSplit
from fedms.data.subset import Subset
from fedms.errors import ConfigError
from fedms.federated.client import Client, ClientFailure, Message, Private
from fedms.federated.local_training import FIRST_SCALE, MOST_SKIPPED, Group, train
from fedms.runs.experiment import basis
from fedms.training import expert_model
from fedms.training.cache_key import origin
from fedms.training.expert_model import ExpertModel
from fedms_ext import budget

SETS = ["data.max_samples=40", 'model.targets=["fc1"]', "clients.count=1", "clients.unseen=0", "lora.rank=2", "stage1.batch=4",
        "stage1.epochs=1", "stage1.clip=0", "run.threads=1"]


def resident(*sets):
    config = load_config("digits", [*SETS, *sets])
    foundation = models.load(config.model)
    return ExpertModel(foundation, data.load(config.data, foundation), config)


def features(*sets):
    """Features and gradients of a trained expert on four samples, and the dtype of what a layer reads."""
    model = resident(*sets)
    tensors = model.initial(0)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=draw) / 4 if name.endswith("lora_b") else t for name, t in tensors.items()}
    model.load("global", tensors, depth=4, applied_depth=4)
    seen = []
    layer = next(iter(model.layers.values()))
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    opinion = model.opinion("global", Subset(torch.arange(4)), torch.arange(4))
    handle.remove()
    params = list(model.trainable("global").values())
    gradients = torch.autograd.grad(opinion.square().sum(), params)
    assert all(p.dtype == g.dtype == torch.float32 for p, g in zip(params, gradients))
    return opinion.detach(), gradients, seen[0]


def test_activations_have_the_dtype_and_all_else_is_float32():
    exact, right, seen = features("run.dtype=fp32")
    assert seen == torch.float32
    for dtype, kind, error in (("bf16", torch.bfloat16, 0.05), ("fp16", torch.float16, 0.01)):
        opinion, gradients, seen = features(f"run.dtype={dtype}")
        assert seen == kind and opinion.dtype == torch.float32
        assert 0 < float((opinion - exact).norm() / exact.norm()) < error
        for found, wanted in zip(gradients, right):
            assert float((found - wanted).norm() / wanted.norm()) < 3 * error


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_frozen_weights_are_held_in_16_bits_and_a_step_has_the_bits_of_autocast(dtype, kind, monkeypatch):
    held = features(f"run.dtype={dtype}")
    model, low = resident(f"run.dtype={dtype}"), set()
    for name, module in model.foundation.module.named_modules():
        for each, p in module.named_parameters(recurse=False):
            assert p.dtype == (kind if isinstance(module, nn.Linear) else torch.float32), f"{name}.{each}"
            low |= {name} if p.dtype == kind else set()
    assert low >= model.layers.keys() and len(low) > len(model.layers)      # those without pairs, too
    assert {p.dtype for part in (model.heads, model.gate) for p in part.parameters()} == {torch.float32}
    monkeypatch.setattr(expert_model, "hold_in_16_bits", lambda module, config: None)
    rounded = features(f"run.dtype={dtype}")
    assert torch.equal(held[0], rounded[0]) and held[2] == rounded[2] == kind
    assert all(torch.equal(found, wanted) for found, wanted in zip(held[1], rounded[1], strict=True))
    whole = budget.weight_bytes(resident(f"run.dtype={dtype}").foundation.module)
    layers = [module for module in model.foundation.module.modules() if isinstance(module, nn.Linear)]
    assert whole - model.foundation.weight_bytes == sum(p.nbytes for layer in layers for p in layer._parameters.values())


def test_a_format_that_is_that_of_the_activations_is_held_like_fp32_and_others_are_quantized():
    same, other = resident("run.dtype=bf16", "model.frozen=bf16"), resident("run.dtype=bf16", "model.frozen=int8")
    assert all(layer.frozen is None and layer.weight.dtype == torch.bfloat16 for layer in same.layers.values())
    assert {layer.frozen.kind for layer in other.layers.values()} == {"int8"}
    assert origin(same) == origin(resident("run.dtype=bf16"))
    kept = [resident(), other, same, resident("run.dtype=fp16"), resident("run.dtype=fp16", "model.frozen=bf16")]
    assert len({origin(model) for model in kept}) == len(kept)      # no cached value of one is taken for another's


def test_exact_aggregation_adds_to_weights_that_are_not_rounded():
    exact, mean = (load_config("digits", [*SETS, "run.dtype=bf16", f"run.method={method}"]) for method in ("fedex_lora", "fedavg"))
    assert all(layer.weight.dtype == torch.float32 for layer in resident("run.dtype=bf16", "run.method=fedex_lora").layers.values())
    assert basis(exact) != basis(mean)      # two runs that share no model


def test_weights_beyond_fp16_are_refused():
    config = load_config("digits", [*SETS, "run.dtype=fp16"])
    foundation = models.load(config.model)
    next(m for m in foundation.module.modules() if isinstance(m, nn.Linear)).weight.data[0, 0] = 1e5
    said = r"run.dtype: layers.0.attention.q_proj.weight has a value of magnitude 1e\+05, beyond the range of float16"
    with pytest.raises(ConfigError, match=said):
        ExpertModel(foundation, data.load(config.data, foundation), config)


class Trained:
    """One parameter on 40 samples in steps of 4, whose loss says what gradients it has."""

    def __init__(self, dtype, loss_of, count=40):
        config = load_config("digits", [*SETS, f"run.dtype={dtype}", "stage1.lr=0.5", "stage1.weight_decay=0"])
        rows = torch.arange(count)
        client = Client(ClientSplit(0, None, rows, rows[:0], rows[:0]), config)
        model = SimpleNamespace(device=torch.device("cpu"), config=config, task=SimpleNamespace(per_token=False),
                                count_units=lambda part, batch: len(batch))
        self.p, self.scales = torch.nn.Parameter(torch.zeros(1)), []
        self.p.register_hook(lambda gradient: self.scales.append(float(gradient)))
        message = Message("stage1", 1, (0,), 1, 1, {})
        self.loss, *_ = train(model, client, message, Private(), [Group({"p": self.p}, 0.5)], lambda _: lambda rows: loss_of(self))


def test_gradients_of_fp16_are_scaled_up_and_the_step_is_the_same():
    found, exact = (Trained(dtype, lambda t: t.p.sum()) for dtype in ("fp16", "fp32"))
    assert set(found.scales) == {FIRST_SCALE} and set(exact.scales) == {1.0}
    assert torch.equal(found.p, exact.p) and float(exact.p.detach()) < -1


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    most = 2.0**125     # times 256 it is no float32 any more

    def loss(t):
        return t.p.sum() * most if len(t.scales) < 4 else t.p.sum()

    trained = Trained("fp16", loss)
    assert trained.scales[:4] == [float("inf")] * 4
    assert trained.scales[4:] == [FIRST_SCALE / 16] * 6
    exact = Trained("fp32", lambda t: t.p.sum(), count=24)      # the six steps that were made
    assert torch.equal(trained.p, exact.p)


def test_a_visit_fails_where_every_step_overflows():
    with pytest.raises(ClientFailure, match=r"training diverged: loss 0, gradient norm inf after 0 samples; a lower stage1.lr may help"):
        Trained("fp16", lambda t: t.p.sqrt().sum(), count=4 * (MOST_SKIPPED + 2))
    with pytest.raises(ClientFailure, match="gradient norm inf"):
        Trained("bf16", lambda t: t.p.sqrt().sum(), count=4)     # nothing is scaled, so nothing is left out
