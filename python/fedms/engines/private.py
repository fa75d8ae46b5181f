"""Rounds with privacy, on any engine: clients send shares of a sum, and the server learns the sum."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedms.federated.client import Message, Participant
from fedms.federated.packing import pack_message, unpack_message
from fedms.federated.schema import REASON
from fedms.errors import AllClientsFailed
from fedms.federated.server import RejectedReply, ServerState
from fedms.foreign import printable
from fedms.privacy.secure_round import Question, Summed, collect
from fedms.privacy.secure_sum import ProtocolError
from fedms.federated.private_server import PrivateCollected, PrivateServer

if TYPE_CHECKING:
    from fedms.engines.base import Arrival, Engine

ATTEMPTS = 3        # at a secure sum before the run stops


class PrivateRounds:
    """The rounds of a run with privacy.

    Args:
        engine: The engine, which carries the messages.
        server: The server.
    """

    def __init__(self, engine: Engine, server: PrivateServer) -> None:
        self.engine, self.server = engine, server
        self.masks = server.settings.masks
        self.hides_traffic = server.rate is not None        # a round's bytes tell how many took part
        self.ledger = server.ledger(engine.folder.path)

    def visit_clients(self, state: ServerState, collected: PrivateCollected) -> None:
        """Let the clients of a round add up their shares, and release the sum.

        Raises:
            AllClientsFailed: If too few clients took part in a secure sum.
            BudgetSpent: If the release would cost more than the budget.
            Interrupted: If the run was asked to stop. A secure sum then begins anew.
        """
        message = self.server.message(state)
        if message.stage == "done":
            message = replace(message, clients=tuple(range(self.server.config.clients.count)))
        packed = pack_message(message, self.engine.encoding)
        arrives = unpack_message(packed)
        participants = self.engine.prepare(message)
        due = message.clients[self.engine.visited:]
        reached = [client for client in due if client in participants]
        arrivals = self.engine.visits(arrives, packed, reached)
        records, held = {}, {}
        for client in due:
            self.engine.check_stop(message)
            record = self._record(message, client, participants.get(client))
            if client in reached:
                arrival = next(arrivals)
                if self._take(arrival, collected, record):
                    held[client] = arrival
            records[client] = record
            if not self.masks:
                self._count(record)
                self.engine.visited += 1
                self._show(records.pop(client))
        if self.masks:
            self._sum(message, state, collected, held, records)
        else:
            self.server.release(state, collected, self.ledger)

    def outcome(self, state: ServerState) -> dict[str, Any]:
        """Return what the outcome of the run says about its clients: their mean test accuracy, if it is released, and the
        guarantee.
        """
        collected = self.server.collect(state)
        if collected.sums.size:
            self.engine.visited = 0
            self.visit_clients(state, collected)
        accuracy = None if collected.means is None else collected.means.accuracy
        return {"mean_accuracy": accuracy, **self.server.summary(self.ledger)}

    def _take(self, arrival: Arrival, collected: PrivateCollected, record: dict[str, Any]) -> bool:
        """Take what came back into the round, if it may be; complete the visit's record."""
        record.update(bytes_down=arrival.bytes_down, reason=arrival.reason and printable(arrival.reason, REASON))
        if arrival.share is None:
            return False
        try:
            collected.add(arrival.share)
        except RejectedReply as refused:
            record["reason"] = printable(f"its share is refused: {refused}", REASON)
            return False
        record.update(status="ok", reason=None, bytes_up=arrival.bytes_up)
        if not self.masks:
            self.engine.keep(arrival)
        return True

    def _sum(self, message: Message, state: ServerState, collected: PrivateCollected, held: Mapping[int, Arrival],
             records: Mapping[int, dict[str, Any]]) -> None:
        """Carry out the phases of a secure sum, in several attempts if necessary. Each attempt has its own masks and noise."""
        traffic: Counter[tuple[int, str]] = Counter()
        summed, attempt = self._attempts(message, collected, traffic)
        for (client, direction), size in traffic.items():
            records[client][direction] += size
        collected.total, collected.answered = summed.total, len(summed.survivors)
        self.server.release(state, collected, self.ledger, summed.tag, attempt)
        for client, record in records.items():
            if client in held and client in summed.survivors:
                self.engine.keep(held[client])
            elif record["status"] == "ok":
                record.update(status="failed", reason="it did not answer until its vector had arrived")
            self._count(record)
            self._show(record)

    def _attempts(self, message: Message, collected: PrivateCollected,
                  traffic: Counter[tuple[int, str]]) -> tuple[Summed, int]:
        keys, problem = collected.keys, ""
        for attempt in range(ATTEMPTS):
            terms = self.server.terms(message, attempt)

            def ask(questions: Mapping[int, Question]) -> Mapping[int, Mapping[str, bytes]]:
                answers = self.engine.exchange(message, attempt, questions)
                for kind, sent in (("bytes_down", {c: q.parts for c, q in questions.items()}), ("bytes_up", answers)):
                    for client, parts in sent.items():
                        traffic[client, kind] += sum(map(len, parts.values()))
                return answers

            if attempt:
                answers = ask({client: Question("join", ()) for client in keys})
                keys = {client: parts["key"] for client, parts in answers.items() if set(parts) == {"key"}}
            try:
                return collect(terms, keys, ask), attempt
            except ProtocolError as error:
                problem = str(error)
                self.engine.progress.note(f"{message.stage}, round {message.round}: {problem}")
        raise AllClientsFailed(f"{message.stage}, round {message.round}: no secure sum came about in {ATTEMPTS} attempts: "
                               f"{problem}; a run that goes on tries again")

    # Records: nothing in them depends on a client's data.

    def _record(self, message: Message, client: int, participant: Participant | None) -> dict[str, Any]:
        record = {"stage": message.stage, "round": message.round, "client": client, "status": "failed", "bytes_up": 0,
                  "bytes_down": 0, "reason": "it could not be reached"}
        if participant is not None:
            record.update(depth=participant.trained_depth(message))
        return record

    def _count(self, record: Mapping[str, Any]) -> None:
        for key in self.engine.sent:
            self.engine.sent[key] += record[key]

    def _show(self, record: Mapping[str, Any]) -> None:
        """Record a visit. Where taking part is secret, no line says who did."""
        if record["stage"] == "done":
            return
        if not self.hides_traffic:
            self.engine.folder.append_visit(record)
            self.engine.progress.visit(**self.engine.shown(record))
        else:
            self.engine.progress.visit(record["stage"], record["round"], None)
