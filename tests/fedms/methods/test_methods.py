"""One round of two clients for each method, against arithmetic that shares no code with it: weights W + s B A put into a
plain model, gradients by autograd, AdamW and the averages written out."""
from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedms import data, methods, models
from fedms.config import ConfigError, load_config, registry
from fedms.federated.client import Client, Private
from fedms.federated.server import Server
from fedms.training.expert_model import ExpertModel

# Query and key are left out: their gradients are so small here that rounding turns the sign of AdamW's steps.
SETS = ['model.targets=["v_proj", "o_proj", "fc1", "fc2"]',
        "data.max_samples=160", "clients.count=2", "clients.unseen=0", "data.partition=dirichlet", "data.alpha=1.0",
        "lora.rank=2", "lora.alpha=3.0", "sal.schedule=fixed", "sal.depth=2", "stage1.epochs=2", "stage1.batch=500",
        "stage1.clip=0", "stage2.epochs=2", "stage2.batch=500", "stage2.clip=0", "stage2.keep=last", "run.threads=1"]
SCALE = 3.0 / 2     # alpha / rank
LR = {"stage1": 0.01, "stage2": 0.005}      # those of the run file


@pytest.fixture(scope="module")
def world():
    return World()


class World:
    """The model under test, a plain one beside it, and two clients with tensors that are not those of a fresh start."""

    def __init__(self):
        config = load_config("digits", SETS)
        foundation = models.load(config.model)
        self.plain = PlainModel(models.load(config.model))
        self.dataset = data.load(config.data, foundation)
        self.model = ExpertModel(foundation, self.dataset, config)
        self.splits = data.partition(self.dataset, config.data, config.clients, 0).clients
        self.fresh = self.model.initial(0)
        self.shared = self.noisy(1)

    def noisy(self, seed):
        """The initial tensors, each moved: no B is zero, no two clients are alike."""
        noise = torch.Generator().manual_seed(seed)
        return {name: t + 0.05 * torch.randn(t.shape, generator=noise) for name, t in self.fresh.items()}

    def trained(self, tensors):
        """Those of the top two blocks, which are active, and the head."""
        top = {name for name, block in self.model.block_of.items() if block in self.model.order[:2]}
        return {name: t for name, t in tensors.items() if name in top or name.startswith("head/")}

    def round(self, method, stage="stage1", private=({}, {}), sets=(), shared=None):
        """One round: the replies, what clients keep, the server's state after it, and the method."""
        config = load_config("digits", [*SETS, f"run.method={method}", *sets])
        self.model.config = config
        self.model.start()
        made = methods.create(config)
        server = Server(config, self.model.order, self.model.block_of, made,
                        made.statistics(len(self.model.dataset.classes)))
        state = server.start(shared or self.shared)
        if stage == "stage2":
            state = type(state)(**{**vars(state), "stage": stage})
        message, collected, replies, kept = server.message(state), server.collect(), [], []
        for split, own in zip(self.splits, private):
            self.model.clear()
            reply, after = made.client_step(self.model, Client(split, config), Private(dict(own)), message)
            collected.add(reply)
            replies.append(reply.tensors)
            kept.append(after)
        state, record = server.step(state, collected)
        return Round(made, server, state, replies, kept, record)

    def cross_entropy(self, tensors, client):
        indices = self.splits[client].train
        return F.cross_entropy(self.plain.logits(tensors, self.dataset.inputs.batch(indices)), self.dataset.labels[indices])

    def averaged(self, per_client):
        sizes = [len(split.train) for split in self.splits]
        return {name: sum(n * t[name].double() for n, t in zip(sizes, per_client)).div(sum(sizes)).float()
                for name in per_client[0]}


class Round:
    def __init__(self, method, server, state, replies, kept, record):
        self.method, self.server, self.state = method, server, state
        self.replies, self.kept, self.record = replies, kept, record

    def predict(self, world, client, private=None):
        world.model.clear()
        part = Client(world.splits[client], self.method.config).test
        return self.method.predict(world.model, part, private or self.kept[client], self.server.message(self.state))


class PlainModel(nn.Module):
    """A foundation model without experts, whose weights are replaced for one forward pass."""

    def __init__(self, foundation):
        super().__init__()
        self.module, self.foundation = foundation.module, foundation

    def forward(self, inputs):
        return self.foundation.features(inputs)

    def features(self, inputs, products):
        """products: what is added to the weight (N, K) of each layer."""
        weights = {f"module.{layer}.weight": self.module.get_submodule(layer).weight + product
                   for layer, product in products.items()}
        return functional_call(self, weights, (inputs,))

    def logits(self, tensors, inputs):
        return F.linear(self.features(inputs, products(tensors)), tensors["head/weight"], tensors["head/bias"])


def products(tensors):
    layers = [name[len("expert/"):-len(".lora_a")] for name in tensors if name.endswith(".lora_a")]
    return {layer: SCALE * tensors[f"expert/{layer}.lora_b"] @ tensors[f"expert/{layer}.lora_a"] for layer in layers}


def adamw(start, loss, lr, steps=2):
    """AdamW without weight decay on all tensors of `start`, `loss` a function of them."""
    values = {name: t.clone() for name, t in start.items()}
    mean, square = ({name: torch.zeros_like(t) for name, t in start.items()} for _ in range(2))
    for t in range(1, steps + 1):
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
        for (name, value), g in zip(leaves.items(), gradients):
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g ** 2
            step = mean[name] / (1 - 0.9 ** t) / ((square[name] / (1 - 0.999 ** t)).sqrt() + 1e-8)
            values[name] = value.detach() - (lr if isinstance(lr, float) else lr(name)) * step
    return values


def same(got, want, start):
    """Whether the changes from `start` agree, tensor by tensor."""
    assert got.keys() == want.keys()
    for name in want:
        moved = (want[name] - start[name]).norm()
        assert moved > 0 and (got[name] - want[name]).norm() < 0.02 * moved, name


def fedavg(world, client, keep=lambda name: False, extra=lambda own: 0.0, start=None):
    start = world.trained(world.shared) if start is None else start
    fixed = {name: t for name, t in start.items() if keep(name)}
    moving = {name: t for name, t in start.items() if not keep(name)}
    return adamw(moving, lambda own: world.cross_entropy({**fixed, **own}, client) + extra(own), LR["stage1"])


def distance(own, anchors):
    return sum((own[name] - anchors[name]).square().sum() for name in own)


def test_fedavg(world):
    done, want = world.round("fedavg"), [fedavg(world, client) for client in (0, 1)]
    for client in (0, 1):
        same(done.replies[client], want[client], world.shared)
    after = {name: done.state.tensors[name] for name in want[0]}
    same(after, world.averaged(want), world.shared)
    untouched = set(world.shared) - set(want[0])
    assert all(torch.equal(done.state.tensors[name], world.shared[name]) for name in untouched)


def test_local(world):
    own = [world.trained(world.noisy(2 + client)) for client in (0, 1)]
    done = world.round("local", private=own)
    for client in (0, 1):
        assert done.replies[client] == {}
        same(done.kept[client].tensors, fedavg(world, client, start=own[client]), own[client])


def test_fedprox(world):
    done = world.round("fedprox", sets=["fedprox.mu=3.0"])
    anchors = world.trained(world.shared)
    for client in (0, 1):
        want = fedavg(world, client, extra=lambda own: 1.5 * distance(own, anchors))
        same(done.replies[client], want, world.shared)
        free = fedavg(world, client)
        assert distance(want, anchors) < distance(free, anchors)


def test_fedavg_prior(world):
    done = world.round("fedavg_prior")
    counts = [torch.bincount(world.dataset.labels[split.train], minlength=10).double() for split in world.splits]
    assert torch.equal(done.state.statistics["class_counts"], counts[0] + counts[1])
    everybody = (counts[0] + counts[1] + 1) / (sum(counts).sum() + 10)
    for client in (0, 1):
        prediction = done.predict(world, client)
        shift = ((counts[client] + 1) / (counts[client].sum() + 10) / everybody).log()
        assert torch.allclose(prediction.personalized - prediction.global_, shift.float().expand(len(prediction.global_), 10),
                              atol=1e-5)


def test_fedper(world):
    heads = [{name: t for name, t in world.noisy(2 + client).items() if name.startswith("head/")} for client in (0, 1)]
    done = world.round("fedper", private=heads)
    trained = []
    for client in (0, 1):
        start = {**world.trained(world.shared), **heads[client]}
        trained.append(fedavg(world, client, start=start))
        body, head = parts(trained[-1])
        same(done.replies[client], body, start)
        same(done.kept[client].tensors, head, start)
    body = world.averaged([parts(t)[0] for t in trained])
    same({name: done.state.tensors[name] for name in body}, body, world.shared)
    inputs = world.dataset.inputs.batch(world.splits[0].test)
    want = world.plain.logits({**body, **parts(trained[0])[1]}, inputs)
    assert torch.allclose(done.predict(world, 0).personalized, want, atol=0.02)


def parts(tensors):
    return ({n: t for n, t in tensors.items() if n.startswith("expert/")},
            {n: t for n, t in tensors.items() if n.startswith("head/")})


def test_fedrep(world):
    heads = [parts(world.noisy(2 + client))[1] for client in (0, 1)]
    done = world.round("fedrep", private=heads, sets=["fedrep.head_epochs=3"])
    body = parts(world.trained(world.shared))[0]
    for client in (0, 1):
        head = adamw(heads[client], lambda own: world.cross_entropy({**body, **own}, client), LR["stage1"], steps=3)
        same(done.kept[client].tensors, head, heads[client])
        same(done.replies[client], adamw(body, lambda own: world.cross_entropy({**head, **own}, client), LR["stage1"]), body)


def test_ditto(world):
    own = [world.trained(world.noisy(2 + client)) for client in (0, 1)]
    done = world.round("ditto", private=own, sets=["ditto.pull=2.0"])
    anchors = world.trained(world.shared)
    for client in (0, 1):
        same(done.replies[client], fedavg(world, client), world.shared)
        want = fedavg(world, client, start=own[client], extra=lambda v: 1.0 * distance(v, anchors))
        same(done.kept[client].tensors, want, own[client])


def test_apfl(world):
    own = [world.trained(world.noisy(2 + client)) for client in (0, 1)]
    done = world.round("apfl", private=own, sets=["apfl.alpha=0.3", "apfl.lr=0.02"])
    for client in (0, 1):
        same(done.replies[client], fedavg(world, client), world.shared)
        indices = world.splits[client].train
        inputs, labels = world.dataset.inputs.batch(indices), world.dataset.labels[indices]
        theirs = world.plain.logits(world.trained(world.shared), inputs).detach()

        def loss(v):
            alpha = 1 / (1 + (-v["apfl/alpha"]).exp())
            mine = world.plain.logits({n: t for n, t in v.items() if n != "apfl/alpha"}, inputs)
            return F.cross_entropy(alpha * mine + (1 - alpha) * theirs, labels)
        start = {**own[client], "apfl/alpha": torch.tensor(0.3 / 0.7).log()}
        want = adamw(start, loss, lambda name: 0.02 if name == "apfl/alpha" else LR["stage1"])
        same(done.kept[client].tensors, want, start)
    prediction, alpha = done.predict(world, 0), done.kept[0].tensors["apfl/alpha"].sigmoid()
    assert torch.allclose(prediction.personalized, alpha * prediction.local + (1 - alpha) * prediction.global_, atol=1e-5)


def test_ffa_lora(world):
    drawn = {**world.shared, **{name: t for name, t in world.fresh.items() if name.endswith(".lora_a")}}
    done = world.round("ffa_lora", shared=drawn)
    start = world.trained(drawn)
    want = [fedavg(world, client, keep=lambda name: name.endswith(".lora_a"), start=start) for client in (0, 1)]
    for client in (0, 1):
        same(done.replies[client], want[client], start)
    mean = world.averaged(want)
    same({name: done.state.tensors[name] for name in mean}, mean, start)
    sent = done.server.message(done.state).tensors
    assert not any(name.endswith(".lora_a") for name in sent) and set(mean) == set(sent)
    for layer, product in products({**start, **mean}).items():      # nothing is lost
        each = [products({**start, **tensors})[layer] for tensors in want]
        assert torch.allclose(product, world.averaged([{"p": p} for p in each])["p"], atol=1e-6)


def test_fedsa_lora(world):
    own = [{name: t for name, t in world.trained(world.noisy(2 + client)).items() if not name.endswith(".lora_a")}
           for client in (0, 1)]
    done = world.round("fedsa_lora", private=own)
    trained = []
    for client in (0, 1):
        start = {**world.trained(world.shared), **own[client]}
        trained.append(fedavg(world, client, start=start))
        shares = {name: t for name, t in trained[-1].items() if name.endswith(".lora_a")}
        same(done.replies[client], shares, start)
        same(done.kept[client].tensors, {n: t for n, t in trained[-1].items() if n not in shares}, start)
    mean = world.averaged([{n: t for n, t in each.items() if n.endswith(".lora_a")} for each in trained])
    same({name: done.state.tensors[name] for name in mean}, mean, world.shared)


def test_fedex_lora(world):
    done, want = world.round("fedex_lora"), [fedavg(world, client) for client in (0, 1)]
    mean = world.averaged(want)
    same({name: done.state.tensors[name] for name in mean}, mean, world.shared)
    ideal = world.averaged([products(tensors) for tensors in want])      # the mean of the products
    for layer, product in ideal.items():
        lost = product - products(mean)[layer]
        assert (done.state.tensors[f"correction/{layer}"] - lost).norm() < 0.02 * lost.norm(), layer
    assert done.record["residual_norm"] > 0
    inputs = world.dataset.inputs.batch(world.splits[0].test)
    logits = F.linear(world.plain.features(inputs, ideal), mean["head/weight"], mean["head/bias"])
    assert torch.allclose(done.predict(world, 0).personalized, logits, atol=0.02)
    # The frozen weights themselves are as they were: the foundation model alone, and the next method, do not see it.
    before = world.plain.features(inputs, {})
    assert torch.allclose(world.model.features(Client(world.splits[0], done.method.config).test), before, atol=1e-4)


@pytest.fixture
def example(monkeypatch):
    """Imports a method of the folder examples, which is registered until the test ends."""
    kept = dict(registry.METHODS.rows)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))

    def imported(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)
    yield imported
    registry.METHODS.rows.clear()
    registry.METHODS.rows.update(kept)


def test_legend_has_ranks_that_rise_to_the_output_and_keeps_them(world, example):
    legend = example("legend")
    assert [legend.rank_of(block, 12, 8) for block in range(1, 13)] == [1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8]
    made = methods.create(load_config("digits", [*SETS, "run.method=legend"]))
    done, blocks = world.round("legend", sets=["sal.schedule=all"], shared=made.initial(world.model)), max(world.model.block_of.values())
    assert {legend.rank_of(block, blocks, 2) for block in world.model.block_of.values()} == {1, 2}
    for name, block in world.model.block_of.items():
        tensor = done.state.tensors[name] if name.endswith("lora_a") else done.state.tensors[name].T
        assert tensor.any(1).tolist() == [i < legend.rank_of(block, blocks, 2) for i in range(2)], name


def test_fedquad_keeps_a_third_of_the_bytes_and_nearly_the_gradient(world, example, monkeypatch):
    fedquad, sets = example("fedquad"), ["sal.schedule=all", "stage1.epochs=1"]
    values, scale = fedquad.quantize(torch.tensor([[0.3, -2.54, 1.0], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[15, -127, 50], [0, 0, 0]] and scale[0].item() == pytest.approx(0.02)

    model, part = world.model, Client(world.splits[0], world.model.config).train
    rows, sizes, gradients, quantize = torch.arange(len(part)), [], [], fedquad.quantize

    def measured(tensor):
        values, scale = quantize(tensor)
        sizes.append((tensor.nbytes, values.nbytes + scale.nbytes))
        return values, scale
    monkeypatch.setattr(fedquad, "quantize", measured)
    model.load("global", world.shared, depth=model.blocks, applied_depth=model.blocks)
    module = model.foundation.module
    for context in (nullcontext(), fedquad.int8_activations([*module.parameters(), *module.buffers()])):
        with context:
            loss = model.task.loss(model.opinion("global", part, rows), model.targets(part, rows))
        gradients.append(torch.autograd.grad(loss, list(model.trainable("global").values())))
    assert sum(after for _, after in sizes) < sum(before for before, _ in sizes) / 3
    for exact, found in zip(*gradients):
        assert 0 < (found - exact).norm() < 0.05 * exact.norm()

    sizes.clear()
    exact, found = world.round("fedavg", sets=sets), world.round("fedquad", sets=sets)
    for name, tensor in exact.replies[0].items():       # AdamW's first step is as large where the sign of a tiny gradient turned
        assert (found.replies[0][name] - tensor).norm() < 0.25 * (tensor - world.shared[name]).norm(), name
    assert sizes


def test_flexlora(world):
    """Ranks by device: one client trains the first component of each pair alone. The server has the best pair of rank 2 to the mean
    of the products."""
    sets = ["clients.budgets=[{share=0.5, rank=1}, {share=0.5}]"]
    done = world.round("flexlora", sets=sets)
    config = load_config("digits", [*SETS, "run.method=flexlora", *sets])
    ranks = [Client(split, config).device.max_rank for split in world.splits]
    assert sorted(ranks, key=str) == [1, None]
    want = []
    for client, rank in enumerate(ranks):
        start = {name: t.clone() for name, t in world.trained(world.shared).items()}
        for name, tensor in start.items():
            (tensor if name.endswith("lora_a") else tensor.T if name.endswith("lora_b") else tensor[:0])[rank or 2:] = 0
        want.append(adamw(start, lambda v: world.cross_entropy(v, client), LR["stage1"]))
        same(done.replies[client], want[-1], start)
    mean = world.averaged([products(tensors) for tensors in want])
    for layer, product in products({**world.shared, **{n: done.state.tensors[n] for n in want[0]}}).items():
        if layer in mean:
            u, s, v = torch.linalg.svd(mean[layer].double())
            assert torch.allclose(product.double(), (u[:, :2] * s[:2]) @ v[:2], atol=2e-3 * float(s[0])), layer
            a = done.state.tensors[f"expert/{layer}.lora_a"].double()
            assert torch.allclose(a @ a.T, torch.eye(2, dtype=torch.float64), atol=1e-5)


def test_fed_sb(world):
    made = methods.create(load_config("digits", [*SETS, "run.method=fed_sb"]))
    noise = torch.Generator().manual_seed(3)
    shared = {name: t + 0.05 * torch.randn(t.shape, generator=noise) if not name.endswith("lora_a") else t
              for name, t in made.initial(world.model).items()}
    shared |= {name: t + 0.3 * torch.eye(2) for name, t in shared.items() if name.endswith("lora_b")}
    whole = world.trained(made.assembled(world.model, shared))
    frames = {}
    for name, core in world.trained(shared).items():
        if name.endswith("lora_b"):
            frames[name] = (whole[name].double() @ core.double().inverse()).float()
            assert core.shape == (2, 2) and torch.allclose(frames[name].T @ frames[name], torch.eye(2), atol=1e-4)
    done = world.round("fed_sb", shared=shared)

    def loss(values, client):
        return world.cross_entropy({**whole, **values, **{n: frame @ values[n] for n, frame in frames.items()}}, client)
    start = {name: t for name, t in world.trained(shared).items() if not name.endswith("lora_a")}
    want = [adamw(start, lambda v: loss(v, client), LR["stage1"]) for client in (0, 1)]
    for client in (0, 1):
        same(done.replies[client], want[client], start)
    mean = world.averaged(want)
    same({name: done.state.tensors[name] for name in mean}, mean, start)
    inputs = world.dataset.inputs.batch(world.splits[0].test)
    logits = world.plain.logits({**whole, **mean, **{n: frame @ mean[n] for n, frame in frames.items()}}, inputs)
    assert torch.allclose(done.predict(world, 0).personalized, logits, atol=0.02)


def test_fedavg_ft(world):
    own = [world.trained(world.noisy(2 + client)) for client in (0, 1)]
    done = world.round("fedavg_ft", stage="stage2", private=own)
    for client in (0, 1):
        assert done.replies[client] == {}
        want = adamw(own[client], lambda v: world.cross_entropy(v, client), LR["stage2"])
        same(done.kept[client].tensors, want, own[client])


def test_feddpa(world):
    done = world.round("feddpa", stage="stage2", sets=["feddpa.scale=0.7", "feddpa.samples=3"])
    start = world.trained(world.shared)
    want = adamw(start, lambda v: world.cross_entropy(v, 0), LR["stage2"])
    kept = done.kept[0].tensors
    references = kept["feddpa/references"]
    same({name: kept[name] for name in want}, want, start)
    train = world.plain.features(world.dataset.inputs.batch(world.splits[0].train), {})
    assert references.shape == (3, 64) and all((train - row).norm(dim=1).min() < 1e-3 for row in references)
    prediction = done.predict(world, 0)
    for row, index in enumerate(world.splits[0].test[:4]):
        inputs = world.dataset.inputs.batch(index.view(1))
        feature = world.plain.features(inputs, {})
        weight = (0.7 * F.cosine_similarity(feature, references).mean()).clamp(0, 1)
        mixed = {layer: (1 - weight) * product + weight * products(want)[layer] for layer, product in products(start).items()}
        feature = world.plain.features(inputs, mixed)
        logits = sum(w * F.linear(feature, t["head/weight"], t["head/bias"]) for w, t in ((1 - weight, start), (weight, want)))
        assert torch.allclose(prediction.weights[row, 1], weight, atol=1e-4)
        assert torch.allclose(prediction.personalized[row], logits[0], atol=0.02)


def gate_by_hand(gate, features):
    h = (features - features.mean(1, keepdim=True)) / (features.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h * gate["gate/norm.weight"] + gate["gate/norm.bias"]
    inner = h @ gate["gate/down.weight"].T + gate["gate/down.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / 2 ** 0.5))
    h = h + inner @ gate["gate/up.weight"].T + gate["gate/up.bias"]
    return (h @ gate["gate/out.weight"].T + gate["gate/out.bias"]).softmax(1)


@pytest.mark.parametrize("training", ["aggregated", "private", "fixed"])
def test_fedms(world, training):
    own = [world.trained(world.noisy(2 + client)) for client in (0, 1)]
    gates = [{name: t for name, t in world.noisy(5 + client).items() if name.startswith("gate/")} for client in (0, 1)]
    sets = {"aggregated": [], "private": ["gate.training=private"], "fixed": ["gate.weight=0.25"]}[training]
    private = [{**o, **g} if training == "private" else o for o, g in zip(own, gates)]
    done = world.round("fedms", stage="stage2", private=private, sets=["gate.lr=0.003", "stage2.own_loss=0.5", *sets])
    sent = {name: t for name, t in world.shared.items() if name.startswith("gate/")}
    trained, losses = [], []
    for client in (0, 1):
        indices = world.splits[client].train
        inputs, labels = world.dataset.inputs.batch(indices), world.dataset.labels[indices]
        theirs = world.plain.logits(world.trained(world.shared), inputs).detach()
        features = world.plain.features(inputs, {})
        gate = {"aggregated": sent, "private": gates[client], "fixed": {}}[training]

        def loss(values):
            mine = world.plain.logits(parts(values)[0] | parts(values)[1], inputs)
            weights = gate_by_hand(values, features) if gate else torch.tensor([[0.75, 0.25]])
            mixed = weights[:, :1] * theirs + weights[:, 1:] * mine
            value = F.cross_entropy(mixed, labels) + 0.5 * F.cross_entropy(mine, labels)
            losses[-1].append(float(value.detach()))
            return value
        start = {**own[client], **gate}
        losses.append([])
        want = adamw(start, loss, lambda name: 0.003 if name.startswith("gate/") else LR["stage2"])
        trained.append({name: want[name] for name in gate})
        kept = want if training == "private" else {name: want[name] for name in own[client]}
        same(done.kept[client].tensors, kept, start)
        same(done.replies[client], trained[-1] if training == "aggregated" else {}, start)
    counts = [len(world.splits[client].train) for client in (0, 1)]
    mean_loss = sum(n * sum(values) / len(values) for n, values in zip(counts, losses)) / sum(counts)
    assert done.record["loss"] == pytest.approx(mean_loss / 1.5, rel=1e-4)      # comparable with that of a single expert
    if training == "aggregated":
        mean = world.averaged(trained)
        same({name: done.state.tensors[name] for name in mean}, mean, world.shared)


def test_methods_with_private_heads_need_a_linear_one():
    for method in ("fedper", "fedrep"):
        with pytest.raises(ConfigError, match=f"model.head: {method} gives each client a head of its own"):
            load_config("sentiment", [f"run.method={method}", "model.head=text"])


def test_rules_that_do_not_fit_are_refused():
    for sets, words in {
        ("run.method=fedavg", "clients.budgets=[{share=1, rank=2}]"): "rank: is for the method flexlora; fedavg trains all",
        ("run.method=flexlora", "clients.budgets=[{share=1, rank=9}]"): "rank: got 9, above lora.rank = 4",
        ("run.method=fed_sb", "aggregate.rule=exact"): "what fed_sb averages are no pairs",
        ("run.method=ffa_lora", "aggregate.rule=mean"): 'ffa_lora is the method of the rule "freeze_a"',
        ("run.method=fedsa_lora", "aggregate.rule=exact"): "needs B to be shared",
        ("run.method=fedex_lora", "model.frozen=int8"): 'set model.frozen to "fp32"',
        ("aggregate.rule=krum", "aggregate.byzantine=2"): "krum needs 7 replies a round, and 6 clients are sampled",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_config("digits", sets)
