"""The steps of a visit that methods are composed of.

`train_shared` is federated averaging's visit, `train_private` one that trains an expert which stays with the client; both
take a `penalty` and are made of the smaller steps below them.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Group, Loss, Message, Private, Reply, own_loss_of, train, validate
from fedms.tensors import Tensors, freeze_none, is_a
from fedms.training.expert_model import ExpertModel


Penalty = Callable[[Mapping[str, Tensor]], Tensor]      # of what is trained, by name; added to the loss


def shared_expert(model: ExpertModel, message: Message, config: RunConfig) -> Tensors:
    """The global expert as a client has it: what the message brings and, where A stays as it was drawn (`[aggregate]
    rule = "freeze_a"`), A from the run's seed: it never travels."""
    brought = {**message.constants, **message.tensors}
    if config.aggregation != "freeze_a":
        return brought
    return {**{name: t for name, t in model.initial(config.run.seed).items() if is_a(name)}, **brought}


def train_shared(model: ExpertModel, client: Client, private: Private, message: Message, *,
                 start: Mapping[str, Tensor] = MappingProxyType({}),
                 penalty: Penalty | None = None) -> tuple[Reply, Private]:
    """Federated averaging's visit: load the shared expert, judge it, train it, send what was trained.

    What the message does not bring is the client's own: it begins as in `start`, is trained with the rest, and stays.
    """
    frozen_a = client.config.aggregation == "freeze_a"
    model.load("global", {**start, **private.tensors, **shared_expert(model, message, client.config)},
               depth=client.trained_depth(message), applied_depth=message.applied_depth,
               keep=is_a if frozen_a else freeze_none)
    received = validate(model, client, "global")
    loss, moments, size = fit(model, client, private, message, "global", penalty)
    trained = model.read_trained("global")
    sent = {name: tensor for name, tensor in trained.items() if name in message.tensors}
    own = {name: tensor for name, tensor in trained.items() if name not in message.tensors}
    reply = make_reply(client, sent, received.accuracy, received, loss=loss, trained_params=size)
    return reply, Private({**private.tensors, **own, **moments})


def train_private(model: ExpertModel, client: Client, private: Private, message: Message,
                  start: Mapping[str, Tensor], penalty: Penalty | None = None) -> tuple[Reply, Private]:
    """A visit that trains a private expert and sends nothing. `start`: what it begins as, at the first visit."""
    load_private(model, client, private, message, start)
    received = validate(model, client, "local")
    before = model.read_applied("local")
    loss, moments, size = fit(model, client, private, message, "local", penalty)
    kept, after = keep_better(model, client, message, before, received)
    reply = make_reply(client, {}, received.accuracy, after, loss=loss, trained_params=size)
    return reply, Private({**private.tensors, **kept, **moments})


def fit(model: ExpertModel, client: Client, private: Private, message: Message, expert: str,
        penalty: Penalty | None = None) -> tuple[float, Tensors, int]:
    """Trains a loaded expert on its own loss; returns the mean loss, the optimizer's state to keep, and the number of
    parameters trained."""
    params, own = model.trainable(expert), own_loss_of(model, expert)
    prefix = "local/" if expert == "local" else ""
    loss, moments = train(model, client, message, private,
                          [Group({prefix + name: p for name, p in params.items()}, lr_of(client, message))],
                          own if penalty is None else lambda part: penalized(own(part), penalty, params))
    return loss, moments, sum(p.numel() for p in params.values())


def penalized(loss_of: Loss, penalty: Penalty, params: Mapping[str, Tensor]) -> Loss:
    return lambda rows: loss_of(rows) + penalty(params)


def proximal(strength: float, anchors: Mapping[str, Tensor], device: torch.device) -> Penalty:
    """strength / 2 * squared distance of what is trained, which is on this device, from its anchors."""
    there = {name: tensor.to(device) for name, tensor in anchors.items()}
    return lambda params: strength / 2 * cast(
        Tensor, sum((p - there[name]).square().sum() for name, p in params.items()))


def load_private(model: ExpertModel, client: Client, private: Private, message: Message,
                 start: Mapping[str, Tensor]) -> None:
    """Loads the client's private expert. Pairs it does not have yet are those of `start`; the blocks that are not
    active stay frozen, so activating never changes the function."""
    model.load("local", {**start, **private.tensors}, depth=client.trained_depth(message),
               applied_depth=message.applied_depth)


def keep_better(model: ExpertModel, client: Client, message: Message, before: Tensors, received: Score,
                judge: Callable[[], Score] | None = None) -> tuple[Tensors, Score]:
    """Early stopping (`[stage2] keep = "best"`): the private expert after training, or the one before if that has the
    lower validation loss; and the validation score of the one that is kept. Loads it into the model. `judge`: scores
    what is in the model; default the local expert alone."""
    trained = judge() if judge else validate(model, client, "local")
    if client.config.stage2.keep == "best" and received.loss is not None and received.loss <= trained.loss:
        model.load("local", {**before, **model.corrections.tensors}, depth=client.trained_depth(message),
                   applied_depth=message.applied_depth)
        return before, received
    return model.read_applied("local"), trained


def lr_of(client: Client, message: Message) -> float:
    return getattr(client.config, message.stage).lr


def make_reply(client: Client, tensors: Tensors, score: float | None, reached: Score, *, statistics: Tensors | None = None,
               **metrics: float | None) -> Reply:
    """A reply whose records say what validation score the client `reached`."""
    return Reply(client.id, tensors, len(client.train), len(client.validation), score,
                 {"validation_accuracy": reached.accuracy, "validation_loss": reached.loss, **metrics}, statistics or {})


def class_counts(model: ExpertModel, part: Subset) -> Tensor:
    """(C,) float64 number of samples of each class."""
    return torch.bincount(model.dataset.labels[part.indices], minlength=len(model.dataset.classes)).double()
