"""Buffered rounds, on any engine (`[clients] asynchronous`): a round goes on after so many replies, whoever they are from.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (FedBuff). As many clients as a
round samples are at work at a time. When `clients.buffer` of them have answered, the server averages their replies, and
draws others for the seats that are free; who is still at work answers in a later round, with a weight that falls with its
age (`fedms.federated.server.carried`). The same order of arrivals gives the same bits, on every engine.

What the paper leaves open is our choice:
- clients are drawn for free seats when a round begins, not one by one as replies come;
- a client that fails, or does not answer in time, leaves its seat free until the next round; a round that nobody is left
  to answer ends with the replies that it has, if `clients.quorum`, here a share of the buffer, is content with them;
- replies to messages of stage 1 are dropped when stage 2 begins: what they trained is frozen then;
- the score that activates blocks is of the model that each client received, whatever its age.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedms.federated.client import Message
from fedms.federated.packing import Packed, pack_message, unpack_message
from fedms.federated.server import Collected, Server, ServerState
from fedms.tensors import Tensors, under

if TYPE_CHECKING:
    from fedms.engines.base import Arrival, Engine


@dataclass(frozen=True)
class Sent:
    """A round's message, as it was packed and as it arrives."""

    packed: Packed
    message: Message


class Courier(ABC):
    """Brings messages to clients, and their replies in the order in which they arrive."""

    @abstractmethod
    def send(self, sent: Sent, clients: Sequence[int]) -> None:
        """Send a round's message to clients (ids, ascending)."""

    @abstractmethod
    def receive(self, at_work: Mapping[int, Sent], now: Message) -> Arrival:
        """Return the next reply of one of the clients at work, or the reason why there will be none from it.

        Args:
            at_work: Their messages, by client.
            now: The message of the round that is under way.

        Raises:
            Interrupted: If asked to stop.
        """

    def plain(self) -> dict[str, Any]:
        """Return what must be in a checkpoint: plain data."""
        return {}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the counterpart of :meth:`plain`."""


class BufferedRounds:
    """The rounds of one run.

    Args:
        engine: Carries the messages.
        server: The server's side.
        courier: The engine's.
    """

    def __init__(self, engine: Engine, server: Server, courier: Courier) -> None:
        self.engine, self.server, self.courier = engine, server, courier
        self.at_work: dict[int, int] = {}           # round of the message that a client works on
        self.sent: dict[int, Sent] = {}             # by round, as long as a client works on it
        self.begun: tuple[str, int] | None = None   # the round under way

    def visit_clients(self, state: ServerState, collected: Collected) -> None:
        """Take in replies until the round has as many as it waits for, or nobody is at work.

        Raises:
            Interrupted: If asked to stop.
        """
        if self.begun != (state.stage, state.round):
            self._begin(state)
        now = self.sent[state.round].message
        while len(collected.numbers) < self.server.awaited() and self.at_work:
            self.engine.check_stop(now)
            arrival = self.courier.receive({client: self.sent[number] for client, number in self.at_work.items()}, now)
            message = self.sent[self.at_work.pop(arrival.client)].message
            visit = self.engine.judge(arrival, message, self.engine.participant(arrival.client), collected, now)
            self._note(visit, now, message)

    def _begin(self, state: ServerState) -> None:
        """Draw clients for the free seats, and send them the round's message."""
        engine, server = self.engine, self.server
        if self.begun is not None and self.begun[0] != state.stage and self.at_work:
            engine.progress.note(f"{state.stage} begins: replies of clients {', '.join(map(str, sorted(self.at_work)))} to "
                                 f"messages of {self.begun[0]} are not waited for")
            self.at_work.clear()
        server.members = engine.members()
        message = server.message(state, self.at_work)
        packed = pack_message(message, engine.encoding)
        kept = {number: sent for number, sent in self.sent.items() if number in self.at_work.values()}
        sent = Sent(packed, unpack_message(packed))
        reached = engine.prepare(message)
        due = [client for client in message.clients if client in reached and reached[client].n_train]
        self.sent = {**kept, state.round: sent}
        self.courier.send(sent, due)
        self.at_work |= dict.fromkeys(due, state.round)
        self.begun = (state.stage, state.round)
        for client in message.clients:
            if client not in due:
                self._note(engine.absent(message, client, reached.get(client)), message, message)

    def _note(self, visit: Mapping[str, Any], now: Message, message: Message) -> None:
        self.engine.note_visit({**visit, "round": now.round, "staleness": now.round - message.round})

    # Checkpoints

    def plain(self) -> dict[str, Any]:
        """Return what must be in a checkpoint: plain data."""
        return {"begun": self.begun, "at_work": {str(client): number for client, number in self.at_work.items()},
                "sent": {str(number): sent.packed.head for number, sent in self.sent.items()}, "courier": self.courier.plain()}

    def tensors(self) -> Tensors:
        """Return what must be in a checkpoint: the messages' buffers, as bytes."""
        return {f"{number}/{name}": torch.from_numpy(np.frombuffer(data, np.uint8).copy())
                for number, sent in self.sent.items() for name, data in sent.packed.parts.items()}

    def restore(self, plain: Mapping[str, Any], tensors: Tensors) -> None:
        """Go on from a checkpoint; the counterpart of :meth:`plain` and :meth:`tensors`."""
        self.begun = None if plain["begun"] is None else (plain["begun"][0], plain["begun"][1])
        self.at_work = {int(client): number for client, number in plain["at_work"].items()}
        self.sent = {}
        for number, head in plain["sent"].items():
            packed = Packed(dict(head), {name: data.numpy().tobytes() for name, data in under(f"{number}/", tensors).items()})
            self.sent[int(number)] = Sent(packed, unpack_message(packed))
        self.courier.restore(plain["courier"])
