"""Messages and replies as they travel: plain data for the head, and the tensors as buffers of `fedms.wire`.

Every engine sends what is packed here and reads it back, so that all of them lose the same bits to an encoding and
count the same bytes.
"""
from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedms import wire
from fedms.client import Message, Reply
from fedms.resident import Tensors
from fedms.wire import WireError


@dataclass(frozen=True)
class Packed:
    """head: plain data, whatever JSON holds. parts: buffers by name; what holds no tensor is left out."""

    head: dict[str, Any]
    parts: dict[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the buffers."""
        return sum(map(len, self.parts.values()))

    def without(self, name: str) -> Packed:
        return replace(self, parts={part: buffer for part, buffer in self.parts.items() if part != name})

    def tensors(self, name: str) -> Tensors:
        return wire.unpack(self.parts[name]) if name in self.parts else {}


def pack_message(message: Message, encoding: str) -> Packed:
    """Who else was sampled stays with the server."""
    head = {"stage": message.stage, "round": message.round, "depth": message.depth,
            "applied_depth": message.applied_depth}
    parts = {**_pack({"tensors": message.tensors, "constants": message.constants}, encoding),
             **_pack({"sums": message.sums})}
    if "constants" in parts:
        head["constants"] = hashlib.sha256(parts["constants"]).hexdigest()
    return Packed(head, parts)


def unpack_message(packed: Packed) -> Message:
    """The message as it arrives. Raises WireError, KeyError or TypeError for what is no message."""
    head = packed.head
    return Message(str(head["stage"]), int(head["round"]), (), int(head["depth"]), int(head["applied_depth"]),
                   packed.tensors("tensors"), packed.tensors("constants"), packed.tensors("sums"))


def pack_reply(reply: Reply, encoding: str) -> Packed:
    head = {"client": reply.client, "n_train": reply.n_train, "n_validation": reply.n_validation, "score": reply.score,
            "metrics": reply.metrics}
    return Packed(head, _pack({"tensors": reply.tensors}, encoding) | _pack({"sums": reply.sums}))


def unpack_reply(packed: Packed) -> Reply:
    """The reply as it arrives.

    Raises:
        WireError: if it is none. Whether it answers what was asked is for `Server.admit` to say.
    """
    head = packed.head
    counts = {name: head.get(name) for name in ("client", "n_train", "n_validation")}
    for name, value in counts.items():
        if type(value) is not int:
            raise WireError(f"{name} is {value!r}, expected a whole number")
    metrics = head.get("metrics")
    if not isinstance(metrics, Mapping):
        raise WireError(f"metrics are {metrics!r}, expected numbers by name")
    for name, value in {"score": head.get("score"), **metrics}.items():
        if value is not None and not is_number(value):
            raise WireError(f"{name} is {value!r:.40}, expected a number")
    if unknown := sorted(packed.parts.keys() - {"tensors", "sums"}):
        raise WireError(f"an unknown part {unknown[0]!r}")
    return Reply(counts["client"], packed.tensors("tensors"), counts["n_train"], counts["n_validation"],
                 head.get("score"), dict(metrics), packed.tensors("sums"))


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a finite number that arithmetic can take; JSON's whole numbers may have any length."""
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def _pack(groups: Mapping[str, Tensors], encoding: str = "fp32") -> dict[str, bytes]:
    # By name: a server that goes on from a checkpoint, which has an order of its own, sends the same bytes.
    return {part: wire.pack(dict(sorted(tensors.items())), encoding) for part, tensors in groups.items() if tensors}
