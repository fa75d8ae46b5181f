"""What a federated method is: what travels, what a client does with a message, and how a client predicts.

All methods run the same two stages with the same rounds, local epochs and learning rates, so that they differ in
what they share and keep, and in nothing else.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, cast

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Group, Loss, Message, Private, Reply, own_loss_of, train, validate
from fedms.tensors import Tensors, freeze_none, is_a
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


@dataclass(frozen=True)
class Prediction:
    """Opinions (U, K) of a client about some samples: `personalized` is what the method answers; the others are its
    parts where it has them. `weights` (U, 2): the gate's weights of the global and the local expert."""

    personalized: Tensor
    global_: Tensor | None = None
    local: Tensor | None = None
    weights: Tensor | None = None


class Method(ABC):
    """Base of all methods. Instances hold settings only: all state is in messages, replies and `Private`."""

    name: ClassVar[str]
    personal: ClassVar[tuple[str, ...]] = ()
    """Stages in whose visits a client trains something of its own, without which it answers as all others do."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def learns_gate(self) -> bool:
        """Whether the weights of the mixed experts come from a gate that is trained."""
        return False

    def initial(self, model: ExpertModel) -> Tensors:
        """All tensors that the server starts with."""
        return model.initial(self.config.run.seed)

    @abstractmethod
    def broadcast_policy(self, stage: str, name: str) -> str | None:
        """How a tensor goes to clients: "round" (with every message), "once" (kept by the client), None (not)."""

    def statistics(self, classes: int) -> Tensors:
        """Statistics that clients send for the server to add up, as zeros."""
        return {}

    @abstractmethod
    def client_step(self, model: ExpertModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        """A client's visit: what it sends back, and its private state from now on.

        Raises:
            ClientFailure: if the client must be left out of this round.
        """

    @abstractmethod
    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        """What the client with this private state predicts once training is over. A client that was never visited
        has an empty private state."""


    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        """Loads what the client with this private state answers with, for tasks whose answers are generated."""
        raise NotImplementedError(f"{self.name} generates no answers")


# Steps that several methods share.

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


def proximal(strength: float, anchors: Mapping[str, Tensor]) -> Penalty:
    """strength / 2 * squared distance of what is trained from its anchors."""
    return lambda params: strength / 2 * cast(
        Tensor, sum((p - anchors[name]).square().sum() for name, p in params.items()))


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
