"""What is asked of clients, and what they answer, before anything in it is believed."""
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
    """A message under way: to which client, what its answer must repeat, its bytes, which round it is of, and when it left."""

    client: int
    nonce: str
    size: int
    group: str
    since: float


@dataclass(frozen=True)
class Answer:
    """What came back for a message, or the reason why nothing did."""

    client: int
    asked: Asked | None
    mail: Mail | None
    reason: str = ""


def not_taken(client: int) -> Answer:
    """The answer in the place of one to a message that could not be sent."""
    return Answer(client, None, None, "the SuperLink did not take its message")


class Unusable(FedMSError):
    """A client sent no answer that can be used; the message is the reason."""


class Pauses:
    """Waits that grow, so that quick answers are seen quickly and slow ones cost nothing."""

    def __init__(self) -> None:
        self.next, self.most = POLL

    def sleep(self) -> None:
        time.sleep(self.next)
        self.next = min(1.5 * self.next, self.most)


def read(reply: Mail, limit: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The head and the buffers of a reply of at most `limit` bytes. Raises Unusable if it has none."""
    if reply.has_error():
        raise Unusable(f"no answer: {printable(reply.error.reason, NAME)} (Flower's error {reply.error.code})")
    try:
        return transport.read(reply.content, limit)
    except transport.MailError as error:
        raise Unusable(f"its reply is refused: {error}") from None


def visit_of(head: Mapping[str, Any], parts: dict[str, bytes]) -> tuple[Visit, int]:
    """The visit that an answer tells of, and the bytes of its reply."""
    told = head["visit"]
    if told["reason"] is not None:
        return Visit(None, **told), 0
    packed = Packed(head["reply"], parts)
    try:
        return Visit(unpack_reply(packed), **told), packed.size
    except (SchemaError, WireError) as error:
        raise Unusable(f"its reply is refused: {error}") from None
