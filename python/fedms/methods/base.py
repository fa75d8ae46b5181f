"""What a federated method is: what travels, what a client does with a message, and how a client predicts.

All methods run the same two stages with the same rounds, local epochs and learning rates, so that they differ in
what they share and keep, and in nothing else.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedms.client import Client, Group, Message, Private, Reply, Score, cross_entropy_of, train, validate
from fedms.config import RunConfig
from fedms.resident import Part, ResidentModel, Tensors


@dataclass(frozen=True)
class Prediction:
    """Logits (n, C) of a client for some samples: `personalised` is what the method answers; the others are its
    parts where it has them. `weights` (n, 2): the gate's weights of the global and the local expert."""

    personalised: Tensor
    global_: Tensor | None = None
    local: Tensor | None = None
    weights: Tensor | None = None


class Method(ABC):
    """Base of all methods. Instances hold settings only: all state is in messages, replies and `Private`."""

    name: ClassVar[str]

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abstractmethod
    def carries(self, stage: str, name: str) -> str | None:
        """How a tensor goes to clients: "round" (with every message), "once" (kept by the client), None (not)."""

    @abstractmethod
    def client_step(self, model: ResidentModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        """A client's visit: what it sends back, and its private state from now on.

        Raises:
            ClientFailure: if the client must be left out of this round.
        """

    @abstractmethod
    def predict(self, model: ResidentModel, part: Part, private: Private, final: Message) -> Prediction:
        """What the client with this private state predicts once training is over. A client that was never visited
        has an empty private state."""


# Steps that several methods share.

def train_shared(model: ResidentModel, client: Client, private: Private, message: Message) -> tuple[Reply, Private]:
    """Federated averaging's visit: load the shared expert, judge it, train it, send what was trained."""
    model.load("global", message.tensors, depth=client.trained_depth(message), applied_depth=message.applied_depth)
    received = validate(model, client, "global")
    params = model.trainable("global")
    loss, moments = train(client, message, private, [Group(params, lr_of(client, message))],
                          cross_entropy_of(model, client, "global"))
    reply = make_reply(client, model.read_trained("global"), received.accuracy, received, loss=loss,
                       trained_params=sum(p.numel() for p in params.values()))
    return reply, Private({**private.tensors, **moments})


def train_private(model: ResidentModel, client: Client, private: Private, message: Message,
                  start: Mapping[str, Tensor]) -> tuple[Reply, Private]:
    """A visit that trains a private expert and sends nothing. `start`: what it begins as, at the first visit."""
    load_private(model, client, private, message, start)
    received = validate(model, client, "local")
    before = model.read_applied("local")
    params = model.trainable("local")
    loss, moments = train(client, message, private, [Group(params, lr_of(client, message))],
                          cross_entropy_of(model, client, "local"))
    kept, after = keep_better(model, client, message, before, received)
    reply = make_reply(client, {}, received.accuracy, after, loss=loss,
                       trained_params=sum(p.numel() for p in params.values()))
    return reply, Private({**kept, **moments})


def load_private(model: ResidentModel, client: Client, private: Private, message: Message,
                 start: Mapping[str, Tensor]) -> None:
    """Loads the client's private expert. Pairs it does not have yet are those of `start`; the blocks that are not
    active stay frozen, so activating never changes the function."""
    model.load("local", {**start, **private.tensors}, depth=client.trained_depth(message),
               applied_depth=message.applied_depth)


def keep_better(model: ResidentModel, client: Client, message: Message, before: Tensors,
                received: Score) -> tuple[Tensors, Score]:
    """Early stopping (`[stage2] keep = "best"`): the private expert after training, or the one before if that has the
    lower validation loss; and the validation score of the one that is kept. Loads it into the model."""
    trained = validate(model, client, "local")
    better = (client.config.stage2.keep == "best" and received.loss is not None and received.loss <= trained.loss)
    if better:
        model.load("local", before, depth=client.trained_depth(message), applied_depth=message.applied_depth)
        return before, received
    return model.read_applied("local"), trained


def lr_of(client: Client, message: Message) -> float:
    return getattr(client.config, message.stage).lr


def make_reply(client: Client, tensors: Tensors, score: float | None, reached: Score, *, sums: Tensors | None = None,
               **metrics: float | None) -> Reply:
    """A reply whose records say what validation score the client `reached`."""
    return Reply(client.id, tensors, len(client.train), len(client.validation), score,
                 {"validation_accuracy": reached.accuracy, "validation_loss": reached.loss, **metrics}, sums or {})


def class_counts(model: ResidentModel, part: Part) -> Tensor:
    """(C,) float64 number of samples of each class."""
    return torch.bincount(model.labels(part), minlength=len(model.dataset.classes)).double()
