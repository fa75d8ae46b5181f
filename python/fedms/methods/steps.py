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
from fedms.tasks import Score
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

    What the message does not bring is the client's own: it begins as in `start`, is trained with the rest, and stays. Early
    stopping (`[stage2] keep = "best"`) takes it back to what it was, if training raised the validation loss.
    """
    frozen_a = client.config.aggregation == "freeze_a"
    model.load("global", {**start, **private.tensors, **shared_expert(model, message, client.config)},
               depth=client.trained_depth(message), applied_depth=message.applied_depth,
               keep=is_a if frozen_a else freeze_none)
    received, before = validate(model, client, "global"), model.read_trained("global")
    loss, moments, size = fit(model, client, private, message, "global", penalty)
    trained = model.read_trained("global")
    sent = {name: tensor for name, tensor in trained.items() if name in message.tensors}
    own = {name: tensor for name, tensor in trained.items() if name not in message.tensors}
    if own and not improves(client, received, validate(model, client, "global")):
        own = {name: before[name] for name in own}
    reply = make_reply(client, sent, received.accuracy, received, loss=loss, trained_params=size)
    return reply, Private({**private.tensors, **own, **moments})


def train_private(model: ExpertModel, client: Client, private: Private, message: Message,
                  start: Mapping[str, Tensor], penalty: Penalty | None = None) -> tuple[Reply, Private]:
    """A visit that trains a private expert and sends nothing. `start`: what it begins as, at the first visit."""
    load_private(model, client, private, message, start)
    received = validate(model, client, "local")
    best = BestEpoch(model, client, received)
    loss, moments, size = fit(model, client, private, message, "local", penalty, best.after_epoch)
    best.load(message)
    reply = make_reply(client, {}, received.accuracy, best.score, loss=loss, trained_params=size)
    return reply, Private({**private.tensors, **best.kept, **moments})


def fit(model: ExpertModel, client: Client, private: Private, message: Message, expert: str,
        penalty: Penalty | None = None,
        after_epoch: Callable[[], None] | None = None) -> tuple[float, Tensors, int]:
    """Trains a loaded expert on its own loss; returns the mean loss, the optimizer's state to keep, and the number of
    parameters trained."""
    params, own = model.trainable(expert), own_loss_of(model, expert)
    prefix, lr_here = ("local/", private_lr_of) if expert == "local" else ("", lr_of)
    loss, moments = train(model, client, message, private,
                          [Group({prefix + name: p for name, p in params.items()}, lr_here(client, message))],
                          own if penalty is None else lambda part: penalized(own(part), penalty, params),
                          after_epoch=after_epoch)
    return loss, moments, sum(p.numel() for p in params.values())


def penalized(loss_of: Loss, penalty: Penalty, params: Mapping[str, Tensor]) -> Loss:
    """Return a loss with a penalty on the trained parameters added."""
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


class BestEpoch:
    """Early stopping (`[stage2] keep = "best"`): of the private expert as it came and as each epoch of training left it, the one
    with the lowest validation loss is kept.

    Args:
        received: the score of what is in the model now.
        judge: scores what is in the model; default the local expert alone.
        further: reads what belongs to the expert and is kept with it, by name.

    Attributes:
        kept: the tensors that are kept. score: their score. further: what belongs to them.
    """

    def __init__(self, model: ExpertModel, client: Client, received: Score, judge: Callable[[], Score] | None = None,
                 further: Callable[[], Tensors] = dict) -> None:
        self._model, self._client = model, client
        self._judge = judge or (lambda: validate(model, client, "local"))
        self._read = further
        self.kept, self.score, self.further = model.read_applied("local"), received, further()
        self._is_last = True

    def after_epoch(self) -> None:
        """Judges what is in the model now."""
        trained = self._judge()
        self._is_last = improves(self._client, self.score, trained)
        if self._is_last:
            self.kept, self.score, self.further = self._model.read_applied("local"), trained, self._read()

    def load(self, message: Message) -> None:
        """Loads the expert that is kept into the model, unless it is there."""
        if not self._is_last:
            self._model.load("local", {**self.kept, **self._model.corrections.tensors}, depth=self._client.trained_depth(message),
                             applied_depth=message.applied_depth)


def improves(client: Client, received: Score, trained: Score) -> bool:
    """Whether what was trained is kept: always, or with `[stage2] keep = "best"` if it lowered the validation loss."""
    return client.config.stage2.keep == "last" or received.loss is None or trained.loss < received.loss


def lr_of(client: Client, message: Message) -> float:
    """Return the learning rate of the stage that a message belongs to."""
    return getattr(client.config, message.stage).lr


def private_lr_of(client: Client, message: Message) -> float:
    """The learning rate of what is a client's own (`[stage2] decay`)."""
    stage = client.config.stage2
    falls = message.stage == "stage2" and stage.decay == "linear"
    return lr_of(client, message) * (1 - (message.round - 1) / max(stage.rounds, 1) if falls else 1)


def make_reply(client: Client, tensors: Tensors, score: float | None, reached: Score, *, statistics: Tensors | None = None,
               **metrics: float | None) -> Reply:
    """A reply whose records say what validation score the client `reached`."""
    return Reply(client.id, tensors, len(client.train), len(client.validation), score,
                 {"validation_accuracy": reached.accuracy, "validation_loss": reached.loss, **metrics}, statistics or {})


def class_counts(model: ExpertModel, part: Subset) -> Tensor:
    """(C,) float64 number of samples of each class."""
    return torch.bincount(model.dataset.labels[part.indices], minlength=len(model.dataset.classes)).double()
