"""Buffered rounds over Flower, where replies are used in the order in which they arrive."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedms.engines.base import Arrival
from fedms.engines.buffered import Courier, Sent
from fedms.engines.flower.answers import Answer, Asked, Pauses, not_taken
from fedms.federated.client import Message

if TYPE_CHECKING:
    from fedms.engines.flower.server import FlowerEngine


class FlowerCourier(Courier):
    """Sends messages through the grid of an engine.

    Messages under way are lost with the server's process. A server that continues sends them again to the same clients, which
    then compute the same replies.
    """

    def __init__(self, engine: FlowerEngine) -> None:
        self.engine = engine
        self.waiting: dict[str, Asked] = {}         # by message
        self.came: list[Answer] = []                # answers that came together wait for their turn, by id

    def send(self, sent: Sent, clients: Sequence[int]) -> None:
        for number in [number for number, what in self.waiting.items() if what.client in clients]:
            self.engine.give_up(self.waiting, number)       # of a stage that is over
        group = f"{sent.message.stage} {sent.message.round}"
        asked, lost = self.engine.send("train", group, clients, sent.packed, {})
        self.waiting |= asked
        self.came += [not_taken(client) for client in lost]

    def receive(self, at_work: Mapping[int, Sent], now: Message) -> Arrival:
        pauses = Pauses()
        while True:
            self.engine.check_stop(now)
            under_way = {what.client for what in self.waiting.values()} | {answer.client for answer in self.came}
            if lost := sorted(at_work.keys() - under_way):
                there = self.engine.meet(lost, now)
                for client in lost:
                    if client not in there:
                        return Arrival(client, None, 0, 0, "it could not be reached")
                    self.send(at_work[client], [client])
            self.came = [answer for answer in self.came if answer.client in at_work]
            if self.came:
                answer = self.came.pop(0)
                sent = at_work[answer.client]
                return self.engine.arrival(answer, sent.message, sent.packed)
            self.came = sorted(self.engine.arrived(self.waiting), key=lambda answer: answer.client)
            if not self.came:
                pauses.sleep()
