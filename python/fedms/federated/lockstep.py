"""Visits of several clients side by side on one model (`[run] lockstep`).

A visit can be written as a generator that asks for its trainings instead of carrying them out: it loads the client's tensors,
yields a `Training`, and goes on with the model as the training left it. `alone` carries out the trainings of one visit as they
come. `together` carries out many visits: each goes on by itself until it asks for a training, then all of these are done at once,
step by step, and so on. In a step each client has a batch of its own, its own loss, gradient norm and optimizer state; the
clients share the frozen products and the launches of kernels. One that has no batch left waits for the others.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from fedms.federated.client import Client, ClientFailure, Message, Private, Reply, Visit, memory_errors, outcome_of
from fedms.federated.local_training import Group, Steps, Trained, Trainee, train
from fedms.training.device import peak, reset_peak, synchronize
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import Proximal, own_loss_of
from fedms.training.seats import Seat, SideBySide


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
        return train(model, client, self.message, private, [Group(self.named(params), self.lr)],
                     own if self.penalty is None else lambda part: self.penalty.added_to(own(part), params),
                     epochs=self.epochs, after_epoch=self.after_epoch)


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

    def trainee(self, model: ExpertModel) -> Trainee:
        """Return the client as one in the training that the visit waits for."""
        training = self.training

        def after_epoch() -> None:
            with self.charged(model):
                self.seat.load(model)
                training.after_epoch()

        group = Group(training.named(self.seat.params), training.lr)
        return Trainee(model, self.client, training.message, self.private, [group], epochs=training.epochs,
                       after_epoch=after_epoch if training.after_epoch else None)

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
            return Steps(model, [turn.trainee(model) for turn in turns], _SharedPass(model, turns)).run()
    except ClientFailure as failure:
        return [ClientFailure(f"{failure}; or a smaller run.lockstep, as {len(turns)} clients were trained together")] * len(turns)
    finally:
        synchronize(model.device)
        own = [turn.seconds - earlier for turn, earlier in zip(turns, before)]      # already counted: their scores after an epoch
        for turn in turns:
            turn.seconds += (time.perf_counter() - started - sum(own)) / len(turns)


class _SharedPass:
    """Computes the gradients of clients whose seats have the same layout, all in one pass; see `Steps`."""

    def __init__(self, model: ExpertModel, turns: Sequence[Turn]) -> None:
        self.model, self.turns = model, turns
        self.clients = SideBySide(model, [turn.seat for turn in turns])

    def __call__(self, running: Mapping[int, Trainee], _: torch.amp.GradScaler) -> None:
        batches = [trainee.batch.split(trainee.micro_batch) for trainee in running.values()]
        for pieces in zip_longest(*batches):
            self._accumulate(running, {number: rows for number, rows in zip(running, pieces) if rows is not None})

    def _accumulate(self, running: Mapping[int, Trainee], pieces: Mapping[int, Tensor]) -> None:
        """Add the gradients of a micro-batch of each client. The sum of the losses gives each client's parameters the gradient
        of its own."""
        model, losses = self.model, []
        for (number, rows), loss in zip(pieces.items(), self.clients.losses(pieces)):
            turn, trainee = self.turns[number], running[number]
            if (penalty := turn.training.penalty) is not None:
                loss = loss + penalty.of(turn.seat.params, penalty.anchors)
            losses.append(loss * (model.count_units(trainee.part, rows) / model.count_units(trainee.part, trainee.batch)))
            before = model.meter.flops
            turn.seat.charge(rows)
            turn.flops += model.meter.flops - before
        together = torch.stack(losses)
        together.sum().backward()
        for number, loss in zip(pieces, together.detach()):
            running[number].losses.append(loss)
