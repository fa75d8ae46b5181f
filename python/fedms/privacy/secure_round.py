"""A secure sum as messages: what the server asks in each phase, what a client answers, and how both are written as bytes.

`collect` is the server's side, `answer` the client's; an engine carries the questions and the answers between them. A question
or an answer is a dict of buffers of known lengths and, in questions, a list of clients. Whatever has another form is refused.

    phase     question                                        answer
    share     clients, keys (32 bytes each)                   boxes (82 bytes for each other client)
    mask      clients, boxes (82 bytes each)                  masked (4 bytes a value)
    reveal    clients (the survivors)                         shares (33 bytes for each client that shared)
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedms.privacy import secure_sum as ss
from fedms.privacy.ledger import Price
from fedms.privacy.secure_sum import Member, Promises, ProtocolError, Terms

PHASES = ("share", "mask", "reveal")


@dataclass(frozen=True)
class Question:
    """What the server asks one client.

    Attributes:
        phase: One of PHASES.
        clients: The list of clients in the module's table, in ascending order.
        parts: The buffers in the module's table, by name.
    """

    phase: str
    clients: tuple[int, ...]
    parts: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Summed:
    """The result of a secure sum.

    Attributes:
        total: The sum, (size,) int64.
        survivors: The clients whose vectors are in the total.
        tag: A hash of all that the total depends on.
    """

    total: np.ndarray
    survivors: tuple[int, ...]
    tag: str


# By client, its answer; clients that do not answer in time are left out.
Ask = Callable[[Mapping[int, Question]], Mapping[int, Mapping[str, bytes]]]


def collect(terms: Terms, keys: Mapping[int, bytes], ask: Ask) -> Summed:
    """Carry out the three phases that follow the clients' public keys.

    Args:
        terms: The sum.
        keys: The public key of each client that answered the first phase.
        ask: Asks clients and returns their answers.

    Raises:
        ProtocolError: If fewer clients than the threshold answer a phase. An answer of another form does not count.
    """
    roster = {client: key for client, key in sorted(keys.items()) if len(key) == ss.PUBLIC_BYTES}
    everyone = tuple(roster)
    _enough(everyone, terms, "sent a key")
    listed = b"".join(roster.values())
    answers = ask({client: Question("share", everyone, {"keys": listed}) for client in everyone})
    boxes = {client: dict(zip((other for other in everyone if other != client), cut))
             for client, cut in _cut(answers, "boxes", ss.BOX_BYTES, len(everyone) - 1)}

    present = tuple(boxes)
    _enough(present, terms, "shared their secrets")
    questions = {}
    for client in present:
        senders = tuple(sender for sender in present if sender != client)
        questions[client] = Question("mask", senders, {"boxes": b"".join(boxes[sender][client] for sender in senders)})
    masked = {client: np.frombuffer(whole, "<u4") for client, (whole,) in _cut(ask(questions), "masked", 4 * terms.size, 1)}

    survivors = tuple(masked)
    _enough(survivors, terms, "sent their vectors")
    answers = ask({client: Question("reveal", survivors) for client in survivors})
    revealed = {client: dict(zip(present, cut)) for client, cut in _cut(answers, "shares", ss.SHARE_BYTES, len(present))}
    _enough(tuple(revealed), terms, "revealed their shares")
    return Summed(ss.unmask(terms, roster, present, masked, revealed), survivors, ss.tag_of(terms, roster, survivors))


def _enough(clients: Sequence[int], terms: Terms, what: str) -> None:
    if len(clients) < terms.threshold:
        raise ProtocolError(f"{len(clients)} clients {what}, but the sum needs {terms.threshold}, so that no single update can be "
                            "told from it")


def _cut(answers: Mapping[int, Mapping[str, bytes]], name: str, length: int, count: int) -> Iterator[tuple[int, list[bytes]]]:
    """Return, in ascending order of clients, the answers that hold `count` values of `length` bytes and nothing else."""
    for client, parts in sorted(answers.items()):
        if set(parts) == {name} and len(parts[name]) == length * count:
            yield client, _pieces(parts[name], length)


def _pieces(data: bytes, length: int) -> list[bytes]:
    return [data[start:start + length] for start in range(0, len(data), length)]


# The client's side

@dataclass
class Held:
    """What a client keeps while a secure sum is under way.

    Attributes:
        terms: The sum.
        vector: (size,) what the client adds.
        price: What the sum costs the client, or None for a sum without noise.
        promises: What the client has agreed to.
        keys, inbox: The public keys, and the shares of others, that the client was sent in the phases so far.
    """

    terms: Terms
    vector: np.ndarray
    price: Price | None = None
    promises: Promises = field(default_factory=Promises)
    keys: dict[int, bytes] = field(default_factory=dict)
    inbox: ss.Shares = field(default_factory=dict)

    def begin(self, terms: Terms) -> None:
        """Begin another attempt with the same vector."""
        self.terms, self.keys, self.inbox = terms, {}, {}


def answer(question: Question, member: Member, held: Held) -> dict[str, bytes]:
    """Return a client's answer to a question, and update `held`, which must be saved before the answer is sent.

    Raises:
        ProtocolError: If the question is not of the form in the module's table, or must not be answered.
    """
    phase, clients, parts = question.phase, question.clients, question.parts
    if list(clients) != sorted(set(clients)):
        raise ProtocolError(f"phase {phase}: the list of clients is not in ascending order")
    if phase == "share":
        keys = dict(zip(clients, _exactly(parts, "keys", ss.PUBLIC_BYTES, len(clients))))
        boxes = ss.share(member, held.terms, held.vector, keys, held.promises)
        held.keys = keys
        return {"boxes": b"".join(boxes.values())}
    if phase == "mask":
        inbox = dict(zip(clients, _exactly(parts, "boxes", ss.BOX_BYTES, len(clients))))
        masked, held.inbox = ss.mask(member, held.terms, held.vector, held.keys, inbox, held.promises)
        return {"masked": masked.astype("<u4").tobytes()}
    if phase == "reveal":
        if parts:
            raise ProtocolError("phase reveal: unexpected buffers")
        shares = ss.reveal(member, held.terms, held.vector, held.keys, held.inbox, clients, held.promises)
        return {"shares": b"".join(shares.values())}
    raise ProtocolError(f"phase {phase!r:.40}, expected one of {', '.join(PHASES)}")


def _exactly(parts: Mapping[str, bytes], name: str, length: int, count: int) -> list[bytes]:
    if set(parts) != {name} or len(parts[name]) != length * count:
        raise ProtocolError(f"expected {length * count} bytes called {name} and nothing else")
    return _pieces(parts[name], length)


def write_held(held: Held) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what is held as plain data and arrays, to be saved on disk.

    The promises are not part of it, because they outlast the sum.
    """
    terms = held.terms
    plain = {"terms": [terms.run, terms.stage, terms.round, terms.attempt, terms.threshold, [list(s) for s in terms.sections]],
             "price": None if held.price is None else asdict(held.price),
             "keys": {str(i): key.hex() for i, key in held.keys.items()},
             "inbox": {str(i): [share.hex() for share in shares] for i, shares in held.inbox.items()}}
    return plain, {"vector": np.asarray(held.vector, np.int64)}


def read_held(plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray], promises: Promises) -> Held:
    """Return what is held from the plain data and arrays of `write_held`."""
    run, stage, round, attempt, threshold, sections = plain["terms"]
    terms = Terms(run, stage, round, attempt, threshold, tuple((length, sigma) for length, sigma in sections))
    price = None if plain["price"] is None else Price(**plain["price"])
    return Held(terms, arrays["vector"], price, promises,
                {int(i): bytes.fromhex(key) for i, key in plain["keys"].items()},
                {int(i): (bytes.fromhex(first), bytes.fromhex(second)) for i, (first, second) in plain["inbox"].items()})
