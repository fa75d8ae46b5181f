"""Buffered rounds in one process: the order in which replies arrive, which no network decides here."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedms.config import ConfigError, RunConfig
from fedms.engines.base import Arrival, Engine
from fedms.engines.buffered import Courier, Sent
from fedms.federated.client import Message
from fedms.seeds import generator
from fedms.storage.records import RunRecords


class Order(ABC):
    """Decides in which order the replies of clients arrive."""

    def sent(self, message: Message, clients: Sequence[int]) -> None:
        """Note that clients were sent a round's message."""

    @abstractmethod
    def next(self, at_work: Collection[int], now: Message) -> tuple[int, str | None]:
        """Return the client that answers next, and the reason why its answer does not count; None if it may."""

    def plain(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain data."""
        return {}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Restore what `plain` returned."""


class Drawn(Order):
    """Draws the time of each visit by `run.seed`: |x|, where x has a standard normal distribution. Nguyen et al. (2022) report
    that the times of a fleet of devices are distributed like this."""

    def __init__(self, seed: int) -> None:
        self.seed, self.clock = seed, 0.0
        self.due: dict[int, float] = {}         # when a client's reply arrives

    def sent(self, message: Message, clients: Sequence[int]) -> None:
        for client in clients:
            draw = generator(self.seed, "duration", message.stage, message.round, client)
            self.due[client] = self.clock + abs(float(torch.randn((), generator=draw, dtype=torch.float64)))

    def next(self, at_work: Collection[int], now: Message) -> tuple[int, str | None]:
        client = min(at_work, key=lambda each: (self.due[each], each))
        self.clock = self.due[client]
        return client, None

    def plain(self) -> dict[str, Any]:
        return {"clock": self.clock, "due": {str(client): time for client, time in self.due.items()}}

    def restore(self, plain: Mapping[str, Any]) -> None:
        self.clock, self.due = plain["clock"], {int(client): time for client, time in plain["due"].items()}


class Recorded(Order):
    """Repeats the order of another run's records, with its failures, so that a run of a federation can be computed again.

    Args:
        folder: The run folder.

    Raises:
        RunFolderError: If the folder cannot be read.
        ConfigError: If the rounds of that run were not buffered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.visits: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        for visit in RunRecords.read(folder).visits:
            if visit.get("staleness") is None:
                raise ConfigError(f"clients.arrivals: the rounds of {folder} were not buffered (clients.asynchronous)")
            self.visits.setdefault((visit["stage"], visit["round"]), []).append(visit)
        self.taken: dict[str, int] = {}         # visits of a round that have been repeated

    def next(self, at_work: Collection[int], now: Message) -> tuple[int, str | None]:
        where = f"{now.stage} {now.round}"
        number, visits = self.taken.get(where, 0), self.visits.get((now.stage, now.round), [])
        if number >= len(visits) or visits[number]["client"] not in at_work:
            found = f"client {visits[number]['client']}" if number < len(visits) else "nobody"
            raise ConfigError(f"clients.arrivals: in {self.folder} {found} answers next in {now.stage}, round {now.round}, and here "
                              f"the clients {', '.join(map(str, sorted(at_work)))} are at work; the two runs must have the same run "
                              "file, and clients that all took part from its beginning")
        self.taken[where] = number + 1
        visit = visits[number]
        return visit["client"], None if visit["status"] == "ok" else visit["reason"] or "it failed"

    def plain(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, plain: Mapping[str, Any]) -> None:
        self.taken = dict(plain["taken"])


class Simulated(Courier):
    """Visits the clients of this process, each when its reply is the next one to arrive."""

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self.engine, arrivals = engine, config.clients.arrivals
        self.order: Order = Drawn(config.run.seed) if arrivals is None else Recorded(Path(arrivals))

    def send(self, sent: Sent, clients: Sequence[int]) -> None:
        self.order.sent(sent.message, clients)

    def receive(self, at_work: Mapping[int, Sent], now: Message) -> Arrival:
        client, reason = self.order.next(at_work, now)
        if reason is not None:
            return Arrival(client, None, 0, 0, reason)
        sent = at_work[client]
        return next(iter(self.engine.visits(sent.message, sent.packed, [client])))

    def plain(self) -> dict[str, Any]:
        return self.order.plain()

    def restore(self, plain: Mapping[str, Any]) -> None:
        self.order.restore(plain)
