"""The language modelling task on a tiny model: opinions, gradients, mixtures and whole runs, against plain PyTorch."""
from __future__ import annotations

import math

import pytest
import tiny_language_models as tiny
import torch
from torch.nn import functional as F

from fedms import data, methods, models
from fedms.config import ConfigError
from fedms.data.subset import Subset
from fedms.federated.visit_costs import CostModel
from fedms.models.causal_lm import CausalModel
from fedms.runs import run
from fedms.storage.records import RunRecords, comparable
from fedms.training.both import both_opinions, mixed_opinions
from fedms.training.expert_model import ExpertModel
from fedms.training.layer_mixture import layer_mixture
from fedms_ext import budget

SETS = ["run.method=fedms", "clients.count=3", "stage1.rounds=2", "data.global_test=0", "stage1.batch=4", "stage2.batch=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_federation(tmp_path_factory.mktemp("language"), "abc", 20, lambda who, i: f"{who}{i % 3} {who * (1 + i % 4)}")


def config(folder, *sets):
    return tiny.configuration(folder, *SETS, *sets)


def loaded(folder, *sets) -> ExpertModel:
    settings = config(folder, *sets)
    foundation = models.load(settings.model, settings.task.kind)
    model = ExpertModel(foundation, data.load(settings.data, foundation), settings)
    fresh = model.initial(0)
    noise = torch.Generator().manual_seed(1)
    for expert in ("global", "local"):
        moved = {name: t + 0.1 * torch.randn(t.shape, generator=noise) for name, t in fresh.items()}
        model.load(expert, moved, depth=2, applied_depth=3)
    return model


def plain_log_p(model: ExpertModel, expert: str, part: Subset) -> torch.Tensor:
    """Log-probabilities (U, V) of each answer's tokens, one sample at a time, from all logits: LoRA by hand in float64."""
    found = []
    state = {name: t.double() for name, t in model.foundation.module.state_dict().items() if "lora_" not in name and "pairs" not in name}
    for name, layer in model.layers.items():
        state[f"{name}.weight"] = layer.weight.double() + layer.experts[expert].scale * (
            layer.lora_b[expert].double() @ layer.lora_a[expert].double())
    whole = tiny.whole().double()
    for index in part.indices.tolist():
        row = slice(int(model.dataset.inputs.offsets[index]), int(model.dataset.inputs.offsets[index + 1]))
        ids = model.dataset.inputs.fields["input_ids"][row]
        hidden = torch.func.functional_call(whole.model, state, (), {"input_ids": ids[None], "use_cache": False}).last_hidden_state
        start = int(model.dataset.answers[index])
        found.append((hidden[0, start - 1:-1] @ whole.lm_head.weight.T).log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("sets", [[], ["sal.cache=off"], ["head.chunk=3"]], ids=str)
def test_opinions_and_gradients_equal_plain_pytorch(folder, sets):
    model, part = loaded(folder, *sets), Subset(torch.tensor([3, 50, 7, 22]))
    rows = torch.tensor([2, 0, 3])
    targets = model.targets(part, rows)
    opinion = model.opinion("local", part, rows)
    loss = model.task.loss(opinion, targets)
    params = model.trainable("local")
    gradients = torch.autograd.grad(loss, list(params.values()))

    picked = Subset(part.indices[rows])
    log_p = plain_log_p(model, "local", picked)
    assert torch.equal(model.dataset.targets(picked.indices), targets)
    expected = F.nll_loss(log_p, targets)
    of = [model.layers[name.removeprefix("expert/").rpartition(".")[0]] for name in params]
    wanted = torch.autograd.grad(expected, [getattr(layer, name.rpartition(".")[2])["local"] for layer, name in zip(of, params)])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    size = torch.cat([w.flatten() for w in wanted]).norm()
    error = torch.cat([(g - w).flatten() for g, w in zip(gradients, wanted)]).norm()
    assert error / size < 1e-5
    torch.testing.assert_close(opinion[:, 1].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(opinion[:, 3].bool(), log_p.argmax(-1) == targets)


def test_the_units_of_a_part_follow_its_rows(folder):
    model, part = loaded(folder), Subset(torch.tensor([3, 50, 7]))
    every = model.targets(part)
    for rows in (torch.tensor([2, 0]), torch.tensor([1]), torch.arange(3)):
        assert torch.equal(every[model.units(part, rows)], model.targets(part, rows))
        assert model.count_units(part, rows) == len(model.targets(part, rows))
    text = model.foundation.tokenizer.decode(model.targets(part, torch.tensor([0])))
    assert text == "a0 aaaa<|end|>"


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_mixture_of_probabilities(folder, weight):
    model, part = loaded(folder), Subset(torch.arange(9))
    model.load("local", {**model.read("global"), **model.read_trained("local")}, depth=2, applied_depth=3)   # one prefix
    shared, own = both_opinions(model, part)
    for expert, together in (("global", shared), ("local", own)):
        model.forget_opinions()
        torch.testing.assert_close(together, model.opinions(expert, part), rtol=1e-4, atol=1e-4)
    weights = torch.tensor([1 - weight, weight]).expand(len(shared), 2)
    both = torch.stack([plain_log_p(model, e, part).exp() for e in ("global", "local")])
    p = (1 - weight) * both[0] + weight * both[1]
    targets = model.targets(part)
    expected = p.gather(1, targets[:, None]).squeeze(1).log()
    torch.testing.assert_close(model.task.mix(weights, shared, own, "probabilities")[:, 0].double(), expected, rtol=1e-4, atol=1e-4)
    whole, *alone, used = mixed_opinions(model, part, lambda units, *_: weights[units])
    assert all(map(torch.equal, alone, (shared, own))) and torch.equal(used, weights)
    torch.testing.assert_close(whole[:, 0].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole[:, 3].bool(), p.argmax(-1) == targets)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_mixture_of_logits(folder, weight):
    """Against all logits in float64, with the gradients of the weights and of the own expert's hidden states."""
    model, part = loaded(folder, "gate.on=logits"), Subset(torch.arange(9))
    shared, own = (model.opinions(e, part).requires_grad_() for e in ("global", "local"))
    targets = model.targets(part)
    weights = torch.tensor([1 - weight, weight]).repeat(len(shared), 1).requires_grad_()
    mixed = model.task.mix(weights, shared, own, "logits")
    assert mixed.shape == (len(targets), model.task.columns) and torch.equal(mixed[:, 4].long(), targets)
    got = torch.autograd.grad(model.task.loss(mixed, targets), [weights, own])

    wide = [t.detach().double().requires_grad_() for t in (weights, own)]
    matrix = model.foundation.head.weight.double()
    logits = wide[0][:, :1] * (shared[:, 5:].double() @ matrix.T) + wide[0][:, 1:] * (wide[1][:, 5:] @ matrix.T)
    loss = F.cross_entropy(logits, targets)
    for ours, theirs in zip(got, torch.autograd.grad(loss, wide)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert float(model.task.loss(mixed, targets).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.equal(model.task.right(mixed, targets), logits.argmax(-1) == targets)
    log_p = torch.stack([each[0, 5:].double() @ matrix.T for each in (shared, own)]).log_softmax(-1).float()
    hidden = torch.stack([shared[0, 5:], own[0, 5:]])
    torch.testing.assert_close(model.task.next_log_p(hidden, log_p, weights[0]), logits[0].log_softmax(-1).float(),
                               rtol=1e-4, atol=1e-4)


def mixed_in_layers(model: ExpertModel, part: Subset, weights: torch.Tensor, pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities (U, V) of each answer's tokens with the experts mixed by token in the top two of three blocks, one sample at
    a time, in float64. The positions before an answer take the weights (U, 2) of its first token; below is the global expert alone."""
    whole, found = tiny.whole().double(), []
    for index, own in zip(part.indices.tolist(), weights.split(model.dataset.units(part.indices).tolist())):
        inputs = model.dataset.inputs
        ids = inputs.fields["input_ids"][int(inputs.offsets[index]):int(inputs.offsets[index + 1])]
        start = int(model.dataset.answers[index])
        gate = torch.cat([own[:1].expand(start - 1, 2), own, own[-1:]])[None]

        def adapt(name, layer):
            def hook(_, args, out):
                said = [layer.experts[e].scale * args[0] @ pairs[f"{name}.lora_a.{e}"].T @ pairs[f"{name}.lora_b.{e}"].T
                        for e in ("global", "local")]
                return out + said[0] if layer.block == 1 else out + gate[..., :1] * said[0] + gate[..., 1:] * said[1]
            return whole.model.get_submodule(name).register_forward_hook(hook)
        handles = [adapt(name, layer) for name, layer in model.layers.items()]
        hidden = whole.model(input_ids=ids[None], use_cache=False).last_hidden_state
        found.append((hidden[0, start - 1:-1] @ whole.lm_head.weight.T).log_softmax(-1))
        for handle in handles:
            handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("gate", ["global", "local", "random"])
def test_mixing_inside_the_layers_by_token(folder, gate):
    """Against plain PyTorch, with the gradients of the gate's weights and of the local expert."""
    model, part = loaded(folder, "gate.mixing=layers"), Subset(torch.tensor([4, 30, 17]))
    model.load("global", model.read("global"), depth=0, applied_depth=3)
    rows, targets = torch.arange(3), model.targets(part)
    weights = torch.rand(len(targets), 2, generator=torch.Generator().manual_seed(3)) if gate == "random" else \
        torch.eye(2)[("global", "local").index(gate)].repeat(len(targets), 1)
    pairs = {f"{name}.{ab}.{e}": getattr(layer, ab)[e].detach().double().requires_grad_() for name, layer in model.layers.items()
             for ab in ("lora_a", "lora_b") for e in ("global", "local")}
    wide, narrow = weights.double().requires_grad_(), weights.clone().requires_grad_()
    log_p = mixed_in_layers(model, part, wide, pairs)
    loss = F.nll_loss(log_p, targets)
    params = model.trainable("local")
    mixture = layer_mixture(model, part, rows, narrow)
    found = torch.autograd.grad(model.task.loss(mixture, targets), [narrow, *params.values()])
    torch.testing.assert_close(mixture[:, 0].double(), log_p.gather(1, targets[:, None]).squeeze(1).detach(), rtol=1e-4, atol=1e-4)
    of = [pairs[f"{name.removeprefix('expert/')}.local"] for name in params]
    for got, wanted in zip(found, torch.autograd.grad(loss, [wide, *of])):
        assert float((got - wanted).norm()) <= 1e-4 * float(wanted.norm())      # both are 0 where the local expert has no weight


def test_a_line_about_the_data(folder):
    found = loaded(folder).dataset
    said = data.describe(found)
    assert said.endswith("; 3 groups of 20 samples each: a (20), b (20), c (20)") and "class" not in said
    tokens, learned = int(found.inputs.lengths.sum()), len(found.targets(torch.arange(60)))
    assert f"60 samples of {tokens:,} tokens, of which {learned:,} are learned" in said


@pytest.mark.parametrize("sets", [
    *[[f"run.method={m}"] for m in ("local", "fedavg", "fedavg_ft", "fedprox", "ditto", "apfl", "ffa_lora", "fedms", "fedms_plus")],
    ["gate.mixing=layers"], ["gate.weight=0.5"], ["gate.on=logits"], ["gate.on=logits", "run.method=apfl", "head.dtype=int8"],
    ["gate.on=logits", "run.method=fedms_plus"],
    ["model.frozen=int8_rotated", "head.dtype=int8_rotated", 'model.full_precision=["v_proj", "layers.2.mlp.down_proj"]'],
    ["data.template=plain", "data.group_by_length=false", "stage1.steps=3", "stage2.steps=1"], ["data.loss_on=all", "stage1.micro_batch=2"],
    ["run.method=fedms_plus", "plus.gate_on=training"], ["gate.features=final"]], ids=lambda sets: ",".join(sets))
def test_runs(folder, tmp_path, sets):
    summary = run.run(config(folder, *sets), tmp_path / "run")
    records = RunRecords.read(tmp_path / "run")
    assert all(visit["status"] == "ok" and math.isfinite(visit["loss"]) for visit in records.visits)
    language = summary["language"]
    assert language["perplexity"] == pytest.approx(math.exp(language["nats"])) and language["nats"] < language["nats_zero_shot"]
    assert "choice_accuracy" not in language
    assert language["tokens"] == sum(client["language"]["tokens"] for client in records.clients)
    for client in records.clients:
        assert all(0 <= value <= 1 for value in client["accuracy"].values() if value is not None)


@pytest.mark.parametrize("sets", [["sal.cache_dtype=bf16", "stage1.micro_batch=2"], ["gate.mixing=layers"]], ids=str)
def test_caches_do_not_change_the_bits(folder, tmp_path, monkeypatch, sets):
    """Samples have different lengths, and their batches are other ones than the chunks in which whole parts run."""
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    found = []
    for cache in ("memory", "disk", "off"):
        run.run(config(folder, f"sal.cache={cache}", *sets), tmp_path / cache)
        records = comparable(RunRecords.read(tmp_path / cache))
        found.append([[{k: v for k, v in line.items() if k != "flops"} for line in records[kind]]
                      for kind in ("rounds", "visits", "clients")])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("sets, message", [
    (["run.method=fedper"], "run.method: fedper is not for"), (["run.method=feddpa"], "it weighs whole samples"),
    (["run.method=fedavg_prior"], "it shifts class logits"),
    (["task.choices=1"], "task.choices: got 1, among which"), (["task.choices=2", "data.loss_on=all"], "without prompts"),
    (["task.choices=2", "privacy.mode=secure"], "no client reports its choices"),
    (["model.head=text"], "model.head"), (["data.name=digits"], "data.name"), (["model.id=minilm"], "model.id")])
def test_what_is_refused(folder, sets, message):
    with pytest.raises(ConfigError, match=message):
        config(folder, *sets)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_the_cost_model_counts_the_head(folder, tmp_path, cache):
    """One batch a visit, so that what is padded is the same in the plan and in the run."""
    settings = config(folder, f"sal.cache={cache}", "stage1.batch=100", "head.dtype=int8", "run.method=fedavg")
    model = loaded(folder, "head.dtype=int8")
    partition = data.partition(model.dataset, settings.data, settings.clients, settings.run.seed)
    costs = CostModel(model, methods.create(settings), settings, partition)
    work = costs.work(2, cache != "off")
    run.run(settings, tmp_path / "run")
    later, = [visit for visit in RunRecords.read(tmp_path / "run").visits
              if visit["stage"] == "stage1" and visit["round"] == 2 and visit["client"] == costs.largest.id]
    assert later["flops"] == work.flops
    head = model.foundation.head
    units = model.dataset.units
    assert work.flops > 2 * head.weight.numel() * (2 * units(costs.largest.train).sum() + units(costs.largest.validation).sum())
    tied = CausalModel("tied", tiny.whole("llama-tied"), tiny.tokenizer())
    assert model.foundation.weight_bytes == budget.weight_bytes(model.foundation.module) + head.weight.nbytes + head.quantized.nbytes
    assert tied.weight_bytes == budget.weight_bytes(tied.module)
