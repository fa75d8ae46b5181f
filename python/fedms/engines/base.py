"""The base class of engines: the rounds of a run, their records and their checkpoints.

An engine defines how a message reaches clients and how their replies come back.
"""
from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fedms.engines.buffered import BufferedRounds, Courier
from fedms.errors import CheckpointError, Interrupted
from fedms.federated.client import Message, Participant, Share, Visit
from fedms.federated.packing import Packed, pack_message, unpack_message
from fedms.federated.schema import REASON
from fedms.foreign import printable
from fedms.federated.server import Collected, RejectedReply, Server, ServerState
from fedms.progress import Progress, validation_perplexity
from fedms.federated.server_state import pack_server, unpack_server
from fedms.storage.checkpoint import CheckpointFolder, Snapshot
from fedms.storage.run_folder import RunFolder
from fedms.tensors import Tensors, prefixed, under

if TYPE_CHECKING:
    from fedms.engines.private import PrivateRounds
    from fedms.federated.private_server import PrivateServer
    from fedms.privacy.secure_round import Question


@dataclass(frozen=True)
class Arrival:
    """The result of sending a message to a client.

    Attributes:
        client: Id of the client.
        visit: The visit as the client reports it, or None if nothing usable came back.
        bytes_up, bytes_down: Bytes received and sent.
        reason: Why there is no visit, or None.
        after: Private to the engine: where to find the client's private state if the visit is accepted.
        share: The client's reply in a run with privacy, which takes the place of a visit.
    """

    client: int
    visit: Visit | None
    bytes_up: int
    bytes_down: int
    reason: str | None = None
    after: Any = None
    share: Share | None = None


@dataclass(frozen=True)
class Evaluation:
    """A client's record in `clients.jsonl`, and its score on the common test set if that was requested."""

    record: dict[str, Any]
    on_common_test: float | None


class Engine(ABC):
    """Runs the rounds of a run and writes a checkpoint after each.

    Args:
        server: The server.
        fm_params: Number of parameters of the foundation model, for the share of trained ones.
        folder: The run folder, which holds the records and the checkpoints.
        progress: Shows the progress.
        stop: Called between clients; returns whether to stop the run.
    """

    def __init__(self, server: Server, fm_params: int, folder: RunFolder, progress: Progress,
                 stop: Callable[[], bool]) -> None:
        self.server, self.fm_params = server, fm_params
        self.folder, self.progress, self.stop = folder, progress, stop
        self.encoding = server.config.wire.dtype
        self.checkpoints = CheckpointFolder(folder.path / "checkpoint")
        self.received: set[tuple[str, int]] = set()      # (hash of constants, client that has them)
        self.visited = 0                                 # clients of the round under way that have been visited
        self.sent = {"bytes_up": 0, "bytes_down": 0}     # in the round under way
        self.slowest: float | None = None                # simulated seconds of its slowest client
        self.elsewhere: float | None = None              # seconds that passed in other runs, see `Visit`
        self.started = time.perf_counter()
        self.seconds_before = 0.0                        # spent on the run by processes before this one
        self.private_rounds: PrivateRounds | None = None
        self.buffered: BufferedRounds | None = None
        if server.config.privacy.mode != "off":
            from fedms.engines.private import PrivateRounds

            self.private_rounds = PrivateRounds(self, cast("PrivateServer", server))
        if server.config.clients.asynchronous:
            self.buffered = BufferedRounds(self, server, self.courier())

    @property
    def private_server(self) -> PrivateServer:
        """The server of a run with privacy."""
        assert self.private_rounds is not None
        return self.private_rounds.server

    # What an engine implements

    @abstractmethod
    def prepare(self, message: Message) -> Mapping[int, Participant]:
        """Begin a round and return those of its clients that can be reached."""

    @abstractmethod
    def visits(self, message: Message, packed: Packed, clients: Sequence[int]) -> Iterator[Arrival]:
        """Send a message to clients and yield their results in the given order.

        Args:
            message: The message as it arrives at a client.
            packed: The same message, encoded.
            clients: Ids, in ascending order.

        Raises:
            Interrupted: If the run was asked to stop.
        """

    @abstractmethod
    def courier(self) -> Courier:
        """Return the courier that carries the messages and replies of buffered rounds."""

    @abstractmethod
    def participant(self, client: int) -> Participant:
        """Return what the server knows about a client that has been reached."""

    @abstractmethod
    def exchange(self, message: Message, attempt: int,
                 questions: Mapping[int, Question]) -> Mapping[int, Mapping[str, bytes]]:
        """Send the questions of one phase of a secure sum to clients, and return the answers that arrive in time, by id.

        Raises:
            Interrupted: If the run was asked to stop.
        """

    @abstractmethod
    def keep(self, arrival: Arrival) -> None:
        """Accept a visit: from now on the client has the private state from after it."""

    @abstractmethod
    def evaluate(self, final: Message, on_common_test: bool) -> Iterator[Evaluation]:
        """Let all clients evaluate their final model, in ascending order of their ids.

        Args:
            final: The server's last message.
            on_common_test: Whether to evaluate on the common test set, too.

        Raises:
            Interrupted: If the run was asked to stop.
        """

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """Return the state of the engine itself for a checkpoint, as plain data."""

    @abstractmethod
    def restore_own(self, state: Mapping[str, Any], private: Mapping[int, Tensors]) -> None:
        """Restore what `own_state` and `private` returned."""

    def members(self) -> Sequence[int]:
        """Return the ids of the participating clients, from which those of a round are sampled. They may change between
        rounds."""
        return range(self.server.config.clients.count)

    def private(self) -> Mapping[int, Tensors]:
        """Return the clients' private tensors, if this process keeps them."""
        return {}

    # The rounds

    def run(self, tensors: Tensors) -> ServerState:
        """Run all rounds, from the checkpoint in the run folder if there is one, otherwise from the initial tensors.

        Returns:
            The state after the last round.

        Raises:
            AllClientsFailed: If too few clients of a round could train.
            Interrupted: If the run was asked to stop.
            CheckpointError, RunFolderError: If the folder cannot be written, or its checkpoints cannot be read.
        """
        state, collected = self._restore() or self._begin(tensors)
        # What the server collects is of the kind that these rounds fill: a PrivateServer, too, goes with its PrivateRounds.
        visit_clients: Callable[[ServerState, Any], None] = (
            self.private_rounds.visit_clients if self.private_rounds else
            self.buffered.visit_clients if self.buffered else self._visit_clients)
        while state.stage != "done":
            started, elsewhere = time.perf_counter(), self.elsewhere or 0.0
            try:
                visit_clients(state, collected)
            except Interrupted:
                self._save(state, collected)
                raise
            state, record = self.server.step(state, collected)
            hidden = self.private_rounds is not None and self.private_rounds.hides_traffic
            record.update(dict.fromkeys(self.sent) if hidden else self.sent, simulated_seconds=self.slowest,
                          seconds=time.perf_counter() - started + (self.elsewhere or 0.0) - elsewhere)
            self.folder.append_round(record)
            self.visited, self.sent, self.slowest = 0, dict.fromkeys(self.sent, 0), None
            collected = self.server.collect(state)
            self._save(state, collected)
            self.progress.round(**self.shown(record))
        return state

    def _begin(self, tensors: Tensors) -> tuple[ServerState, Collected]:
        state = self.server.start(tensors)
        return state, self.server.collect(state)

    def final_message(self, state: ServerState) -> Message:
        """Return the final message as it arrives at a client."""
        return unpack_message(pack_message(self.server.message(state), self.encoding))

    def check_stop(self, message: Message) -> None:
        """Raise Interrupted if the run was asked to stop."""
        if self.stop():
            raise Interrupted("all rounds are done, evaluation is not" if message.stage == "done" else
                              f"{message.stage}, round {message.round}, {self.visited} clients visited")

    def due_to(self, client: int, packed: Packed) -> Packed:
        """Return the message without the constants if the client has them already."""
        return packed.without("constants") if (packed.head.get("constants"), client) in self.received else packed

    def note_received(self, client: int, packed: Packed) -> None:
        if (digest := packed.head.get("constants")) is not None:
            self.received.add((digest, client))

    def _visit_clients(self, state: ServerState, collected: Collected) -> None:
        if not self.visited:
            self.server.members = self.members()
        message = self.server.message(state)
        packed = pack_message(message, self.encoding)
        arrives = unpack_message(packed)
        participants = self.prepare(message)
        due = message.clients[self.visited:]
        reached = [i for i in due if i in participants and participants[i].n_train]
        arrivals = self.visits(arrives, packed, reached)
        for client in due:
            self.check_stop(message)
            participant = participants.get(client)
            visit = (self.judge(next(arrivals), arrives, participant, collected) if client in reached else
                     self.absent(message, client, participant))
            if (simulated := visit.get("simulated_seconds")) is not None:
                self.slowest = max(simulated, self.slowest or 0.0)
            self.note_visit(visit)

    def note_visit(self, visit: Mapping[str, Any]) -> None:
        """Record a visit, and add its traffic to that of the round."""
        self.visited += 1
        for key in self.sent:
            self.sent[key] += visit[key]
        self.folder.append_visit(visit)
        self.progress.visit(**self.shown(visit))

    def shown(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a visit or a round as it is shown: a language model is followed by its perplexity."""
        if self.server.config.task.kind != "causal_lm":
            return dict(record)
        return {**record, "validation_accuracy": None, "perplexity": validation_perplexity(record)}

    def absent(self, message: Message, client: int, participant: Participant | None) -> dict[str, Any]:
        """Return the record of a client that was not visited, because it could not be reached or has no training samples."""
        if participant is None:
            return self._record(message, client, None, status="failed", reason="it could not be reached")
        return self._record(message, client, participant, status="skipped", reason="no training samples", seconds=0.0)

    def judge(self, arrival: Arrival, message: Message, participant: Participant, collected: Collected,
              now: Message | None = None) -> dict[str, Any]:
        """Add a client's reply to the round if the server admits it, and return the record of the visit.

        The record is complete before the reply is admitted, so that nothing in a reply can stop the run halfway.
        `Server.admit` describes `now`.
        """
        record = self._record(message, arrival.client, participant, status="failed", bytes_down=arrival.bytes_down,
                              reason=None if arrival.reason is None else printable(arrival.reason, REASON))
        visit = arrival.visit
        if visit is None:
            return record
        record.update(flops=visit.flops, seconds=visit.seconds, peak_memory_bytes=visit.peak_memory_bytes)
        if visit.elsewhere is not None:
            self.elsewhere = (self.elsewhere or 0.0) + visit.elsewhere
        if visit.reply is None:
            record["reason"] = visit.reason
            self.keep(arrival)
        else:
            accepted = {**record, **visit.reply.metrics, "status": "ok", "bytes_up": arrival.bytes_up,
                        "trained_percent": 100 * visit.reply.metrics["trained_params"] / self.fm_params}
            try:
                self.server.admit(visit.reply, message, participant, collected, now)
            except RejectedReply as refused:
                record["reason"] = printable(f"its reply is refused: {refused}", REASON)
            else:
                self.keep(arrival)
                record = accepted
        record["simulated_seconds"] = participant.device.now(message.stage, message.round).seconds(
            visit.flops, record["bytes_up"], arrival.bytes_down)
        return record

    def _record(self, message: Message, client: int, participant: Participant | None, **values: Any) -> dict[str, Any]:
        known = {} if participant is None else {"depth": participant.trained_depth(message),
                                                "n_train": participant.n_train}
        return {"stage": message.stage, "round": message.round, "client": client, "bytes_up": 0, "bytes_down": 0,
                **known, **values}

    # Checkpoints

    def _save(self, state: ServerState, collected: Collected) -> None:
        server, tensors = pack_server(state, collected)
        buffered = {}
        if self.buffered is not None:
            buffered = {"buffered": self.buffered.plain()}
            tensors |= prefixed("buffered/", self.buffered.tensors())
        self.checkpoints.save(Snapshot(
            {"server": server, **buffered, "visited": self.visited, "sent": self.sent, "slowest": self.slowest,
             "elsewhere": self.elsewhere, "received": sorted(self.received), "records": self.folder.sync(),
             "seconds": self.seconds_before + time.perf_counter() - self.started, **self.own_state()},
            tensors, self.private()))

    def _restore(self) -> tuple[ServerState, Collected] | None:
        snapshot, notes = self.checkpoints.load()
        for note in notes:
            self.progress.note(note)
        if snapshot is None:
            self.folder.rewind({})
            return None
        saved = snapshot.state
        try:
            self.visited, self.sent, self.slowest = saved["visited"], saved["sent"], saved["slowest"]
            self.received = {(digest, client) for digest, client in saved["received"]}
            self.seconds_before, self.elsewhere = saved["seconds"], saved.get("elsewhere")     # older checkpoints have none
            self.restore_own(saved, snapshot.private)
            self.folder.rewind(saved["records"])
            if self.buffered is not None:
                self.buffered.restore(saved["buffered"], under("buffered/", snapshot.tensors))
            state, tensors = unpack_server(saved["server"], snapshot.tensors)
            collected = self.server.restore(state, saved["server"]["collected"], tensors)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.folder.path}: its checkpoint was not written by a run ({type(error).__name__}: "
                                  f"{error}); start the run again") from None
        where = "all rounds are done" if state.stage == "done" else f"{state.stage}, round {state.round}"
        self.progress.note(f"going on from the checkpoint: {where}")
        return state, collected
