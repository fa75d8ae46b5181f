"""What travels through Flower: a head of plain data as JSON, and named buffers of bytes. Nothing has to be unpickled.

The buffers are Flower's `Array`s, which its object store keeps once however many clients they are for. This file does
not import torch: a process that only says who it is shall not wait for it.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedms.config import RunConfig
from fedms.errors import FedMSError
from fedms.federated import schema

HEAD_BYTES = 2**20
_FORM = "fedms.wire"
_PARTS = ("tensors", "constants", "sums", "steps", "key", "keys", "boxes", "masked", "shares")


class MailError(FedMSError):
    """Content that is not what it should be; it must be refused."""


def buffers(parts: Mapping[str, bytes]) -> dict[str, Array]:
    """Return arrays that several messages can use."""
    return {name: Array(dtype="uint8", shape=(len(data),), stype=_FORM, data=data) for name, data in parts.items()}


def tables_of(config: RunConfig) -> dict[str, Any]:
    """Return the tables of a run file for a message, without the path of the secret key, which differs between machines."""
    return config.model_dump(mode="json", exclude_none=True, exclude={"privacy": {"key"}})


def write(head: Mapping[str, Any], parts: Mapping[str, Array]) -> RecordDict:
    """Return a head of plain values and parts of arrays as the content of a Flower message."""
    text = json.dumps(head, allow_nan=False)
    return RecordDict({"head": ConfigRecord({"json": text}), "parts": ArrayRecord(dict(parts))})


def read(content: RecordDict, limit: int | None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the head and the buffers of a message.

    Args:
        limit: Largest total size of the buffers in bytes.

    Raises:
        MailError: If the content has another form, or is larger. Sizes are checked before anything is parsed.
    """
    if set(content.keys()) != {"head", "parts"}:
        names = ", ".join(schema.shown(name) for name in list(content.keys())[:8])
        raise MailError(f"records {names or 'none'}, expected head and parts")
    record, arrays = content["head"], content["parts"]
    if not isinstance(record, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MailError("records of the wrong kind")
    text = record.get("json")
    if not isinstance(text, str) or len(text) > HEAD_BYTES:
        raise MailError(f"the head is no text of up to {HEAD_BYTES} characters")
    for name in arrays:
        if name not in _PARTS:
            raise MailError(f"a buffer {schema.shown(name)}, expected {', '.join(_PARTS)}")
    size = sum(len(array.data) for array in arrays.values())
    if limit is not None and size > limit:
        raise MailError(f"{size} bytes; accepted here: up to {limit}")
    if forms := {array.stype for array in arrays.values()} - {_FORM}:
        raise MailError(f"buffers of the form {schema.shown(forms.pop())}, expected {_FORM!r}")
    try:
        head = schema.read_json(text)
    except schema.SchemaError as error:
        raise MailError(str(error)) from None
    return head, {name: array.data for name, array in arrays.items()}


def release() -> str:
    """Return the version of this installation, as both sides state it."""
    return metadata.version("fedms")


def release_of(version: str) -> str:
    """Major and minor number of a version: what must be the same on both sides."""
    return ".".join(version.split(".")[:2])
