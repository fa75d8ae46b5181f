"""The server's side: rounds over a Flower grid, whose nodes may be slow, gone, wrong or hostile."""
from __future__ import annotations

import re
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import Array, Message as Mail
from flwr.serverapp import Grid

from fedms.config import RunConfig
from fedms.engines.base import Arrival, Engine, Evaluation
from fedms.engines.buffered import Courier
from fedms.engines.flower import transport
from fedms.engines.flower.answers import Answer, Asked, Pauses, Unusable, not_taken, read, visit_of
from fedms.engines.flower.courier import FlowerCourier
from fedms.federated.admission import plausible_validation
from fedms.federated.client import Message, Participant
from fedms.federated.devices import Device, Fitting, device_of
from fedms.federated.packing import Packed, pack_message, unpack_share
from fedms.federated.schema import EVALUATED, FORMAT, HELLO, JOINED, PROBLEM, SUMMED, TRAINED, SchemaError, Table, shown
from fedms.foreign import few, printable
from fedms.federated.server import Server
from fedms.progress import Progress
from fedms.storage.run_folder import RunFolder
from fedms.tensors import Tensors

if TYPE_CHECKING:
    from fedms.privacy.secure_round import Question

SLACK = 2**16               # bytes that a reply may have beyond twice what was sent: statistics, manifests
GRACE = 10.0                # seconds in which a node that was silent may say that it is there, and miss no further round
NOTES = 100                 # most notes that strangers can cause


@dataclass(frozen=True)
class Registered(Participant):
    """A client as it introduced itself to the server at its first greeting."""

    id: int
    n_train: int
    n_validation: int
    device: Device


class FlowerEngine(Engine):
    """The engine whose clients are nodes of Flower.

    Args:
        server, fm_params, folder, progress, stop: See `Engine`.
        fingerprint: Fingerprint of the foundation model, which must be the same on all machines.
        grid: Flower's access to the nodes.
        fitting: See `fedms.federated.devices.device_of`.
        samples: Numbers of training and validation samples of the clients that this process knows; others state theirs once.
        timeout: Seconds in which a client must answer, or None to wait without a limit.
        members: Returns the ids of the clients that take part now; called before each round. None means all of `clients.count`.
    """

    def __init__(self, server: Server, fm_params: int, fingerprint: str, grid: Grid, fitting: Fitting,
                 samples: Mapping[int, tuple[int, int]], timeout: float | None, folder: RunFolder, progress: Progress,
                 stop: Callable[[], bool] = lambda: False, members: Callable[[], Sequence[int]] | None = None) -> None:
        super().__init__(server, fm_params, folder, progress, stop)
        self.fingerprint, self.grid, self.fitting, self.timeout = fingerprint, grid, fitting, timeout
        self.config, self._members = server.config, members
        self.join_timeout = None if timeout is None else self.config.clients.join_timeout or timeout
        self.samples = dict(samples)
        self.run_id = uuid.uuid4().hex
        self.kept: dict[int, str] = {}              # by client: its private state after the last visit that counted
        self.private_at: set[int] = set()           # clients that have something of their own in it
        self.node_of: dict[int, int] = {}           # by client
        self.greeted: dict[int, tuple[str, float]] = {}     # nodes that were asked who they are: connected since when, due when
        self.away: set[int] = set()                 # clients that were waited for in vain
        self.asked_again: dict[int, float] = {}     # when those of them that were silent were asked whether they are there
        self.authenticated = False                  # whether nodes have registered keys
        self.told: set[str] = set()                 # notes that strangers caused
        self.greetings: dict[str, int] = {}         # nodes whose answer is awaited, by message
        self.overdue: dict[str, str] = {}           # visits that were given up, by message

    # What the engine is asked for

    def members(self) -> Sequence[int]:
        return super().members() if self._members is None else self._members()

    def prepare(self, message: Message) -> Mapping[int, Participant]:
        return self.meet(message.clients[self.visited:], message)

    def meet(self, clients: Sequence[int], message: Message) -> Mapping[int, Participant]:
        """Wait for the nodes of these clients, and return the participants whose nodes are there in time."""
        self._wait_for_nodes(clients, message)
        return {client: self.participant(client) for client in clients if client in self.node_of}

    def courier(self) -> Courier:
        return FlowerCourier(self)

    def visits(self, message: Message, packed: Packed, clients: Sequence[int]) -> Iterator[Arrival]:
        asked, lost = self.send("train", f"{message.stage} {message.round}", clients, packed, {})
        for answer in self._answers(asked, lost, message):
            yield self.arrival(answer, message, packed)

    def exchange(self, message: Message, attempt: int,
                 questions: Mapping[int, Question]) -> Mapping[int, Mapping[str, bytes]]:
        heads = {client: {"format": FORMAT, "run": self.run_id, "attempt": attempt, "phase": question.phase,
                          "clients": list(question.clients)} for client, question in questions.items()}
        asked, lost = self._push("query.sum", f"{message.stage} {message.round}", heads,
                                 {client: transport.buffers(question.parts) for client, question in questions.items()})
        answers = {}
        for answer in self._answers(asked, lost, message):
            try:
                # No answer is longer than the vector, or than what shares of all clients take.
                _, answers[answer.client] = self._open(answer, SUMMED, limit=self._longest(message, len(questions)))
            except Unusable as problem:
                self._tell_once(f"client {answer.client} drops out of the sum of {message.stage}, round {message.round}: {problem}")
        return answers

    def _longest(self, message: Message, clients: int) -> int:
        return 4 * self.private_server.sums_of(message).size + SLACK + 128 * clients

    def keep(self, arrival: Arrival) -> None:
        self.kept[arrival.client], private = arrival.after
        (self.private_at.add if private else self.private_at.discard)(arrival.client)

    def evaluate(self, final: Message, on_common_test: bool) -> Iterator[Evaluation]:
        clients = self.members()
        self._wait_for_nodes(clients, final)
        packed = pack_message(final, self.encoding)
        # As many at a time as in a round, whose deadline is theirs too.
        at_once = self.config.clients.sampled
        for first in range(0, len(clients), at_once):
            yield from self._evaluate(clients[first : first + at_once], final, packed, on_common_test)

    def _evaluate(self, clients: Sequence[int], final: Message, packed: Packed,
                  on_common_test: bool) -> Iterator[Evaluation]:
        self._greet_nodes()
        reached = [client for client in clients if client in self.node_of]
        asked, lost = self.send("evaluate", "evaluation", reached, packed, {"on_common_test": on_common_test})
        for answer in self._answers(asked, lost, final):
            try:
                found, _ = self._open(answer, EVALUATED, limit=0)
                yield Evaluation(self._checked(found["record"], answer.client), found["on_common_test"])
            except Unusable as problem:
                self.progress.note(f"client {answer.client} is not evaluated: {problem}")
        for client in sorted(set(clients) - set(reached)):
            self.progress.note(f"client {client} is not evaluated: it could not be reached")

    def _checked(self, record: dict[str, Any], client: int) -> dict[str, Any]:
        for name, value in {"id": client, "unseen": False, **dict(zip(("n_train", "n_validation"), self.samples[client]))}.items():
            if record[name] != value:
                raise Unusable(f"its record is refused: {name} is {record[name]}, expected {value}")
        if ("language" in record) != (record["n_test"] > 0 and self.config.task.kind == "causal_lm"):
            raise Unusable(f"its record is refused: it {'has' if 'language' in record else 'lacks'} figures of a language model")
        return record

    def own_state(self) -> dict[str, Any]:
        return {"run": self.run_id, "members": list(self.server.members), "private_at": sorted(self.private_at),
                "kept": {str(client): digest for client, digest in self.kept.items()},
                "samples": {str(client): list(counts) for client, counts in self.samples.items()}}

    def restore_own(self, state: Mapping[str, Any], private: Mapping[int, Tensors]) -> None:
        self.run_id = state["run"]
        self.server.members = state.get("members", self.server.members)
        self.kept = {int(client): digest for client, digest in state["kept"].items()}
        self.private_at = set(state.get("private_at", ()))
        # Checkpoints of older versions lack them: the nodes tell again.
        self.samples = {int(client): (counts[0], counts[1]) for client, counts in state.get("samples", {}).items()} | self.samples

    # Who is there

    def participant(self, client: int) -> Participant:
        return Registered(client, *self.samples.get(client, (0, 0)), device_of(self.config, client, self.fitting))

    def _wait_for_nodes(self, clients: Collection[int], message: Message) -> None:
        """Until the nodes of these clients are there, or the deadline has passed. A client that was waited for once is only
        looked at from then on, until it is there again; unless nobody else is left."""
        self._greet_nodes()
        if all(client in self.away for client in clients):
            self.away.clear()
        started, pauses, told = time.monotonic(), Pauses(), False
        while missing := [client for client in clients if client not in self.node_of and self._is_waited_for(client)]:
            waited = time.monotonic() - started
            if waited > (self.join_timeout or float("inf")):
                self.away.update(missing)
                self.progress.note(f"the nodes of the clients {few(missing, 8)} are away; they are not waited for again")
                return
            if waited > 5 and not told:
                told = True
                self.progress.note(f"waiting for the nodes of the clients {few(missing, 8)}")
            self.check_stop(message)
            pauses.sleep()
            self._greet_nodes()

    def _is_waited_for(self, client: int) -> bool:
        return client not in self.away or time.monotonic() - self.asked_again.get(client, float("-inf")) < GRACE

    def _greet_nodes(self) -> None:
        """Ask new nodes which client they are, and forget nodes that have left."""
        nodes = {node.node_id: node for node in self.grid.get_nodes()}
        # Flower names the keys that were registered with it, and no others: one name says that authentication is on.
        self.authenticated = self.authenticated or any(node.name for node in nodes.values())
        self.node_of = {client: node for client, node in self.node_of.items()
                        if node in nodes and (not self.authenticated or nodes[node].name == f"client-{client}")}
        # A node that has connected anew, because its process died, has lost what it was asked.
        self.greeted = {node: asked for node, asked in self.greeted.items() if node in nodes and nodes[node].last_activated_at == asked[0]}
        again = 30.0        # seconds after which a node that did not answer is asked once more
        known = set(self.node_of.values())
        new = [node for node in nodes if node not in known and time.monotonic() > self.greeted.get(node, ("", 0.0))[1]]
        letters = [Mail(transport.write({"format": FORMAT, "release": transport.release(), "client": _number(nodes[node].name)}, {}),
                        node, "query", group_id="hello") for node in new]
        if letters:
            self.grid.push_messages(letters)
            self.greeted |= {node: (nodes[node].last_activated_at, time.monotonic() + again) for node in new}
            self.greetings |= {letter.metadata.message_id: node for letter, node in zip(letters, new)}
        for reply in self._pull(list(self.greetings)):
            node = self.greetings.pop(reply.metadata.reply_to_message_id, None)
            if node is not None and node in nodes:
                try:
                    self._register(node, nodes[node].name, reply)
                except Unusable as problem:
                    self._tell_once(f"node {node} is refused: {problem}")

    def _register(self, node: int, name: str, reply: Mail) -> None:
        head, _ = read(reply, limit=0)
        try:
            if "problem" in head:
                raise Unusable(f"it says: {PROBLEM.read(head)['problem']}")
            told = HELLO.read(head)
        except SchemaError as error:
            raise Unusable(f"its answer is refused: {error}") from None
        if transport.release_of(told["release"]) != transport.release_of(transport.release()):
            raise Unusable(f"it runs fedms {told['release']}, this server fedms {transport.release()}; install the same release on "
                           "both")
        client, n_train = told["client"], told["n_train"]
        if client >= self.config.clients.count:
            raise Unusable(f"it says it is client {client}; there are clients 0 to {self.config.clients.count - 1}")
        if self.authenticated and name != f"client-{client}":
            raise Unusable(f"it says it is client {client}, but its key is registered as {shown(name) if name else 'nobody'}"
                           f"; register it by --name client-{client}")
        if self.node_of.get(client, node) != node:
            raise Unusable(f"it says it is client {client}, which node {self.node_of[client]} is already")
        known = self.samples.get(client)
        if self.private_rounds is not None:
            pass        # how many samples a client has is its own
        elif (n_train, told["n_validation"]) == (None, None):
            if known is None:
                raise Unusable(f"client {client} does not say how many samples it has")
        elif None in (n_train, told["n_validation"]):
            raise Unusable(f"client {client} says how many samples it has of one kind alone")
        elif known is not None and known != (n_train, told["n_validation"]):
            raise Unusable(f"client {client} says it has {n_train} training and {told['n_validation']} validation samples; "
                           f"before it had {known[0]} and {known[1]}")
        elif told["n_validation"] > (most := plausible_validation(self.config, n_train)):
            raise Unusable(f"client {client} says it has {told['n_validation']} validation samples; beside {n_train} for "
                           f"training data.split leaves it {most} at most")
        else:
            self.samples[client] = (n_train, told["n_validation"])
        self.node_of[client] = node
        self.away.discard(client)

    def _ask_again(self, client: int) -> None:
        """Note that a client did not answer in time. It takes part again as soon as its node says that it is there."""
        node = self.node_of.pop(client, None)
        if node is not None:
            self.away.add(client)
            self.asked_again[client] = time.monotonic()
            self.greeted.pop(node, None)
            self._greet_nodes()

    def _tell_once(self, text: str) -> None:
        """Print a note that strangers can cause. The same note is not repeated, and their number is limited."""
        if text not in self.told and len(self.told) < NOTES:
            self.told.add(text)
            self.progress.note(text if len(self.told) < NOTES else f"{text}; further notes of this kind are left out")

    # Messages and their answers

    def send(self, kind: str, group: str, clients: Sequence[int], packed: Packed,
             extra: Mapping[str, Any]) -> tuple[dict[str, Asked], list[int]]:
        """Send a message to each client. Return what waits for an answer, by message, and clients whose message was lost."""
        head = {"format": FORMAT, "run": self.run_id, "model": self.fingerprint, "message": packed.head, **extra,
                "config": transport.tables_of(self.config)}
        arrays = transport.buffers(packed.parts)
        heads = {client: {**head, "kept": self.kept.get(client)} for client in clients}
        return self._push(kind, group, heads, {client: {name: arrays[name] for name in self.due_to(client, packed).parts}
                                               for client in clients})

    def _push(self, kind: str, group: str, heads: Mapping[int, Mapping[str, Any]],
              parts: Mapping[int, Mapping[str, Array]]) -> tuple[dict[str, Asked], list[int]]:
        """Send each client its head, with a nonce, and its buffers. Return the same as `send`."""
        nonces = {client: secrets.token_hex(8) for client in heads}
        contents = {client: transport.write({**head, "nonce": nonces[client]}, parts[client]) for client, head in heads.items()}
        mails = {client: Mail(content, self.node_of[client], kind, group_id=group) for client, content in contents.items()}
        taken = set(self.grid.push_messages(list(mails.values()))) if mails else set()
        since = time.monotonic()
        sizes = {client: sum(len(array.data) for array in arrays.values()) for client, arrays in parts.items()}
        numbers = {client: mail.metadata.message_id for client, mail in mails.items()}
        under_way = {n: Asked(client, nonces[client], sizes[client], group, since) for client, n in numbers.items() if n in taken}
        return under_way, [client for client, number in numbers.items() if number not in taken]

    def _answers(self, asked: Mapping[str, Asked], lost: Sequence[int], message: Message) -> Iterator[Answer]:
        """Yield an answer of each client, in ascending order of their ids; of late ones it is the reason that there is none."""
        due = sorted([*(what.client for what in asked.values()), *lost])
        came, waiting, pauses = {client: not_taken(client) for client in lost}, dict(asked), Pauses()
        while due:
            while due and due[0] in came:
                yield came.pop(due.pop(0))
            if not due:
                return
            self.check_stop(message)
            if found := self.arrived(waiting):
                came |= {answer.client: answer for answer in found}
                pauses = Pauses()
            elif waiting:
                pauses.sleep()

    def arrived(self, waiting: dict[str, Asked]) -> list[Answer]:
        """Return the answers that have arrived or whose time is over, and remove them from `waiting`."""
        found = []
        for reply in self._pull([*waiting, *self.overdue]) if waiting else []:
            number = reply.metadata.reply_to_message_id
            if (what := waiting.pop(number, None)) is not None:
                found.append(Answer(what.client, what, reply))
            else:
                late = self.overdue.pop(number, None)
                other = f"a reply that nobody waits for, or a second one, from node {reply.metadata.src_node_id}"
                self.progress.note(f"{f'{late} has answered after the deadline; its reply' if late else other} is dropped")
        over = [n for n, what in waiting.items() if time.monotonic() - what.since > (self.timeout or float("inf"))]
        silent = [self.give_up(waiting, number) for number in over]
        for what in silent:
            self._ask_again(what.client)
        return found + [Answer(what.client, what, None, f"no answer within {self.timeout:g} s") for what in silent]

    def give_up(self, waiting: dict[str, Asked], number: str) -> Asked:
        """Stop waiting for an answer. If it arrives later, it is dropped with a note."""
        what = waiting.pop(number)
        self.overdue[number] = f"client {what.client} ({what.group.replace(' ', ', round ')})"
        return what

    def _pull(self, numbers: Sequence[str]) -> list[Mail]:
        """Return the replies to these messages that have arrived. If Flower cannot rebuild bytes that nodes stored, the replies that
        came with them are lost, but not the run."""
        try:
            return list(self.grid.pull_messages(numbers)) if numbers else []
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
            self._tell_once(f"replies that Flower could not read are dropped: {type(error).__name__}: {printable(str(error), 200)}")
            return []

    def arrival(self, answer: Answer, message: Message, packed: Packed) -> Arrival:
        sent = answer.asked.size if answer.asked else 0
        if self.private_rounds is not None:
            return self._share(answer, message, packed, sent)
        try:
            head, parts = self._open(answer, TRAINED, limit=2 * packed.size + SLACK)
            visit, size = visit_of(head, parts)
        except Unusable as problem:
            return Arrival(answer.client, None, 0, sent, str(problem))
        self.note_received(answer.client, packed)
        return Arrival(answer.client, visit, size, sent, after=(head["kept"], head["private"]))

    def _share(self, answer: Answer, message: Message, packed: Packed, sent: int) -> Arrival:
        """Return what a client of a run with privacy has sent."""
        sums, masks = self.private_server.sums_of(message), self.private_server.settings.masks
        try:
            head, parts = self._open(answer, JOINED, limit=4 * sums.size + SLACK)
            share = Packed(head["share"], parts)
            arrival = Arrival(answer.client, None, share.size, sent, after=(head["kept"], True),
                              share=unpack_share(share, sums.size, masks))
        except (Unusable, SchemaError) as problem:
            return Arrival(answer.client, None, 0, sent, str(problem))
        self.note_received(answer.client, packed)
        return arrival

    def _open(self, answer: Answer, kind: Table, limit: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the head of an answer, in the form of its kind of message, and its buffers.

        Raises:
            Unusable: If it does not answer what was asked. The message gives the reason.
        """
        if answer.mail is None:
            raise Unusable(answer.reason)
        head, parts = read(answer.mail, limit)
        try:
            head = (PROBLEM if "problem" in head else kind).read(head)
        except SchemaError as error:
            raise Unusable(f"its reply is refused: {error}") from None
        if head.get("run") != self.run_id or head.get("nonce") != answer.asked.nonce:
            if "problem" not in head or "nonce" in head:
                raise Unusable("its reply is refused: it answers another message, an old one or one of another run")
        if head["client"] != answer.client:
            raise Unusable(f"its reply is refused: it is client {head['client']}'s")
        if "problem" in head:
            raise Unusable(f"the client says: {head['problem']}")
        return head, parts


def _number(name: str) -> int | None:
    """Return the client whose key is registered under this name."""
    return int(name.removeprefix("client-")) if re.fullmatch("client-[0-9]{1,9}", name, re.ASCII) else None
