"""Pack messages and replies for sending: plain data in a head, and tensors in buffers of `fedms.federated.encoding`.

Every engine sends these packed forms, so that all of them have the same rounding and count the same bytes.
"""
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedms.federated import encoding as wire, schema
from fedms.federated.client import Message, Reply, Share
from fedms.federated.schema import SchemaError
from fedms.tensors import Tensors


@dataclass(frozen=True)
class Packed:
    """A packed message or reply.

    Attributes:
        head: Plain data that JSON can hold.
        parts: Buffers by name. Parts without tensors are omitted.
    """

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
    """Pack a message. It does not say which other clients were sampled."""
    head = {"stage": message.stage, "round": message.round, "depth": message.depth,
            "applied_depth": message.applied_depth}
    parts = {**_pack({"tensors": message.tensors, "constants": message.constants}, encoding),
             **_pack({"sums": message.statistics})}
    if "constants" in parts:
        head["constants"] = hashlib.sha256(parts["constants"]).hexdigest()
    return Packed(head, parts)


def unpack_message(packed: Packed) -> Message:
    """Unpack a message.

    Raises:
        SchemaError, WireError: If it is not valid.
    """
    head = schema.MESSAGE.read(packed.head)
    _check_parts(packed, {"tensors", "constants", "sums"})
    return Message(head["stage"], head["round"], (), head["depth"], head["applied_depth"],
                   packed.tensors("tensors"), packed.tensors("constants"), packed.tensors("sums"))


def pack_reply(reply: Reply, encoding: str) -> Packed:
    """Pack a reply. Its tensors are encoded by `[wire] dtype`; statistics are exact."""
    head = {"client": reply.client, "n_train": reply.n_train, "n_validation": reply.n_validation, "score": reply.score,
            "metrics": reply.metrics}
    return Packed(head, _pack({"tensors": reply.tensors}, encoding) | _pack({"sums": reply.statistics}))


def unpack_reply(packed: Packed) -> Reply:
    """Unpack a reply. `Server.admit` then checks whether it matches the message.

    Raises:
        SchemaError, WireError: If it is not valid.
    """
    head = schema.REPLY.read(packed.head)
    _check_parts(packed, {"tensors", "sums"})
    return Reply(head["client"], packed.tensors("tensors"), head["n_train"], head["n_validation"], head["score"],
                 head["metrics"], packed.tensors("sums"))


def pack_share(share: Share) -> Packed:
    """Return a client's share of a secure sum as it travels: its public key, or its masked integer steps."""
    parts = {"key": share.key} if share.key is not None else {"steps": np.ascontiguousarray(share.steps, "<i4").tobytes()}
    return Packed({"client": share.client}, parts)


def unpack_share(packed: Packed, size: int, masks: bool) -> Share:
    """Return a share as it arrives: a vector of `size` values, or a public key if clients mask their vectors.

    Raises:
        SchemaError: If it is neither.
    """
    head, name, length = schema.VECTOR.read(packed.head), *(("key", schema.PUBLIC_KEY_BYTES) if masks else ("steps", 4 * size))
    if set(packed.parts) != {name} or len(packed.parts[name]) != length:
        raise SchemaError(f"its buffers are not {length} bytes called {name}")
    data = packed.parts[name]
    return Share(head["client"], key=data) if masks else Share(head["client"], np.frombuffer(data, "<i4"))


def _check_parts(packed: Packed, known: set[str]) -> None:
    if unknown := sorted(packed.parts.keys() - known):
        raise SchemaError(f"an unknown part {schema.shown(unknown[0])}")


def _pack(groups: Mapping[str, Tensors], encoding: str = "fp32") -> dict[str, bytes]:
    # By name: a server that goes on from a checkpoint, which has an order of its own, sends the same bytes.
    return {part: wire.pack(dict(sorted(tensors.items())), encoding) for part, tensors in groups.items() if tensors}
