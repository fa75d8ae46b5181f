"""Visits of several clients side by side on one model (`[run] lockstep`).

A visit can be written as a generator that asks for its trainings instead of carrying them out: it loads the client's tensors,
yields a `Training`, and goes on with the model as the training left it. `alone` carries out the trainings of one visit as they
come. `together` carries out many visits: each goes on by itself until it asks for a training, then all of these are done at once,
step by step, and so on. In a step each client has a batch of its own, its own loss, gradient norm and optimizer state; the
clients share the frozen products and the launches of kernels. One that has no batch left waits for the others.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from fedms.config import Stage
from fedms.federated.client import (Client, ClientFailure, Group, Message, Private, Reply, Visit, batches_of, diverged,
                                    load_moments, memory_errors, moments_of, outcome_of, train)
from fedms.seeds import generator
from fedms.tensors import Tensors
from fedms.training.device import peak, reset_peak, synchronize
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import Proximal, own_loss_of
from fedms.training.seats import Seat, SideBySide


class Trained(NamedTuple):
    """What a training has come to: the mean loss, the optimizer's state (empty if it is not kept), and the number of trained
    parameters. The trained values are in the model."""

    loss: float
    moments: Tensors
    size: int


@dataclass(frozen=True)
class Training:
    """A training that a visit asks for: of an expert that is loaded in the model, on the loss of its own opinion.

    Attributes:
        expert: Name of the expert.
        message: The message whose stage and round say how long to train, and from which seeds to draw.
        lr: Learning rate.
        penalty: Added to the loss; None for none.
        epochs: Number of epochs; None for that of the stage.
        after_epoch: Called after each epoch, with the expert in the model; see `train`.
    """

    expert: str
    message: Message
    lr: float
    penalty: Proximal | None = None
    epochs: int | None = None
    after_epoch: Callable[[], None] | None = None

    def named(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters by the names under which their optimizer state is kept."""
        prefix = "local/" if self.expert == "local" else ""
        return {prefix + name: p for name, p in params.items()}

    def alone(self, model: ExpertModel, client: Client, private: Private) -> Trained:
        """Carry out the training by itself.

        Raises:
            ClientFailure: See `train`.
        """
        params, own = model.trainable(self.expert), own_loss_of(model, self.expert)
        loss, moments = train(model, client, self.message, private, [Group(self.named(params), self.lr)],
                              own if self.penalty is None else lambda part: self.penalty.added_to(own(part), params),
                              epochs=self.epochs, after_epoch=self.after_epoch)
        return Trained(loss, moments, sum(p.numel() for p in params.values()))


Visiting = Generator[Training, Trained, tuple[Reply, Private]]
"""A visit that asks for its trainings, and ends with the client's reply and its private state."""


def alone(visiting: Visiting, model: ExpertModel, client: Client, private: Private) -> tuple[Reply, Private]:
    """Carry out a visit and its trainings, one after the other.

    Raises:
        ClientFailure: If the client has to be left out of this round.
    """
    try:
        training = next(visiting)
        while True:
            training = visiting.send(training.alone(model, client, private))
    except StopIteration as end:
        return end.value


class Turn:
    """A visit under way among others.

    Attributes:
        client, private: The client, and its private state before the visit.
        ahead: See `Server.ahead`.
        flops, seconds, peak: What the visit has cost; of a training together with others, an equal share of its seconds.
        training: The training that the visit waits for, or None if it has ended.
        seat: What the client has in the model, set aside while it waits.
    """

    def __init__(self, visiting: Visiting, client: Client, private: Private, ahead: Sequence[int] | None) -> None:
        self.client, self.private, self.ahead, self._visiting = client, private, ahead, visiting
        self.flops, self.seconds, self.peak = 0, 0.0, 0
        self.training: Training | None = None
        self.seat: Seat
        self._end: tuple[Reply, Private] | ClientFailure | None = None

    @contextmanager
    def charged(self, model: ExpertModel) -> Iterator[None]:
        """Count what is done within the context as a cost of this visit."""
        flops, started = model.meter.flops, time.perf_counter()
        try:
            yield
        finally:
            synchronize(model.device)
            self.flops += model.meter.flops - flops
            self.seconds += time.perf_counter() - started

    def go_on(self, model: ExpertModel, answer: Trained | ClientFailure | None = None) -> None:
        """Continue the visit until it asks for a training or ends.

        Args:
            model: The model.
            answer: What the last training has come to; None at the beginning.
        """
        with self.charged(model):
            try:
                if isinstance(answer, ClientFailure):
                    raise answer
                if answer is None:
                    model.clear(self.ahead)
                else:
                    self.seat.load(model)
                with memory_errors():
                    self.training = next(self._visiting) if answer is None else self._visiting.send(answer)
                    self.seat = Seat(model, self.training.expert, self.client.train)
            except StopIteration as end:
                self.training, self._end = None, end.value
            except ClientFailure as failure:
                self.training, self._end = None, failure

    def step(self, *_: object) -> tuple[Reply, Private]:
        """Return what the visit has come to, as a `ClientStep` of its client does.

        Raises:
            ClientFailure: If the client has to be left out of this round.
        """
        assert self._end is not None    # `together` has ended it
        if isinstance(self._end, ClientFailure):
            raise self._end
        return self._end

    def visit(self) -> tuple[Visit, Private]:
        """Return the visit and the client's private state after it; see `fedms.federated.client.visit`."""
        reply, after, reason = outcome_of(self.step, self.private)
        return Visit(reply, reason, self.flops, self.seconds, self.peak), after


def together(visit: Callable[[ExpertModel, Client, Private, Message], Visiting], model: ExpertModel,
             clients: Sequence[tuple[Client, Private]], message: Message,
             ahead: Callable[[Message, Client], Sequence[int] | None] = lambda *_: None) -> list[Turn]:
    """Carry out the visits of several clients side by side.

    Args:
        visit: Begins a visit, see `Method.visit`.
        model: The model of this process.
        clients: The clients, each with its private state.
        message: The server's message.
        ahead: `Server.ahead`; by default the clients' caches make no provision for later rounds.

    Returns:
        The visits, all of which have ended, in the order of the clients.
    """
    reset_peak(model.device)
    turns = [Turn(visit(model, client, private, message), client, private, ahead(message, client)) for client, private in clients]
    for turn in turns:
        turn.go_on(model)
    while waiting := [turn for turn in turns if turn.training is not None]:
        tables: dict[object, list[Turn]] = {}
        for turn in waiting:
            training = turn.training
            key = turn.seat.layout, training.message.stage, training.lr, training.epochs
            tables.setdefault(key, []).append(turn)
        answers: dict[Turn, Trained | ClientFailure] = {}
        for group in tables.values():
            answers |= zip(group, _train_together(model, group))
        for turn in waiting:
            turn.go_on(model, answers[turn])
    for turn in turns:
        turn.peak = peak(model.device)
    return turns


def _train_together(model: ExpertModel, turns: Sequence[Turn]) -> list[Trained | ClientFailure]:
    """Train the experts of clients whose seats have the same layout, and return what became of each."""
    started, before = time.perf_counter(), [turn.seconds for turn in turns]
    try:
        with memory_errors():
            turns[0].seat.load(model)
            return _Lockstep(model, turns).run()
    except ClientFailure as failure:
        return [ClientFailure(f"{failure}; or a smaller run.lockstep, as {len(turns)} clients were trained together")] * len(turns)
    finally:
        synchronize(model.device)
        own = [turn.seconds - earlier for turn, earlier in zip(turns, before)]      # already counted: their scores after an epoch
        for turn in turns:
            turn.seconds += (time.perf_counter() - started - sum(own)) / len(turns)


class _Trainee:
    """A client that is trained together with others: its parameters, its batches, and what it has done so far."""

    def __init__(self, number: int, model: ExpertModel, turn: Turn, settings: Stage) -> None:
        client, training = turn.client, turn.training
        self.number, self.turn, self.training = number, turn, training
        self.named = training.named(turn.seat.params)
        self.part, self.rows = client.train, torch.arange(len(client.train))
        self._batches = batches_of(model, self.part, self.rows, settings,
                                   generator(client.seed(training.message, "shuffle")), training.epochs)
        self.total, self.seen, self.done = 0.0, 0, 0
        self.batch = torch.empty(0, dtype=torch.int64)
        self.loss = 0.0         # of the batch
        self.end: Trained | ClientFailure | None = None

    def next(self) -> bool:
        """Take the next batch; return whether there is one."""
        batch = None if self.end is not None else next(self._batches, None)
        if batch is not None:
            self.batch, self.loss = batch, 0.0
        return batch is not None

    @property
    def after_epoch(self) -> Callable[[], None] | None:
        """What to call before the next step, if an epoch has just ended."""
        return self.training.after_epoch if self.done and self.done % len(self.rows) == 0 else None


class _Lockstep:
    """The training of clients whose seats have the same layout; the loop of `train` for all of them at once."""

    def __init__(self, model: ExpertModel, turns: Sequence[Turn]) -> None:
        self.model, self.config = model, turns[0].client.config
        self.stage = turns[0].training.message.stage
        self.settings = getattr(self.config, self.stage)
        self.clients = SideBySide(model, [turn.seat for turn in turns])
        self.trainees = [_Trainee(number, model, turn, self.settings) for number, turn in enumerate(turns)]
        params = [p for trainee in self.trainees for p in trainee.named.values()]
        # One fused call for the parameters of all clients. Those of a client that has no gradient stay as they are.
        self.optimizer = torch.optim.AdamW(params, lr=turns[0].training.lr, weight_decay=self.settings.weight_decay, fused=True)
        self.keeps = self.config.clients.optimizer == "kept"
        if self.keeps:
            for trainee, turn in zip(self.trainees, turns):
                load_moments(self.optimizer, trainee.named, turn.private.tensors, self.stage)

    def run(self) -> list[Trained | ClientFailure]:
        """Train until no client has a batch left."""
        running = self.trainees
        while running := [trainee for trainee in running if self._has_next(trainee)]:
            self._step(running)
        return [trainee.end or self._finished(trainee) for trainee in self.trainees]

    def _has_next(self, trainee: _Trainee) -> bool:
        after_epoch = trainee.after_epoch
        if not trainee.next():
            return False
        if after_epoch is not None:
            self._score(trainee, after_epoch)
        return True

    def _score(self, trainee: _Trainee, after_epoch: Callable[[], None]) -> None:
        with trainee.turn.charged(self.model):
            trainee.turn.seat.load(self.model)
            after_epoch()

    def _step(self, running: Sequence[_Trainee]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        micro_batch = self.settings.micro_batch or self.settings.batch
        for pieces in zip_longest(*(trainee.batch.split(micro_batch) for trainee in running)):
            self._accumulate([(trainee, rows) for trainee, rows in zip(running, pieces) if rows is not None])
        norms = torch.stack([torch.nn.utils.clip_grad_norm_(list(trainee.named.values()), self.settings.clip or float("inf"))
                             for trainee in running]).tolist()
        for trainee, norm in zip(running, norms):
            self._judge(trainee, norm)
        self.optimizer.step()

    def _accumulate(self, pieces: Sequence[tuple[_Trainee, Tensor]]) -> None:
        """Add the gradients of a micro-batch of each client. The sum of the losses gives each client's parameters the gradient
        of its own."""
        model = self.model
        losses = self.clients.losses({trainee.number: rows for trainee, rows in pieces})
        for number, (trainee, rows) in enumerate(pieces):
            penalty = trainee.training.penalty
            if penalty is not None:
                losses[number] = losses[number] + penalty.of(trainee.turn.seat.params, penalty.anchors)
            losses[number] = losses[number] * (model.count_units(trainee.part, rows) / model.count_units(trainee.part, trainee.batch))
            before = model.meter.flops
            trainee.turn.seat.charge(rows)
            trainee.turn.flops += model.meter.flops - before
        together = torch.stack(losses)
        together.sum().backward()
        for (trainee, _), loss in zip(pieces, together.detach().tolist()):
            trainee.loss += loss

    def _judge(self, trainee: _Trainee, norm: float) -> None:
        """Count a client's step, or take the client out if it diverges."""
        if not (math.isfinite(trainee.loss) and math.isfinite(norm)):
            trainee.end = diverged(self.stage, trainee.loss, norm, trainee.done)
            for p in trainee.named.values():
                p.grad = None
            return
        units = self.model.count_units(trainee.part, trainee.batch)
        trainee.total, trainee.seen = trainee.total + trainee.loss * units, trainee.seen + units
        trainee.done += len(trainee.batch)

    def _finished(self, trainee: _Trainee) -> Trained:
        if trainee.training.after_epoch is not None:
            self._score(trainee, trainee.training.after_epoch)
        moments = moments_of(self.optimizer, trainee.named, self.stage) if self.keeps else {}
        return Trained(trainee.total / max(trainee.seen, 1), moments, sum(p.numel() for p in trainee.named.values()))
