"""Averaging: against plain arithmetic in float64."""
from __future__ import annotations

import pytest
import torch

from hypothesis import given, settings
from hypothesis import strategies as st

from fedms.federated.aggregation import Residual, WeightedMean, krum, median, trimmed_mean

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


@pytest.mark.parametrize("clients", [2, 4])      # their rank-one terms are fewer, and more, than rows and columns
def test_the_residual_is_what_averaging_the_factors_loses(clients):
    sent, weights = replies(clients), [1.0, 2.0, 3.0, 4.0][:clients]
    total = sum(weights)
    residual = Residual()
    for tensors, weight in zip(sent, weights):
        residual.add(tensors, weight)
    lost = kept = 0.0
    for layer in LAYERS:
        a = [t[f"expert/{layer}.lora_a"].double() for t in sent]
        b = [t[f"expert/{layer}.lora_b"].double() for t in sent]
        mean = sum(w * y @ x for w, x, y in zip(weights, a, b)) / total
        means = sum(w * y for w, y in zip(weights, b)) @ sum(w * x for w, x in zip(weights, a)) / total**2
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


# Properties that hold for any replies

ROUNDS = st.tuples(st.integers(1, 6), st.integers(0, 2**31))     # clients, and the seed of what they send


def drawn(round):
    """Replies and weights; some clients send one layer only."""
    clients, seed = round
    torch.manual_seed(seed)
    sent = replies(clients)
    shallow = [i for i in range(1, clients) if torch.rand(()) < 0.4]
    return ([{n: t for n, t in r.items() if i not in shallow or LAYERS[0] not in n} for i, r in enumerate(sent)],
            (torch.rand(clients) * 100 + 1).tolist())


def mean(sent, weights):
    total = WeightedMean()
    for tensors, weight in zip(sent, weights):
        total.add(tensors, weight)
    return total.result()


def exact(sent, weights, scale=2.0):
    """What the server has: the means, and the corrections beside the frozen weights."""
    lost, means = Residual(), mean(sent, weights)
    for tensors, weight in zip(sent, weights):
        lost.add(tensors, weight)
    return {**means, **lost.corrections(means, scale)}


RULES = {"mean": mean, "exact": exact, "median": lambda sent, _: median(sent),
         "trimmed_mean": lambda sent, _: trimmed_mean(sent, 0.2),
         "krum": lambda sent, _: krum(sent, {n: torch.zeros_like(t) for n, t in replies(1)[0].items()}, 1)}


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n].double(), b[n].double(), atol=1e-5) for n in a)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(round=ROUNDS)
def test_the_order_of_clients_does_not_matter(rule, round):
    if rule == "krum":          # with one neighbor, the nearest two are as near to each other
        round = (max(5, round[0]), round[1])
    sent, weights = drawn(round)
    order = torch.randperm(len(sent)).tolist()
    assert close(RULES[rule](sent, weights), RULES[rule]([sent[i] for i in order], [weights[i] for i in order]))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(round=ROUNDS, factor=st.floats(1e-3, 1e3))
def test_the_scale_of_weights_does_not_matter(rule, round, factor):
    sent, weights = drawn(round)
    assert close(RULES[rule](sent, weights), RULES[rule](sent, [w * factor for w in weights]))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), weight=st.floats(0.1, 1e6))
def test_one_client_is_taken_as_it_is(rule, seed, weight):
    (sent,), _ = drawn((1, seed))
    got = RULES[rule]([sent], [weight])
    assert all(torch.equal(got[name], t) for name, t in sent.items())
    assert all(t.abs().max() < 1e-6 for name, t in got.items() if name not in sent)


@settings(max_examples=20, deadline=None)
@given(round=ROUNDS)
def test_exact_is_the_mean_of_the_products(round):
    sent, weights = drawn(round)
    got = exact(sent, weights, scale=2.0)
    for layer in LAYERS:
        pairs = [(w, r[f"expert/{layer}.lora_b"].double() @ r[f"expert/{layer}.lora_a"].double())
                 for w, r in zip(weights, sent) if f"expert/{layer}.lora_a" in r]
        want = sum(w * product for w, product in pairs) / sum(w for w, _ in pairs)
        done = 2.0 * got[f"expert/{layer}.lora_b"].double() @ got[f"expert/{layer}.lora_a"].double()
        assert torch.allclose(done + got[f"correction/{layer}"], 2.0 * want, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_hostile_reply_does_not_get_through(seed):
    sent, weights = drawn((6, seed))
    hostile = [*sent[:-1], {name: torch.full_like(t, 1e6) for name, t in sent[0].items()}]
    name = "head/weight"
    honest = torch.stack([r[name] for r in hostile[:-1]])
    for rule in ("median", "trimmed_mean", "krum"):
        got = RULES[rule](hostile, weights)[name]
        assert (got <= honest.amax(0) + 1e-6).all() and (got >= honest.amin(0) - 1e-6).all(), rule
    assert mean(hostile, weights)[name].max() > 100


def test_median_and_trimmed_mean_of_few_values():
    sent = [{"x": torch.tensor([float(v)])} for v in (1, 2, 4, 8, 1000)]
    assert median(sent)["x"].item() == 4 and median(sent[:4])["x"].item() == 3
    assert trimmed_mean(sent, 0.2)["x"].item() == pytest.approx(14 / 3)
    assert trimmed_mean(sent, 0.19)["x"].item() == pytest.approx(203)


def test_krum_takes_what_a_client_did_not_send_as_unchanged():
    current = {"x": torch.zeros(1), "y": torch.zeros(1)}
    sent = [{"x": torch.tensor([0.1])}, {"x": torch.tensor([0.0]), "y": torch.tensor([0.1])},
            {"x": torch.tensor([0.2]), "y": torch.tensor([9.0])}, {"x": torch.tensor([-0.1]), "y": torch.tensor([0.0])}]
    assert krum(sent, current, 1) == sent[0] or krum(sent, current, 1) == sent[1]
