"""The functions of which methods compose a client's visit, and what a client predicts by its private expert.

`shared_visit` is the visit of federated averaging, and `private_visit` trains an expert that stays at the client. Both ask for
their training (see `fedms.federated.lockstep`); `train_shared` and `train_private` carry it out, too. All accept a `penalty` and
are composed of the smaller functions below.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private, Reply, validate
from fedms.federated.lockstep import Training, Visiting, alone
from fedms.federated.method import Prediction
from fedms.tasks import Score
from fedms.tensors import Tensors, freeze_none, is_a
from fedms.training.answering import Speaker
from fedms.training.both import both_opinions
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import Proximal


def shared_expert(model: ExpertModel, message: Message, config: RunConfig) -> Tensors:
    """Return the tensors of the global expert at a client: those of the message and, with `[aggregate] rule = "freeze_a"`, A,
    which each client draws from the run's seed."""
    brought = {**message.constants, **message.tensors}
    if config.aggregation != "freeze_a":
        return brought
    return {**{name: t for name, t in model.initial(config.run.seed).items() if is_a(name)}, **brought}


def train_shared(model: ExpertModel, client: Client, private: Private, message: Message, *,
                 start: Mapping[str, Tensor] = MappingProxyType({}),
                 penalty: Proximal | None = None) -> tuple[Reply, Private]:
    """Carry out `shared_visit` by itself."""
    return alone(shared_visit(model, client, private, message, start=start, penalty=penalty), model, client, private)


def shared_visit(model: ExpertModel, client: Client, private: Private, message: Message, *,
                 start: Mapping[str, Tensor] = MappingProxyType({}), penalty: Proximal | None = None) -> Visiting:
    """The visit of federated averaging: load the shared expert, validate it, train it, and send the result.

    Tensors that the message does not contain are private: they start as in `start`, are trained with the others, and stay at
    the client. Early stopping (`[stage2] keep = "best"`) restores them if training raised the validation loss.

    Runs of a comparison share a visit that is determined by the message: without tensors to start from, and without a penalty.
    """
    brought = shared_expert(model, message, client.config)

    def load(tensors: Mapping[str, Tensor]) -> None:
        model.load("global", {**start, **private.tensors, **brought, **tensors}, depth=client.trained_depth(message),
                   applied_depth=message.applied_depth, keep=is_a if client.config.aggregation == "freeze_a" else freeze_none)

    visiting = _averaging_visit(model, client, private, message, load, penalty)
    if client.shared is not None and not start and penalty is None:
        visiting = client.shared.visiting(visiting, model, client, private, message, brought, load)
    return (yield from visiting)


def _averaging_visit(model: ExpertModel, client: Client, private: Private, message: Message,
                     load: Callable[[Mapping[str, Tensor]], None], penalty: Proximal | None) -> Visiting:
    """`shared_visit`, carried out by this run. `load`: loads the expert into the model, with some tensors in the place of those that
    the client begins with."""
    load({})
    received, before = validate(model, client, "global"), model.read_trained("global")
    loss, moments, size = yield Training("global", message, lr_of(client, message), penalty)
    trained = model.read_trained("global")
    sent = {name: tensor for name, tensor in trained.items() if name in message.tensors}
    own = {name: tensor for name, tensor in trained.items() if name not in message.tensors}
    if own and not improves(client, received, validate(model, client, "global")):
        own = {name: before[name] for name in own}
    reply = make_reply(client, sent, received.accuracy, received, loss=loss, trained_params=size)
    return reply, Private({**private.tensors, **own, **moments})


def train_private(model: ExpertModel, client: Client, private: Private, message: Message,
                  start: Mapping[str, Tensor], penalty: Proximal | None = None) -> tuple[Reply, Private]:
    """Carry out `private_visit` by itself."""
    return alone(private_visit(model, client, private, message, start, penalty), model, client, private)


def private_visit(model: ExpertModel, client: Client, private: Private, message: Message, start: Mapping[str, Tensor],
                  penalty: Proximal | None = None) -> Visiting:
    """A visit that trains a private expert and sends nothing. At the first visit the expert starts as `start`."""
    load_private(model, client, private, message, start)
    received = validate(model, client, "local")
    best = BestEpoch(model, client, received)
    loss, moments, size = yield Training("local", message, private_lr_of(client, message), penalty, after_epoch=best.after_epoch)
    best.load(message)
    reply = make_reply(client, {}, received.accuracy, best.score, loss=loss, trained_params=size)
    return reply, Private({**private.tensors, **best.kept, **moments})


def private_prediction(model: ExpertModel, part: Subset, private: Private, final: Message, config: RunConfig) -> Prediction:
    """Return the predictions of a client's private expert, and beside them those of the global one."""
    shared = shared_expert(model, final, config)
    model.load("global", shared, depth=final.depth, applied_depth=final.applied_depth)
    model.load("local", {**shared, **private.tensors}, depth=final.depth, applied_depth=final.applied_depth)
    ours, own = both_opinions(model, part)
    return Prediction(own, global_=ours, local=own)


def private_speaker(model: ExpertModel, private: Private, final: Message, start: Mapping[str, Tensor]) -> Speaker:
    """Load a client's private expert for generating answers. Pairs that it does not have are taken from `start`."""
    model.load("local", {**start, **private.tensors}, depth=0, applied_depth=final.applied_depth)
    return Speaker(("local",))


def proximal(strength: float, anchors: Mapping[str, Tensor], device: torch.device) -> Proximal:
    """Return a penalty of the distance from anchors, which are moved to the device."""
    return Proximal(strength, {name: tensor.to(device) for name, tensor in anchors.items()})


def load_private(model: ExpertModel, client: Client, private: Private, message: Message,
                 start: Mapping[str, Tensor]) -> None:
    """Load a client's private expert. Pairs that it does not have yet are taken from `start`.

    Pairs in blocks that are not active are frozen, so that activating a block does not change the output.
    """
    model.load("local", {**start, **private.tensors}, depth=client.trained_depth(message),
               applied_depth=message.applied_depth)


class BestEpoch:
    """Early stopping of a private expert (`[stage2] keep = "best"`).

    It keeps the expert with the lowest validation loss among the one before training and the ones after each epoch.

    Args:
        received: Score of the expert that is in the model now.
        judge: Computes the score of the expert in the model; the default scores the local expert alone.
        further: Reads further tensors that belong to the expert, by name.

    Attributes:
        kept: Tensors of the best expert.
        score: Its score.
        further: The further tensors that belong to it.
    """

    def __init__(self, model: ExpertModel, client: Client, received: Score, judge: Callable[[], Score] | None = None,
                 further: Callable[[], Tensors] = dict) -> None:
        self._model, self._client = model, client
        self._judge = judge or (lambda: validate(model, client, "local"))
        self._read = further
        self.kept, self.score, self.further = model.read_applied("local"), received, further()
        self._is_last = True

    def after_epoch(self) -> None:
        """Score the expert in the model, and remember it if it is the best one."""
        trained = self._judge()
        self._is_last = improves(self._client, self.score, trained)
        if self._is_last:
            self.kept, self.score, self.further = self._model.read_applied("local"), trained, self._read()

    def load(self, message: Message) -> None:
        """Load the best expert into the model, unless it is there already."""
        if not self._is_last:
            self._model.load("local", {**self.kept, **self._model.corrections.tensors}, depth=self._client.trained_depth(message),
                             applied_depth=message.applied_depth)


def improves(client: Client, received: Score, trained: Score) -> bool:
    """Return whether to keep the trained tensors: always, or with `[stage2] keep = "best"` only if the validation loss fell."""
    return client.config.stage2.keep == "last" or received.loss is None or trained.loss < received.loss


def lr_of(client: Client, message: Message) -> float:
    """Return the learning rate of the stage that a message belongs to."""
    return getattr(client.config, message.stage).lr


def private_lr_of(client: Client, message: Message) -> float:
    """Return the learning rate of private tensors, which `[stage2] decay` lowers from round to round."""
    stage = client.config.stage2
    falls = message.stage == "stage2" and stage.decay == "linear"
    return lr_of(client, message) * (1 - (message.round - 1) / max(stage.rounds, 1) if falls else 1)


def make_reply(client: Client, tensors: Tensors, score: float | None, reached: Score, *, statistics: Tensors | None = None,
               **metrics: float | None) -> Reply:
    """Return a reply whose metrics hold the validation score that the client reached."""
    return Reply(client.id, tensors, len(client.train), len(client.validation), score,
                 {"validation_accuracy": reached.accuracy, "validation_loss": reached.loss, **metrics}, statistics or {})


def class_counts(model: ExpertModel, part: Subset) -> Tensor:
    """Return the number of samples of each class, (C,) float64."""
    return torch.bincount(model.dataset.labels[part.indices], minlength=len(model.dataset.classes)).double()
