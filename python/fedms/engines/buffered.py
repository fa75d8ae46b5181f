"""Buffered rounds, on any engine (`[clients] asynchronous`): a round ends after a given number of replies from any clients.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (FedBuff). As many clients as a
round samples are at work at a time. When `clients.buffer` of them have answered, the server averages their replies and
samples new clients for the free seats. A client that is still at work answers in a later round, and the weight of its reply
decreases with its age (`fedms.federated.server.carried`). The same order of arrivals gives the same bits on every engine.

The paper leaves these points open, and we decide them as follows:
- Clients are sampled for free seats when a round begins, not one by one as replies arrive.
- A client that fails, or does not answer in time, leaves its seat free until the next round. A round in which no client is at
  work any more ends with the replies that it has, if they satisfy `clients.quorum`, here a share of the buffer.
- Replies to messages of stage 1 are dropped when stage 2 begins, because the tensors that they trained are frozen then.
- The score that activates blocks is that of the model that each client received, whatever its age.
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
    """The message of a round, packed and as it arrives at a client."""

    packed: Packed
    message: Message


class Courier(ABC):
    """Carries messages to clients, and returns their replies in the order in which they arrive."""

    @abstractmethod
    def send(self, sent: Sent, clients: Sequence[int]) -> None:
        """Send a round's message to clients (ids, ascending)."""

    @abstractmethod
    def receive(self, at_work: Mapping[int, Sent], now: Message) -> Arrival:
        """Return the next reply of one of the clients at work, or the reason why there will be none from it.

        Args:
            at_work: The message that each client works on, by client.
            now: The message of the round that is under way.

        Raises:
            Interrupted: If the run was asked to stop.
        """

    def plain(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain data."""
        return {}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Restore what :meth:`plain` returned."""


class BufferedRounds:
    """The buffered rounds of a run.

    Args:
        engine: The engine.
        server: The server.
        courier: Carries the engine's messages and replies.
    """

    def __init__(self, engine: Engine, server: Server, courier: Courier) -> None:
        self.engine, self.server, self.courier = engine, server, courier
        self.at_work: dict[int, int] = {}           # round of the message that a client works on
        self.sent: dict[int, Sent] = {}             # by round, as long as a client works on it
        self.begun: tuple[str, int] | None = None   # the round under way

    def visit_clients(self, state: ServerState, collected: Collected) -> None:
        """Collect replies until the round has as many as it waits for, or no client is at work.

        Raises:
            Interrupted: If the run was asked to stop.
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
        """Sample clients for the free seats, and send them the message of the round."""
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
        """Return the state for a checkpoint, as plain data, without the buffers of messages."""
        return {"begun": self.begun, "at_work": {str(client): number for client, number in self.at_work.items()},
                "sent": {str(number): sent.packed.head for number, sent in self.sent.items()}, "courier": self.courier.plain()}

    def tensors(self) -> Tensors:
        """Return the buffers of the messages for a checkpoint, as uint8 tensors."""
        return {f"{number}/{name}": torch.from_numpy(np.frombuffer(data, np.uint8).copy())
                for number, sent in self.sent.items() for name, data in sent.packed.parts.items()}

    def restore(self, plain: Mapping[str, Any], tensors: Tensors) -> None:
        """Restore what :meth:`plain` and :meth:`tensors` returned."""
        self.begun = None if plain["begun"] is None else (plain["begun"][0], plain["begun"][1])
        self.at_work = {int(client): number for client, number in plain["at_work"].items()}
        self.sent = {}
        for number, head in plain["sent"].items():
            packed = Packed(dict(head), {name: data.numpy().tobytes() for name, data in under(f"{number}/", tensors).items()})
            self.sent[int(number)] = Sent(packed, unpack_message(packed))
        self.courier.restore(plain["courier"])
