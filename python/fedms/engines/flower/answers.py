"""Messages that clients were sent, and their answers, which are checked here before they are used."""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message as Mail

from fedms.engines.flower import transport
from fedms.errors import FedMSError
from fedms.federated.client import Visit
from fedms.federated.encoding import WireError
from fedms.federated.packing import Packed, unpack_reply
from fedms.federated.schema import NAME, SchemaError
from fedms.foreign import printable

POLL = (0.01, 0.5)          # seconds between looks for replies, at first and at most


@dataclass(frozen=True)
class Asked:
    """A message that waits for its answer.

    Attributes:
        client: Id of the client.
        nonce: Text that the answer must repeat.
        size: Bytes that were sent.
        group: Stage and round of the message, such as "stage1 3", or "evaluation".
        since: Time of sending, by `time.monotonic`.
    """

    client: int
    nonce: str
    size: int
    group: str
    since: float


@dataclass(frozen=True)
class Answer:
    """The answer to a message, or the reason why there is none."""

    client: int
    asked: Asked | None
    mail: Mail | None
    reason: str = ""


def not_taken(client: int) -> Answer:
    """Return the answer that stands for a message that could not be sent."""
    return Answer(client, None, None, "the SuperLink did not take its message")


class Unusable(FedMSError):
    """A client's answer is missing or cannot be used; the message gives the reason."""


class Pauses:
    """Pauses of increasing length, so that quick answers are noticed soon and slow ones cost little."""

    def __init__(self) -> None:
        self.next, self.most = POLL

    def sleep(self) -> None:
        """Pause. The next pause is longer, up to the second value of POLL."""
        time.sleep(self.next)
        self.next = min(1.5 * self.next, self.most)


def read(reply: Mail, limit: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the head and the buffers of a reply of at most `limit` bytes, or raise Unusable if it is not valid."""
    if reply.has_error():
        raise Unusable(f"no answer: {printable(reply.error.reason, NAME)} (Flower's error {reply.error.code})")
    try:
        return transport.read(reply.content, limit)
    except transport.MailError as error:
        raise Unusable(f"its reply is refused: {error}") from None


def visit_of(head: Mapping[str, Any], parts: dict[str, bytes]) -> tuple[Visit, int]:
    """Return the visit in an answer's head and buffers, and the size of its reply in bytes."""
    told = head["visit"]
    if told["reason"] is not None:
        return Visit(None, **told), 0
    packed = Packed(head["reply"], parts)
    try:
        return Visit(unpack_reply(packed), **told), packed.size
    except (SchemaError, WireError) as error:
        raise Unusable(f"its reply is refused: {error}") from None
