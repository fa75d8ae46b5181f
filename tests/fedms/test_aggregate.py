"""Averaging: against plain arithmetic in float64."""
from __future__ import annotations

import pytest
import torch

from fedms.aggregate import Residual, WeightedMean

LAYERS = ("block.0.query", "block.1.value")


def replies(clients=3, rank=2, n=5, k=7):
    """One dict a client: a LoRA pair for each layer, and a head."""
    return [{name: torch.randn(shape) for layer in LAYERS for name, shape in
             ((f"expert/{layer}.lora_a", (rank, k)), (f"expert/{layer}.lora_b", (n, rank)))}
            | {"head/weight": torch.randn(3, n)} for _ in range(clients)]


def test_the_mean_is_weighted():
    sent, weights = replies(), [10.0, 3.0, 7.0]
    mean = WeightedMean()
    for tensors, weight in zip(sent, weights):
        mean.add(tensors, weight)
    for name, value in mean.result().items():
        expected = sum(w * t[name].double() for w, t in zip(weights, sent)) / 20
        assert value.dtype == torch.float32 and torch.equal(value, expected.float()), name


def test_a_tensor_is_divided_by_the_weight_of_those_that_sent_it():
    deep, shallow = replies(2)
    shallow = {name: t for name, t in shallow.items() if "block.0" not in name}
    mean = WeightedMean()
    mean.add(deep, 30)
    mean.add(shallow, 10)
    result = mean.result()
    only_deep = "expert/block.0.query.lora_a"
    assert torch.equal(result[only_deep], deep[only_deep])
    assert torch.allclose(result["head/weight"], 0.75 * deep["head/weight"] + 0.25 * shallow["head/weight"])


def test_one_reply_comes_back_unchanged():
    (sent,) = replies(1)
    mean = WeightedMean()
    mean.add(sent, 0.1)
    assert all(torch.equal(mean.result()[name], t) for name, t in sent.items())


def test_refusals():
    mean = WeightedMean()
    mean.add({"a": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match=r"a: shape \(3,\) does not match \(2,\)"):
        mean.add({"a": torch.zeros(3)}, 1)
    for weight in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            mean.add({"a": torch.zeros(2)}, weight)


def test_the_residual_is_what_averaging_the_factors_loses():
    sent, weights = replies(4), [1.0, 2.0, 3.0, 4.0]
    residual = Residual()
    for tensors, weight in zip(sent, weights):
        residual.add(tensors, weight)
    lost = kept = 0.0
    for layer in LAYERS:
        a = [t[f"expert/{layer}.lora_a"].double() for t in sent]
        b = [t[f"expert/{layer}.lora_b"].double() for t in sent]
        mean = sum(w * y @ x for w, x, y in zip(weights, a, b)) / 10
        means = sum(w * y for w, y in zip(weights, b)) @ sum(w * x for w, x in zip(weights, a)) / 100
        kept += mean.square().sum()
        lost += (mean - means).square().sum()
    assert residual.norm() == pytest.approx(float((lost / kept).sqrt()), rel=1e-9)


def test_equal_clients_lose_nothing():
    (sent,) = replies(1)
    residual = Residual()
    for _ in range(3):
        residual.add(sent, 2.0)
    assert residual.norm() == pytest.approx(0, abs=1e-6)


def test_no_residual_without_pairs():
    residual = Residual()
    residual.add({"gate/out.weight": torch.ones(2)}, 1)
    assert residual.norm() is None
    residual.add({"expert/x.lora_a": torch.ones(1, 2), "expert/x.lora_b": torch.zeros(2, 1)}, 1)
    assert residual.norm() is None
