"""The embedded engine: server and clients in one process, one resident model, clients visited one after the other."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedms import wire
from fedms.checkpoint import CheckpointFolder, Snapshot, pack_server, unpack_server
from fedms.client import Client, ClientFailure, Message, Private, Reply
from fedms.meter import peak_memory, reset_peak_memory
from fedms.methods import Method
from fedms.progress import Progress
from fedms.records import RunFolder
from fedms.resident import ResidentModel, Tensors
from fedms.server import Collected, Server, ServerState


class Interrupted(Exception):
    """A run was asked to stop and did so between two clients; everything is in its checkpoint."""


class LocalEngine:
    """Runs the rounds of one run, with a checkpoint after each.

    Args:
        method, server, model: what to run, and on which resident model.
        clients: participating clients; client i has id i.
        folder: where rounds and visits are recorded, and checkpoints kept.
        stop: asked between clients whether the run shall stop.
    """

    def __init__(self, method: Method, server: Server, model: ResidentModel, clients: Sequence[Client],
                 folder: RunFolder, progress: Progress, stop: Callable[[], bool] = lambda: False) -> None:
        self.method, self.server, self.model, self.clients = method, server, model, clients
        self.folder, self.progress, self.stop = folder, progress, stop
        self.encoding = server.config.wire.dtype
        self.checkpoints = CheckpointFolder(folder.path / "checkpoint")
        self.private = {client.id: Private() for client in clients}
        self.received: set[tuple[str, int]] = set()      # (stage, client) that have the stage's constants
        self.visited = 0                                 # clients of the round under way that have been visited
        self.sent = {"bytes_up": 0, "bytes_down": 0}     # in the round under way
        self.slowest: float | None = None                # simulated seconds of its slowest client
        self.started = time.perf_counter()
        self.seconds_before = 0.0                        # spent on the run by processes before this one

    def run(self, tensors: Tensors) -> ServerState:
        """All rounds, from the folder's checkpoint if it has one, else from these initial tensors; returns the state
        after the last round.

        Raises:
            AllClientsFailed: if no client of a round could train.
            Interrupted: if asked to stop.
            CheckpointError, RunFolderError: if the folder cannot be written, or its checkpoints cannot be read.
        """
        state, collected = self._restore() or (self.server.start(tensors), self.server.collect())
        while state.stage != "done":
            started = time.perf_counter()
            self._visit_clients(state, collected)
            state, record = self.server.step(state, collected)
            record.update(self.sent, simulated_seconds=self.slowest, seconds=time.perf_counter() - started)
            self.folder.append_round(record)
            self.visited, self.sent, self.slowest = 0, dict.fromkeys(self.sent, 0), None
            collected = self.server.collect()
            self._save(state, collected)
            self.progress.round(**record)
        return state

    def _visit_clients(self, state: ServerState, collected: Collected) -> None:
        message, sizes = self._send(self.server.message(state))
        for client_id in message.clients[self.visited:]:
            if self.stop():
                self._save(state, collected)
                raise Interrupted(f"{message.stage}, round {message.round}, {self.visited} of {len(message.clients)} "
                                  "clients visited")
            reply, visit = self._visit(self.clients[client_id], message, sizes)
            if reply is not None:
                collected.add(reply)
            self.visited += 1
            for key in self.sent:
                self.sent[key] += visit[key]
            if (simulated := visit.get("simulated_seconds")) is not None:
                self.slowest = max(simulated, self.slowest or 0.0)
            self.folder.append_visit(visit)
            self.progress.visit(**visit)

    def _send(self, message: Message) -> tuple[Message, tuple[int, int]]:
        """A message as it arrives, and the bytes of what is sent every time and of what is sent once a stage."""
        tensors, constants = (wire.pack(t, self.encoding) for t in (message.tensors, message.constants))
        sizes = (len(tensors) if message.tensors else 0, len(constants) if message.constants else 0)
        return replace(message, tensors=wire.unpack(tensors), constants=wire.unpack(constants)), sizes

    def _receive(self, reply: Reply, message: Message) -> tuple[Reply, int]:
        """A reply as it arrives, and its bytes.

        Raises:
            ClientFailure: if its tensors are not some of those that were sent, or not finite.
        """
        tensors, sums = wire.pack(reply.tensors, self.encoding), wire.pack(reply.sums)
        size = (len(tensors) if reply.tensors else 0) + (len(sums) if reply.sums else 0)
        reply = replace(reply, tensors=wire.unpack(tensors), sums=wire.unpack(sums))
        sent = {name: tuple(message.tensors[name].shape) for name in reply.tensors if name in message.tensors}
        try:
            wire.check(reply.tensors, sent)
        except wire.WireError as error:
            raise ClientFailure(f"its reply is refused: {error}") from None
        return reply, size

    def final_message(self, state: ServerState) -> Message:
        """What a client has in the end: the server's tensors as they arrive."""
        return self._send(self.server.message(state))[0]

    def _visit(self, client: Client, message: Message, sizes: tuple[int, int]) -> tuple[Reply | None, dict]:
        record = {"stage": message.stage, "round": message.round, "client": client.id, "status": "ok", "reason": None,
                  "depth": client.trained_depth(message), "n_train": len(client.train), "bytes_up": 0, "bytes_down": 0}
        if len(client.train) == 0:
            return None, {**record, "status": "skipped", "reason": "no training samples", "seconds": 0.0}
        first = (message.stage, client.id) not in self.received
        self.received.add((message.stage, client.id))
        record["bytes_down"] = sum(sizes) if first else sizes[0]
        flops, started = self.model.flops, time.perf_counter()
        reset_peak_memory()
        self.model.clear()
        reply = None
        try:
            with _memory_errors():
                answer, after = self.method.client_step(self.model, client, self.private[client.id], message)
            reply, record["bytes_up"] = self._receive(answer, message)
        except ClientFailure as failure:
            record.update(status="failed", reason=str(failure))
        else:
            self.private[client.id] = after
            record.update(reply.metrics)
            record["trained_percent"] = 100 * record["trained_params"] / self.model.fm_params
        record.update(flops=self.model.flops - flops, seconds=time.perf_counter() - started,
                      peak_memory_bytes=peak_memory())
        record["simulated_seconds"] = client.device.seconds(record["flops"], record["bytes_up"], record["bytes_down"])
        return reply, record

    # Checkpoints

    def _save(self, state: ServerState, collected: Collected) -> None:
        server, tensors = pack_server(state, collected)
        self.checkpoints.save(Snapshot(
            {"server": server, "visited": self.visited, "sent": self.sent, "slowest": self.slowest,
             "received": sorted(self.received), "charged": sorted(self.model.charged), "records": self.folder.sync(),
             "seconds": self.seconds_before + time.perf_counter() - self.started},
            tensors, {client: private.tensors for client, private in self.private.items()}))

    def _restore(self) -> tuple[ServerState, Collected] | None:
        snapshot, notes = self.checkpoints.load()
        for note in notes:
            self.progress.note(note)
        if snapshot is None:
            self.folder.rewind({})
            return None
        saved = snapshot.state
        self.visited, self.sent, self.slowest = saved["visited"], saved["sent"], saved["slowest"]
        self.received = {(stage, client) for stage, client in saved["received"]}
        self.model.charged = set(saved["charged"])
        self.seconds_before = saved["seconds"]
        self.private = {client: Private(tensors) for client, tensors in snapshot.private.items()}
        self.folder.rewind(saved["records"])
        state, collected = unpack_server(saved["server"], snapshot.tensors)
        where = "all rounds are done" if state.stage == "done" else f"{state.stage}, round {state.round}"
        self.progress.note(f"going on from the checkpoint: {where}")
        return state, collected


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A client that runs out of memory fails; the run goes on without it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:        # torch's CPU allocator raises a plain RuntimeError
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise ClientFailure("out of memory; a smaller batch, sal.max_depth or sal.cache_bytes may help") from error
        raise
