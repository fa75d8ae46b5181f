"""The embedded engine: server and clients in one process, one resident model, clients visited one after the other."""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from fedms.client import Client, ClientFailure, Message, Private, Reply
from fedms.meter import peak_memory, reset_peak_memory
from fedms.methods import Method
from fedms.progress import Progress
from fedms.records import RunFolder
from fedms.resident import ResidentModel, Tensors
from fedms.server import Server, ServerState


class LocalEngine:
    """Runs the rounds of one run.

    Args:
        method, server, model: what to run, and on which resident model.
        clients: participating clients; client i has id i.
        folder: where rounds and visits are recorded.
    """

    def __init__(self, method: Method, server: Server, model: ResidentModel, clients: Sequence[Client],
                 folder: RunFolder, progress: Progress) -> None:
        self.method, self.server, self.model, self.clients = method, server, model, clients
        self.folder, self.progress = folder, progress
        self.private = {client.id: Private() for client in clients}
        self.received: set[tuple[str, int]] = set()      # (stage, client) that have the stage's constants
        self.visits: list[dict] = []                     # of the round under way

    def run(self, state: ServerState) -> ServerState:
        """All rounds from `state` on; returns the state after the last one.

        Raises:
            AllClientsFailed: if no client of a round could train.
        """
        while state.stage != "done":
            started = time.perf_counter()
            self.visits = []
            state, record = self.server.step(state, self._replies(self.server.message(state)))
            for key in ("bytes_up", "bytes_down"):
                record[key] = sum(visit[key] for visit in self.visits)
            record["seconds"] = time.perf_counter() - started
            self.folder.append_round(record)
            self.progress.round(**record)
        return state

    def _replies(self, message: Message) -> Iterator[Reply]:
        for client_id in message.clients:
            reply, visit = self._visit(self.clients[client_id], message)
            self.visits.append(visit)
            self.folder.append_visit(visit)
            self.progress.visit(**visit)
            if reply is not None:
                yield reply

    def _visit(self, client: Client, message: Message) -> tuple[Reply | None, dict]:
        record = {"stage": message.stage, "round": message.round, "client": client.id, "status": "ok", "reason": None,
                  "depth": client.trained_depth(message), "n_train": len(client.train), "bytes_up": 0, "bytes_down": 0}
        if len(client.train) == 0:
            return None, {**record, "status": "skipped", "reason": "no training samples", "seconds": 0.0}
        record["bytes_down"] = self._bytes_down(client, message)
        flops, started = self.model.flops, time.perf_counter()
        reset_peak_memory()
        self.model.clear()
        reply = None
        try:
            reply, after = self.method.client_step(self.model, client, self.private[client.id], message)
        except ClientFailure as failure:
            record.update(status="failed", reason=str(failure))
        else:
            self.private[client.id] = after
            record.update(reply.metrics, bytes_up=nbytes(reply.tensors) + nbytes(reply.sums))
            record["trained_percent"] = 100 * record["trained_params"] / self.model.fm_params
        record.update(flops=self.model.flops - flops, seconds=time.perf_counter() - started,
                      peak_memory_bytes=peak_memory())
        return reply, record

    def _bytes_down(self, client: Client, message: Message) -> int:
        """What travels to this client: the message's tensors, and the stage's constants at the client's first visit."""
        first = (message.stage, client.id) not in self.received
        self.received.add((message.stage, client.id))
        return nbytes(message.tensors) + (nbytes(message.constants) if first else 0)


def nbytes(tensors: Tensors) -> int:
    return sum(t.nbytes for t in tensors.values())
