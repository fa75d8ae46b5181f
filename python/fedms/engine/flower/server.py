"""The server's side: rounds over a Flower grid, whose nodes may be slow, gone, wrong or hostile."""
from __future__ import annotations

import re
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message as Mail
from flwr.serverapp import Grid

from fedms.client import Message, Participant, Visit
from fedms.config import RunConfig
from fedms.devices import Device, device_of
from fedms.engine.base import REASON, Arrival, Engine, Evaluation
from fedms.engine.flower import mail
from fedms.engine.flower.client import FORMAT
from fedms.messages import Packed, is_number, pack_message, unpack_reply
from fedms.progress import Progress
from fedms.records import ACCURACY_FIELDS, CLIENT_FIELDS, RunFolder
from fedms.resident import Tensors
from fedms.server import Server
from fedms.wire import WireError

SLACK = 2**16               # bytes that a reply may have beyond twice what was sent: statistics, manifests
POLL = (0.01, 0.5)          # seconds between looks for replies, at first and at most


@dataclass(frozen=True)
class Registered(Participant):
    id: int
    n_train: int
    device: Device


@dataclass(frozen=True)
class Asked:
    """A message under way: to which client, what its answer must repeat, its bytes."""

    client: int
    nonce: str
    size: int


class FlowerEngine(Engine):
    """Args:
        server, fm_params, folder, progress, stop: see `Engine`.
        fingerprint: of the foundation model, which must be the same everywhere.
        grid: Flower's access to the nodes.
        fitting: see `fedms.devices.device_of`.
        n_train: training samples by client, where this process knows them; else clients tell, once.
        timeout: seconds in which a client must answer; None: however long it takes.
    """

    def __init__(self, server: Server, fm_params: int, fingerprint: str, grid: Grid, fitting: Sequence[int | None],
                 n_train: Mapping[int, int], timeout: float | None, folder: RunFolder, progress: Progress,
                 stop: Callable[[], bool] = lambda: False) -> None:
        super().__init__(server, fm_params, folder, progress, stop)
        self.fingerprint, self.grid, self.fitting, self.timeout = fingerprint, grid, fitting, timeout
        self.config: RunConfig = server.config
        self.n_train = dict(n_train)
        self.run_id = uuid.uuid4().hex
        self.kept: dict[int, str] = {}              # by client: its private state after the last visit that counted
        self.private_at: set[int] = set()           # clients that have something of their own in it
        self.node_of: dict[int, int] = {}           # by client
        self.greeted: dict[int, float] = {}         # nodes that were asked who they are, and when
        self.greetings: dict[str, int] = {}         # nodes whose answer is awaited, by message
        self.overdue: dict[str, str] = {}           # visits that were given up, by message

    # What the engine is asked for

    def prepare(self, message: Message) -> Mapping[int, Participant]:
        clients = message.clients[self.visited:]
        self._wait_for_nodes(clients, message)
        return {client: self._participant(client) for client in clients if client in self.node_of}

    def visits(self, message: Message, packed: Packed, clients: Sequence[int]) -> Iterator[Arrival]:
        asked, lost = self._send("train", f"{message.stage} {message.round}", clients, packed, {})
        for answer in self._answers(asked, lost, message):
            yield self._arrival(answer, message, packed)

    def keep(self, arrival: Arrival) -> None:
        self.kept[arrival.client], private = arrival.after
        (self.private_at.add if private else self.private_at.discard)(arrival.client)

    def evaluate(self, final: Message, on_common_test: bool) -> Iterator[Evaluation]:
        clients = range(self.config.clients.count)
        self._wait_for_nodes(clients, final)
        packed = pack_message(final, self.encoding)
        # As many at a time as in a round, whose deadline is theirs too.
        at_once = self.config.clients.sampled
        for first in range(0, len(clients), at_once):
            yield from self._evaluate(clients[first : first + at_once], final, packed, on_common_test)

    def _evaluate(self, clients: Sequence[int], final: Message, packed: Packed,
                  on_common_test: bool) -> Iterator[Evaluation]:
        self._meet()
        reached = [client for client in clients if client in self.node_of]
        asked, lost = self._send("evaluate", "evaluation", reached, packed, {"on_common_test": on_common_test})
        for answer in self._answers(asked, lost, final):
            try:
                found = self._open(answer, limit=0)
                yield Evaluation(_checked_record(found.get("record"), answer.client),
                                 _share(found.get("on_common_test")))
            except _Unusable as problem:
                self.progress.note(f"client {answer.client} is not evaluated: {problem}")
        for client in sorted(set(clients) - set(reached)):
            self.progress.note(f"client {client} is not evaluated: it could not be reached")

    def own_state(self) -> dict[str, Any]:
        return {"run": self.run_id, "kept": {str(client): digest for client, digest in self.kept.items()},
                "private_at": sorted(self.private_at),
                "n_train": {str(client): count for client, count in self.n_train.items()}}

    def restore_own(self, state: Mapping[str, Any], private: Mapping[int, Tensors]) -> None:
        self.run_id = state["run"]
        self.kept = {int(client): digest for client, digest in state["kept"].items()}
        self.private_at = set(state.get("private_at", ()))
        self.n_train = {int(client): count for client, count in state["n_train"].items()} | self.n_train

    # Who is there

    def _participant(self, client: int) -> Participant:
        return Registered(client, self.n_train[client], device_of(self.config, client, self.fitting))

    def _wait_for_nodes(self, clients: Collection[int], message: Message) -> None:
        """Until the nodes of these clients are there, or the deadline has passed."""
        started, pauses, told = time.monotonic(), _Pauses(), False
        while True:
            self._meet()
            missing = [client for client in clients if client not in self.node_of]
            waited = time.monotonic() - started
            if not missing or waited > (self.timeout or float("inf")):
                return
            if waited > 5 and not told:
                told = True
                self.progress.note(f"waiting for the nodes of the clients {_listed(missing)}")
            self.check_stop(message)
            pauses.sleep()

    def _meet(self) -> None:
        """Asks new nodes which client they are; forgets nodes that have left."""
        nodes = {node.node_id: node.name for node in self.grid.get_nodes()}
        self.node_of = {client: node for client, node in self.node_of.items() if node in nodes}
        self.greeted = {node: when for node, when in self.greeted.items() if node in nodes}
        again = 30.0        # seconds after which a node that did not answer is asked once more
        known = set(self.node_of.values())
        new = [node for node in nodes if node not in known
               and time.monotonic() - self.greeted.get(node, float("-inf")) > again]
        letters = [Mail(mail.write({"format": FORMAT}, {}), node, "query", group_id="hello") for node in new]
        if letters:
            self.grid.push_messages(letters)
            self.greeted |= dict.fromkeys(new, time.monotonic())
            self.greetings |= {letter.metadata.message_id: node for letter, node in zip(letters, new)}
        for reply in self.grid.pull_messages(list(self.greetings)) if self.greetings else ():
            node = self.greetings.pop(reply.metadata.reply_to_message_id, None)
            if node is not None and node in nodes:
                try:
                    self._register(node, nodes[node], reply)
                except _Unusable as problem:
                    self.progress.note(f"node {node} is refused: {problem}")

    def _register(self, node: int, name: str, reply: Mail) -> None:
        head, _ = _read(reply, limit=0)
        client, n_train = head.get("client"), head.get("n_train")
        if type(client) is not int or not 0 <= client < self.config.clients.count:
            raise _Unusable(f"it says it is client {client!r}; there are clients 0 to {self.config.clients.count - 1}")
        claim = re.fullmatch(r"client-(\d+)", name)
        if claim and int(claim[1]) != client:
            raise _Unusable(f"it says it is client {client}, but its key is registered as {name}")
        if client in self.node_of:
            raise _Unusable(f"it says it is client {client}, which node {self.node_of[client]} is already")
        known = self.n_train.get(client)
        if n_train is not None and (type(n_train) is not int or not 0 <= n_train < 2**31):
            raise _Unusable(f"client {client} says it has {n_train!r} training samples")
        if known is not None and n_train not in (None, known):
            raise _Unusable(f"client {client} says it has {n_train} training samples; before it had {known}")
        if known is None and n_train is None:
            raise _Unusable(f"client {client} does not say how many training samples it has")
        self.n_train.setdefault(client, n_train)
        self.node_of[client] = node

    # Messages and their answers

    def _send(self, kind: str, group: str, clients: Sequence[int], packed: Packed,
              extra: Mapping[str, Any]) -> tuple[dict[str, Asked], list[int]]:
        """Sends a message to each client; returns what was asked, by message, and clients whose message was not
        taken."""
        head = {"format": FORMAT, "run": self.run_id, "model": self.fingerprint, "message": packed.head, **extra,
                "config": self.config.model_dump(mode="json", exclude_none=True)}
        arrays = mail.buffers(packed.parts)
        mails, asked = [], []
        for client in clients:
            due, nonce = self.due_to(client, packed), secrets.token_hex(8)
            content = mail.write({**head, "nonce": nonce, "kept": self.kept.get(client)},
                                 {name: arrays[name] for name in due.parts})
            mails.append(Mail(content, self.node_of[client], kind, group_id=group))
            asked.append(Asked(client, nonce, due.size))
        taken = list(self.grid.push_messages(mails)) if mails else []
        under_way = {each.metadata.message_id: what for each, what in zip(mails, asked)
                     if each.metadata.message_id in taken}
        return under_way, [what.client for what in asked if what not in under_way.values()]

    def _answers(self, asked: Mapping[str, Asked], lost: Sequence[int], message: Message) -> Iterator[_Answer]:
        """Answers in ascending order of the clients' ids, those that did not come in time included."""
        due = sorted([*(what.client for what in asked.values()), *lost])
        came = {client: _Answer(client, None, None, "the SuperLink did not take its message") for client in lost}
        waiting, started, pauses = dict(asked), time.monotonic(), _Pauses()
        while due:
            while due and due[0] in came:
                yield came.pop(due.pop(0))
            if not due:
                return
            self.check_stop(message)
            replies = list(self.grid.pull_messages([*waiting, *self.overdue])) if waiting else []
            for reply in replies:
                number = reply.metadata.reply_to_message_id
                if (what := waiting.pop(number, None)) is not None:
                    came[what.client] = _Answer(what.client, what, reply)
                elif (late := self.overdue.pop(number, None)) is not None:
                    self.progress.note(f"{late} has answered after the deadline; its reply is dropped")
                else:
                    self.progress.note(f"a reply that nobody waits for, or a second one, from node "
                                       f"{reply.metadata.src_node_id} is dropped")
            if self.timeout is not None and time.monotonic() - started > self.timeout:
                for number, what in waiting.items():
                    came[what.client] = _Answer(what.client, what, None, f"no answer within {self.timeout:g} s")
                    self.overdue[number] = f"client {what.client} ({message.stage}, round {message.round})"
                waiting.clear()
            elif replies:
                pauses = _Pauses()
            elif waiting:
                pauses.sleep()

    def _arrival(self, answer: _Answer, message: Message, packed: Packed) -> Arrival:
        sent = answer.asked.size if answer.asked else 0
        try:
            head = self._open(answer, limit=2 * packed.size + SLACK)
        except _Unusable as problem:
            return Arrival(answer.client, None, 0, sent, str(problem)[:REASON])
        self.note_received(answer.client, packed)
        try:
            visit, size = _visit_of(head)
        except (WireError, _Unusable) as problem:
            return Arrival(answer.client, None, 0, sent, f"its reply is refused: {problem}"[:REASON])
        return Arrival(answer.client, visit, size, sent, after=(head["kept"], head["private"]))

    def _open(self, answer: _Answer, limit: int) -> dict[str, Any]:
        """The head of an answer, its buffers under `parts`, if it answers what was asked.

        Raises:
            _Unusable: saying why there is no such answer.
        """
        if answer.mail is None:
            raise _Unusable(answer.reason)
        head, parts = _read(answer.mail, limit)
        if head.get("run") != self.run_id or head.get("nonce") != answer.asked.nonce:
            if "problem" not in head or "nonce" in head:
                raise _Unusable("its reply is refused: it answers another message, an old one or one of another run")
        if head.get("client") != answer.client:
            raise _Unusable(f"its reply is refused: it is client {head.get('client')!r}'s")
        if "problem" in head:
            raise _Unusable(f"the client says: {str(head['problem'])[:REASON]}")
        return {**head, "parts": parts}


@dataclass(frozen=True)
class _Answer:
    client: int
    asked: Asked | None
    mail: Mail | None
    reason: str = ""


class _Unusable(Exception):
    """There is no answer that could be used; the message says why."""


class _Pauses:
    """Waits that grow, so that quick answers are seen quickly and slow ones cost nothing."""

    def __init__(self) -> None:
        self.next, self.most = POLL

    def sleep(self) -> None:
        time.sleep(self.next)
        self.next = min(1.5 * self.next, self.most)


def _read(reply: Mail, limit: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    if reply.has_error():
        raise _Unusable(f"no answer: {reply.error.reason} (Flower's error {reply.error.code})")
    try:
        return mail.read(reply.content, limit)
    except mail.MailError as error:
        raise _Unusable(f"its reply is refused: {error}") from None


def _visit_of(head: Mapping[str, Any]) -> tuple[Visit, int]:
    """The visit that an answer tells of, and the bytes of its reply."""
    told, kept = head.get("visit"), head.get("kept")
    if not isinstance(told, dict) or not isinstance(kept, str) or not re.fullmatch("[0-9a-f]{64}", kept):
        raise _Unusable("it tells of no visit")
    if not isinstance(head.get("private"), bool):
        raise _Unusable("it does not say whether there is a private state")
    numbers = {name: told.get(name) for name in ("flops", "seconds", "peak_memory_bytes")}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 <= value < 2**63:
            raise _Unusable(f"{name} is {value!r}, expected a number from 0")
    if (reason := told.get("reason")) is not None:
        return Visit(None, str(reason)[:REASON], **numbers), 0
    if not isinstance(head.get("reply"), dict):
        raise _Unusable("it holds neither a reply nor a reason")
    packed = Packed(head["reply"], head["parts"])
    return Visit(unpack_reply(packed), None, **numbers), packed.size


def _checked_record(record: Any, client: int) -> dict[str, Any]:
    """A client's line of `clients.jsonl`, as far as it can be checked from afar."""
    if not isinstance(record, dict) or not record.keys() <= set(CLIENT_FIELDS) or record.get("id") != client:
        raise _Unusable("its record is not of the form of clients.jsonl")
    accuracies = record.get("accuracy")
    if not isinstance(accuracies, dict) or not accuracies.keys() <= set(ACCURACY_FIELDS):
        raise _Unusable("its accuracies are not of the form of clients.jsonl")
    for value in (*accuracies.values(), record.get("macro_f1")):
        _share(value)
    for name in ("n_train", "n_validation", "n_test"):
        if type(record.get(name)) is not int or not 0 <= record[name] < 2**31:
            raise _Unusable(f"{name} is {record.get(name)!r:.40}, expected a whole number")
    for name in ("gate_mean", "gate_std", "gate_entropy"):
        if record.get(name) is not None and not is_number(record[name]):
            raise _Unusable(f"{name} is {record[name]!r:.40}, expected a number")
    if not isinstance(record.get("group"), (str, type(None))) or record.get("unseen") is not False:
        raise _Unusable("its record is not of the form of clients.jsonl")
    return record


def _share(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
        raise _Unusable(f"an accuracy is {value!r}, expected a number in [0, 1]")
    return value


def _listed(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:8])) + (f" and {len(clients) - 8} more" if len(clients) > 8 else "")
