"""Evaluate clients on their test samples. Only this module reads test labels, after all choices have been made on training
and validation data."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.choices import choice_accuracies
from fedms.federated.client import Client, ClientFailure, Message, Private
from fedms.federated.method import Method, Prediction
from fedms.tasks import Task
from fedms.training.expert_model import ExpertModel


def evaluate_client(method: Method, model: ExpertModel, client: Client, private: Private, final: Message,
                    unseen: bool = False) -> dict[str, Any]:
    """Return a client's line of `clients.jsonl`.

    It has accuracies in [0, 1] on the client's test samples, and those of the same prediction on its validation samples. Fields
    that do not apply are None.
    """
    validated = validate_client(method, model, client, private, final)
    record: dict[str, Any] = {
        "id": client.id, "group": client.group, "unseen": unseen, "n_train": len(client.train),
        "n_validation": len(client.validation), "n_test": len(client.test), "accuracy": {},
        **{f"validation_{name}": validated[name] for name in ("accuracy", "loss")}}
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
    if model.config.task.choices:
        record["language"].update(choice_accuracies(method, model, client, private, final, opinions))
    if prediction.weights is not None:
        own = prediction.weights[:, 1]
        record.update(gate_mean=float(own.mean()), gate_std=float(own.std(correction=0)),
                      gate_entropy=float(torch.special.entr(prediction.weights).sum(1).mean()))
    return record


def _mixture_accuracies(task: Task, prediction: Prediction, targets: Tensor) -> dict[str, float | None]:
    """Return the accuracies of the mixture, of equal weights, and of an oracle that picks the right expert for each sample."""
    if prediction.weights is None:
        return {}
    shared, own = prediction.global_, prediction.local
    either = task.right(shared, targets) | task.right(own, targets)
    halves = shared.new_full((len(shared), 2), 0.5)
    half = accuracy(task, task.mix(halves, shared, own, "logits"), targets) if task.mixes_opinions else None
    return {"mixture": accuracy(task, prediction.personalized, targets), "half": half,
            "oracle": float(either.float().mean())}


def validate_client(method: Method, model: ExpertModel, client: Client, private: Private, final: Message) -> dict[str, Any]:
    """Return the score of a client's final predictions on its validation samples, by which `fedms tune` chooses constants."""
    record: dict[str, Any] = {"id": client.id, "n_validation": len(client.validation), "accuracy": None, "loss": None}
    if len(client.validation):
        model.clear()
        prediction = method.predict(model, client.validation, private, final)
        score = model.task.score(prediction.personalized, model.targets(client.validation))
        record.update(accuracy=score.accuracy, loss=score.loss)
    return record


def evaluate_unseen(method: Method, model: ExpertModel, client: Client, final: Message,
                    rounds: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return two records of an unseen client: with the received tensors, and after `rounds` visits of stage 2 in which it sends
    nothing (None without such visits, or if training failed)."""
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
    """Return the accuracy of the global expert on the common test set, or None for a method without one."""
    if len(part) == 0:
        return None
    model.clear()
    return accuracy(model.task, method.predict(model, part, Private(), final).global_, model.targets(part))


def own_accuracy(method: Method, model: ExpertModel, part: Subset, private: Private, final: Message) -> float | None:
    """Return the accuracy of a client's predictions on the common test set."""
    if len(part) == 0:
        return None
    model.clear()
    return accuracy(model.task, method.predict(model, part, private, final).personalized, model.targets(part))


def accuracy(task: Task, opinion: Tensor | None, targets: Tensor) -> float | None:
    """Return the task's accuracy of an opinion, or None where there is no opinion."""
    return None if opinion is None else task.accuracy(opinion, targets)
