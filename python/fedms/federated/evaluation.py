"""What came out: test accuracies, per client and in all. The only place that reads test labels, after every choice
has been made on training and validation data."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, ClientFailure, Message, Private
from fedms.methods import Method, Prediction
from fedms.tasks import Task
from fedms.training.expert_model import ExpertModel

# A gate is named collapsed when its mean entropy falls below this share of the largest possible, log 2: it then
# hardly mixes at all, whichever side it fell on.
COLLAPSED_BELOW = 0.2


def evaluate_client(method: Method, model: ExpertModel, client: Client, private: Private, final: Message,
                    unseen: bool = False) -> dict[str, Any]:
    """One line of `clients.jsonl`: accuracies in [0, 1] on the client's test part, null where they do not apply."""
    record: dict[str, Any] = {
        "id": client.id, "group": client.group, "unseen": unseen, "n_train": len(client.train),
        "n_validation": len(client.validation), "n_test": len(client.test), "accuracy": {}}
    if len(client.test) == 0:
        return record
    model.clear()
    prediction = method.predict(model, client.test, private, final)
    targets, task = model.targets(client.test), model.task
    opinions = {"personalized": prediction.personalized, "global": prediction.global_, "local": prediction.local,
                "zero_shot": model.zero_shot(client.test)}
    record["accuracy"] = {**{name: accuracy(task, opinion, targets) for name, opinion in opinions.items()},
                          **_mixture_accuracies(task, prediction, targets)}
    record.update(task.details(opinions, targets, (model.dataset, client.test)))
    if prediction.weights is not None:
        own = prediction.weights[:, 1]
        record.update(gate_mean=float(own.mean()), gate_std=float(own.std(correction=0)),
                      gate_entropy=float(torch.special.entr(prediction.weights).sum(1).mean()))
    return record


def _mixture_accuracies(task: Task, prediction: Prediction, targets: Tensor) -> dict[str, float | None]:
    """The gate's mixture, beside a fixed half-half mix and an oracle that picks the right expert for each sample."""
    if prediction.weights is None:
        return {}
    shared, own = prediction.global_, prediction.local
    either = task.right(shared, targets) | task.right(own, targets)
    half = accuracy(task, (shared + own) / 2, targets) if task.mixes_opinions else None
    return {"mixture": accuracy(task, prediction.personalized, targets), "half": half,
            "oracle": float(either.float().mean())}


def evaluate_unseen(method: Method, model: ExpertModel, client: Client, final: Message,
                    rounds: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """An unseen client, twice: with what arrives, and after `rounds` visits of stage 2 that it makes on its own (it
    sends nothing; None without such visits, or if training failed)."""
    as_it_arrives = evaluate_client(method, model, client, Private(), final, unseen=True)
    if rounds == 0 or len(client.train) == 0:
        return as_it_arrives, None
    private = Private()
    for k in range(rounds):
        model.clear()
        try:
            _, private = method.client_step(model, client, private, replace(final, stage="stage2", round=k + 1))
        except ClientFailure:
            return as_it_arrives, None
    return as_it_arrives, evaluate_client(method, model, client, private, final, unseen=True)


def shared_accuracy(method: Method, model: ExpertModel, part: Subset, final: Message) -> float | None:
    """Accuracy of the global expert on the common test set; None for a method without one."""
    if len(part) == 0:
        return None
    model.clear()
    return accuracy(model.task, method.predict(model, part, Private(), final).global_, model.targets(part))


def own_accuracy(method: Method, model: ExpertModel, part: Subset, private: Private, final: Message) -> float | None:
    """Accuracy on the common test set of what a client answers."""
    if len(part) == 0:
        return None
    model.clear()
    return accuracy(model.task, method.predict(model, part, private, final).personalized, model.targets(part))


def summarize(clients: Sequence[dict[str, Any]], learns_gate: bool = True) -> dict[str, Any]:
    """Figures over participating clients that have test samples: each client counts the same. learns_gate: whether the
    weights of the experts are a trained gate's, which alone can collapse."""
    tested = [c for c in clients if c["n_test"]]
    personalized = np.array([c["accuracy"]["personalized"] for c in tested])
    worst = np.sort(personalized)[:max(1, math.ceil(len(personalized) / 10))]
    return {
        "personalized_accuracy": {"mean": mean(personalized), "std": float(personalized.std()) if tested else None,
                                  "worst10": mean(worst)},
        "zero_shot_accuracy": mean([c["accuracy"]["zero_shot"] for c in tested]),
        "macro_f1": mean([c.get("macro_f1") for c in tested]),
        "gate": _gate_summary([c for c in tested if c.get("gate_mean") is not None], learns_gate),
        **_language_summary([c["language"] for c in tested if c.get("language")]),
    }


def _language_summary(clients: list[dict[str, Any]]) -> dict[str, Any]:
    """Nats a token, averaged over clients, never perplexities, and the perplexities that the averages stand for."""
    if not clients:
        return {}
    nats = {name: mean([c.get(name) for c in clients]) for name in clients[0] if name.startswith("nats")}
    perplexities = {name.replace("nats", "perplexity"): None if value is None else math.exp(min(value, 700.0))
                    for name, value in nats.items()}
    return {"language": {**nats, **perplexities, "tokens": sum(c["tokens"] for c in clients),
                         "bits_per_byte": mean([c.get("bits_per_byte") for c in clients])}}


def _gate_summary(clients: list[dict[str, Any]], learns_gate: bool) -> dict[str, Any] | None:
    if not clients:
        return None
    means = np.array([c["gate_mean"] for c in clients])
    entropy = mean([c["gate_entropy"] for c in clients])
    return {"mean": mean(means), "std_clients": float(means.std()),
            "std_samples": mean([c["gate_std"] for c in clients]), "entropy": entropy,
            "collapsed": entropy < COLLAPSED_BELOW * math.log(2) if learns_gate else None,
            "half_mix_accuracy": mean([c["accuracy"]["half"] for c in clients]),
            "oracle_accuracy": mean([c["accuracy"]["oracle"] for c in clients])}


def accuracy(task: Task, opinion: Tensor | None, targets: Tensor) -> float | None:
    return None if opinion is None else task.accuracy(opinion, targets)


def mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
