"""When is a mixture worth more than its better expert? Ideas for the private expert and for the gate, tried on a stand-in that trains
in seconds: both experts are adapters of rank 8 with a head on MiniLM's frozen sentence features, and all clients of a setting train
at once. Clients hold sentences that no run of the study sees, and seeds count from 100.

    python -m bench.accuracy.mixture --seeds 10       # the table of docs/evidence/mixture.md; features take a minute, a seed twenty seconds

What holds here need not hold for LoRA inside the blocks; it is a sieve. A difference is one of seeds' means, with a 95 % interval.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.config import load_config
from fedms.data import sentiment
from fedms.data.dataset import stratified_sample
from fedms.data.subset import Subset
from fedms.methods.fedavg_prior import log_prior
from fedms.progress import Progress
from fedms.report.intervals import by_seed
from fedms.runs.experiment import LoadedTask

CLASSES, RANK, SCALE, BATCH, ROUNDS = 3, 8, 2.0, 32, 9
OF_THE_STUDY, SAMPLES = 4000, 7000
SETTINGS = {"by domain, 12 clients": (12, None, 9), "Dirichlet 0.3, 20 clients": (20, 0.3, 9),
            "Dirichlet 0.3, 4 rounds": (20, 0.3, 4), "Dirichlet 0.1, 20 clients": (20, 0.1, 9)}
Expert = list[Tensor]       # A (C, r, D), B (C, D, r), head (C, K, D), bias (C, 1, K) of all C clients


@dataclass(frozen=True)
class Part:
    """Samples of all clients: features (C, n, D) and labels (C, n)."""

    x: Tensor
    y: Tensor

    def rows(self, rows: Tensor) -> Part:
        """Return the samples at each client's rows (C, m)."""
        return Part(self.x.gather(1, rows[..., None].expand(*rows.shape, self.x.shape[-1])), self.y.gather(1, rows))


def features() -> tuple[Tensor, Tensor, Tensor]:
    """Return features (n, D), labels and domains of sentences that no run of the study uses."""
    def unused(strata: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
        rest = np.setdiff1d(np.arange(len(strata)), stratified_sample(strata, OF_THE_STUDY, rng))
        return rest[stratified_sample(strata[rest], total, rng)]
    config = load_config("sentiment", ["data.max_tokens=32", "run.threads=1", f"data.max_samples={SAMPLES}"])
    with mock.patch.object(sentiment, "stratified_sample", unused):
        task = LoadedTask(config, Progress())
    found = task.model.features(Subset(torch.arange(len(task.dataset))))
    return F.layer_norm(found, found.shape[1:]), task.dataset.labels, task.dataset.groups


def deal(x: Tensor, y: Tensor, domains: Tensor, clients: int, alpha: float | None, seed: int) -> dict[str, Part]:
    """Return training, validation and test samples: each client has one domain, or classes drawn from Dirichlet(alpha)."""
    sizes = (120, 45, 200) if alpha is None else (72, 27, 150)
    rng, chosen = np.random.default_rng(seed), []
    for client in range(clients):
        if alpha is None:
            ids = rng.choice(np.flatnonzero(domains == client % 4), sum(sizes), replace=False)
        else:
            counts = rng.multinomial(sum(sizes), rng.dirichlet([alpha] * CLASSES))
            ids = np.concatenate([rng.choice(np.flatnonzero(y == k), n, replace=False) for k, n in enumerate(counts)])
            rng.shuffle(ids)
        chosen.append(ids)
    parts = torch.from_numpy(np.stack(chosen)).split(sizes, 1)
    return {name: Part(x[ids], y[ids]) for name, ids in zip(("train", "validation", "test"), parts)}


def fresh(clients: int, width: int, draw: torch.Generator) -> Expert:
    """Return a new expert for all clients: A and the head at random, B and the bias zero."""
    a = (2 * torch.rand(RANK, width, generator=draw) - 1) / math.sqrt(width)
    head = 0.02 * (2 * torch.rand(CLASSES, width, generator=draw) - 1)
    return [t.repeat(clients, 1, 1) for t in (a[None], torch.zeros(1, width, RANK), head[None], torch.zeros(1, 1, CLASSES))]


def logits(expert: Expert, x: Tensor) -> Tensor:
    """Return the logits (C, n, K) of an expert for features (C, n, D)."""
    a, b, head, bias = expert
    hidden = x + SCALE * F.gelu(x @ a.mT) @ b.mT
    return F.layer_norm(hidden, hidden.shape[-1:]) @ head.mT + bias


def loss_of(z: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy (C,) of each client."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def descend(params: Expert, lr: float, batches: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> None:
    """Train with AdamW over batches of rows (C, b), with the gradient of each client clipped at norm 1."""
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.0)
    for rows in batches:
        optimizer.zero_grad()
        loss(rows).sum().backward()
        norm = sum(p.grad.square().flatten(1).sum(1) for p in params).sqrt()
        for p in params:
            p.grad.mul_((1 / (norm + 1e-6)).clamp_max(1).view(-1, 1, 1))
        optimizer.step()


def shuffled(rows: Tensor, draw: torch.Generator) -> Sequence[Tensor]:
    """Return each client's rows (C, m) as batches (C, b), in random order."""
    return rows.gather(1, torch.rand(rows.shape, generator=draw).argsort(1)).split(BATCH, 1)


def fedavg(train: Part, rounds: int, rows: Tensor, draw: torch.Generator) -> list[Expert]:
    """Return the averaged expert before the first round and after each round."""
    history = [fresh(len(train.y), train.x.shape[-1], draw)]
    for _ in range(rounds):
        own = [t.clone().requires_grad_() for t in history[-1]]

        def loss(chosen: Tensor, own: Expert = own) -> Tensor:
            batch = train.rows(chosen)
            return loss_of(logits(own, batch.x), batch.y)
        descend(own, 4e-3, shuffled(rows, draw), loss)
        history.append([t.detach().mean(0, keepdim=True).expand_as(t).clone() for t in own])
    return history


@dataclass(frozen=True)
class Idea:
    """How the private expert is trained. own, mixed, apart: weights of its own loss, of the loss of half and half with the global
    expert, and of the correlation of both experts' errors. start: the round whose averaged expert it begins as, from the end."""

    lr: float = 1e-3
    epochs: int = 3
    own: float = 1.0
    mixed: float = 0.0
    apart: float = 0.0
    prior: bool = True
    start: int = -4
    decay: bool = False


REFERENCE = Idea()
IDEAS = {
    "nine epochs, best kept": Idea(epochs=9), "rate 3e-3": Idea(lr=3e-3), "rate 3e-3, linear decay": Idea(lr=3e-3, decay=True),
    "rate 3e-3, nine epochs": Idea(lr=3e-3, epochs=9), "trained with the mixture's loss too": Idea(mixed=1.0),
    "mixture's loss alone, rate 3e-3, nine epochs": Idea(lr=3e-3, epochs=9, own=0.0, mixed=1.0),
    "errors decorrelated": Idea(lr=3e-3, epochs=9, apart=1.0), "no prior on the private expert": Idea(prior=False),
    "no prior on the private expert, nine epochs": Idea(epochs=9, prior=False),
    "no prior on the private expert, rate 3e-3": Idea(lr=3e-3, prior=False),
    "private expert from scratch": Idea(lr=4e-3, epochs=9, start=0),
}


def private(idea: Idea, data: Mapping[str, Part], rows: Tensor, start: Expert, ours: Tensor, shift: Tensor,
            draw: torch.Generator) -> dict[str, Tensor]:
    """Logits (C, n, K) of the private expert by part; of the epochs each client keeps the one of least validation loss. ours: the
    global expert's on the training samples."""
    own, train = [t.clone().requires_grad_() for t in start], data["train"]
    shift = shift if idea.prior else torch.zeros_like(shift)

    def loss(chosen: Tensor) -> Tensor:
        batch = train.rows(chosen)
        z, other = logits(own, batch.x) + shift, ours.gather(1, chosen[..., None].expand(*chosen.shape, CLASSES))
        errors = [each.softmax(-1) - F.one_hot(batch.y, CLASSES) for each in (z, other)]
        return (idea.own * loss_of(z, batch.y) + idea.mixed * loss_of((z + other) / 2, batch.y)
                + idea.apart * (errors[0] * errors[1]).sum(-1).mean(1))

    def seen() -> dict[str, Tensor]:
        return {name: (logits(own, part.x) + shift).detach() for name, part in data.items()}
    kept = [seen()]
    for epoch in range(idea.epochs):
        descend(own, idea.lr * (1 - epoch / idea.epochs if idea.decay else 1), shuffled(rows, draw), loss)
        kept.append(seen())
    best = torch.stack([loss_of(each["validation"], data["validation"].y) for each in kept]).argmin(0)
    return {name: torch.stack([each[name] for each in kept])[best, torch.arange(len(best))] for name in data}


def confidences(*experts: Tensor) -> Tensor:
    """Return for each expert's logits the largest log-probability and its distance to the second, (C, n, 2 E)."""
    top = [z.log_softmax(-1).topk(2, -1).values for z in experts]
    return torch.cat([part for t in top for part in (t[..., :1], t[..., :1] - t[..., 1:])], -1)


def gate(shared: Tensor, own: Tensor, y: Tensor, x: Tensor, sees: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A logistic gate fitted to samples of all clients; returns what mixes. sees: "b" a bias, "c" confidences, "p" a private bias,
    "f" features, "t" a temperature for each expert."""
    mean, std = (f(confidences(shared, own).flatten(0, 1), 0) for f in (torch.mean, torch.std))
    sizes = {"b": (1,), "c": (4,), "p": (len(y), 1), "f": (x.shape[-1],), "t": (2,)}
    params = {name: torch.zeros(*size, requires_grad=name in sees) for name, size in sizes.items()}

    def mix(shared: Tensor, own: Tensor, x: Tensor) -> Tensor:
        known = (confidences(shared, own) - mean) / (std + 1e-6)
        side = (params["b"] + params["p"] + known @ params["c"] + x @ params["f"] / math.sqrt(x.shape[-1])).sigmoid()[..., None]
        scales = params["t"].exp()
        return (1 - side) * shared * scales[0] + side * own * scales[1]
    trained = [params[name] for name in sees]
    optimizer = torch.optim.LBFGS(trained, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(mix(shared, own, x).flatten(0, 1), y.flatten(), reduction="sum")
        total = total + sum(3 / 2 * p.square().sum() for p in trained)
        total.backward()
        return total
    optimizer.step(loss)
    return lambda *given: mix(*given).detach()


def accuracy(z: Tensor, y: Tensor) -> float:
    """Return the accuracy over all clients of logits (C, n, K) for labels (C, n)."""
    return float((z.argmax(-1) == y).float().mean())


def one_seed(setting: str, everything: tuple[Tensor, Tensor, Tensor], seed: int) -> dict[str, float]:
    """Return the test accuracy of each idea, of the reference, of its two experts, and of two rivals."""
    clients, alpha, rounds = SETTINGS[setting]
    data, draw = deal(*everything, clients, alpha, seed), torch.Generator().manual_seed(seed)
    train, test, y = data["train"], data["test"], data["test"].y
    every = torch.rand(train.y.shape, generator=draw).argsort(1)
    held, rest = every[:, :train.y.shape[1] // 5], every[:, train.y.shape[1] // 5:]
    counts = torch.stack([(train.y == k).sum(1) for k in range(CLASSES)], 1).double()
    shift = torch.stack([log_prior(each) for each in counts]).float()[:, None] - log_prior(counts.sum(0)).float()
    history = fedavg(train, rounds, every, draw)

    def globally(expert: Expert) -> dict[str, Tensor]:
        return {name: logits(expert, part.x).detach() + shift for name, part in data.items()}

    def at(values: Tensor, rows: Tensor) -> Tensor:
        return values.gather(1, rows[..., None].expand(*rows.shape, values.shape[-1]))

    def half(shared: dict[str, Tensor], own: dict[str, Tensor]) -> float:
        return accuracy(shared["test"] + own["test"], y)

    def gated(shared: dict[str, Tensor], own: dict[str, Tensor], sees: str = "bc", rows: Tensor = held) -> float:
        by = train.rows(rows)
        return accuracy(gate(at(shared["train"], rows), at(own["train"], rows), by.y, by.x, sees)(
            shared["test"], own["test"], test.x), y)
    ours = globally(history[-1])

    def tuned(idea: Idea, rows: Tensor = every, start: Expert | None = None, by: Tensor = shift) -> dict[str, Tensor]:
        return private(idea, data, rows, history[idea.start] if start is None else start, ours["train"], by, draw)
    own, held_back = tuned(REFERENCE), tuned(REFERENCE, rest)
    found = {"reference": half(ours, own), "global expert with the prior (fedavg_prior)": accuracy(ours["test"], y),
             "private expert alone": accuracy(own["test"], y),
             "right expert for each sample (no gate can know)": float(
                 ((ours["test"].argmax(-1) == y) | (own["test"].argmax(-1) == y)).float().mean()),
             "gate on held-out samples": gated(ours, held_back), "the same experts, half and half": half(ours, held_back),
             "gate on held-out samples: a bias alone": gated(ours, held_back, "b"),
             "gate on held-out samples: a private bias too": gated(ours, held_back, "bcp"),
             "gate on held-out samples: features too": gated(ours, held_back, "bcf"),
             "gate on held-out samples: temperatures too": gated(ours, held_back, "bct")}
    of_validation = gate(ours["validation"], own["validation"], data["validation"].y, data["validation"].x, "bc")
    found["gate on validation samples"] = accuracy(of_validation(ours["test"], own["test"], test.x), y)
    found["gate on the expert's own training samples"] = gated(ours, own, "bc", every)
    for name, idea in IDEAS.items():
        found[name] = half(ours, tuned(idea))
    smooth = [sum(parts) / 3 for parts in zip(*history[-3:])]
    found["global expert: mean of the last three rounds"] = half(globally(smooth), own)
    first, second = every[:, ::2], every[:, 1::2]
    apart = fedavg(train, rounds, first, draw)
    found["experts on disjoint halves"] = half(globally(apart[-1]), tuned(Idea(lr=3e-3, epochs=9), second, apart[-4]))
    none = torch.zeros_like(shift)
    found["fedavg"] = accuracy(ours["test"] - shift, y)
    for lr in (1e-3, 3e-3):
        found[f"fedavg_ft, rate {lr:g}"] = accuracy(tuned(Idea(lr=lr), by=none)["test"], y)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    count = parser.parse_args().seeds
    torch.set_num_threads(1)
    everything = features()
    columns = {setting: [one_seed(setting, everything, 100 + seed) for seed in range(count)] for setting in SETTINGS}
    print("| | " + " | ".join(SETTINGS) + " |\n| --- |" + " ---: |" * len(SETTINGS))
    for name in next(iter(columns.values()))[0]:
        cells = []
        for runs in columns.values():
            if name == "reference":
                cells.append(f"{100 * np.mean([run[name] for run in runs]):.1f} %")
                continue
            gap = by_seed({(seed, 0): 100 * (run[name] - run["reference"]) for seed, run in enumerate(runs)})
            cells.append(f"{'' if abs(gap.mean) > gap.half else '~'}{gap.mean:+.2f} ± {gap.half:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
