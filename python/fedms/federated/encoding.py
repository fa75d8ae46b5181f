"""What travels: named tensors as one contiguous buffer behind a manifest, nothing that has to be unpickled.

    8 bytes   length of the manifest, little-endian
    manifest  JSON: a list of [name, shape, dtype, encoding]
    payload   the tensors' bytes in the manifest's order; an int8 tensor's scale (float32) before its values

Float tensors travel as `fp32`, `bf16` or `int8` (`[wire] dtype`; int8 is symmetric, with a scale for each row or,
where those are fewer, column); other dtypes as they are. Names, shapes and sizes are checked before anything is
allocated, so a message cannot make its reader do more than its own length allows.
"""
from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedms.errors import FedMSError
from fedms.federated.schema import TENSOR, SchemaError, shown
from fedms.tensors import Tensors

MOST_TENSORS, MOST_DIMENSIONS, MOST_ELEMENTS = 2**16, 8, 2**40      # of one message; far above any model's
ENCODINGS = ("fp32", "bf16", "int8")
_HEADER = struct.Struct("<Q")
_EXACT = {"float64": torch.float64, "int64": torch.int64}
_KINDS = {torch.float32: "float32", **{dtype: kind for kind, dtype in _EXACT.items()}}


class WireError(FedMSError):
    """A message that is not what it should be; it must be refused."""


def pack(tensors: Mapping[str, Tensor], encoding: str = "fp32") -> bytes:
    """Encode named tensors as one message. Float32 tensors are sent in the encoding, float64 and int64 tensors exactly.

    Raises:
        ValueError: If the encoding is unknown, or a tensor has another dtype.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    manifest: list[list[Any]] = []
    payload: list[bytes] = []
    for name, tensor in tensors.items():
        if tensor.requires_grad or tensor.device.type != "cpu":
            tensor = tensor.detach().cpu()
        kind = _KINDS.get(tensor.dtype)
        if kind == "float32":
            used = "fp32" if encoding == "int8" and tensor.dim() < 2 else encoding
            payload += _encode(tensor, used)
        elif kind in _EXACT:
            used = "exact"
            payload.append(tensor.numpy().tobytes())
        else:
            raise ValueError(f"{name}: {tensor.dtype} does not travel; use float32, float64 or int64")
        manifest.append([name, list(tensor.shape), kind, used])
    head = json.dumps(manifest, separators=(",", ":")).encode()
    return b"".join([_HEADER.pack(len(head)), head, *payload])


def unpack(message: bytes) -> Tensors:
    """Return the tensors of a message; those that were float32 are float32 again.

    Raises:
        WireError: If the message is cut off, too long, or not of this form.
    """
    if len(message) < _HEADER.size:
        raise WireError(f"a message of {len(message)} bytes; expected at least {_HEADER.size}")
    (length,) = _HEADER.unpack_from(message)
    start = _HEADER.size + length
    if start > len(message):
        raise WireError(f"the manifest should be {length} bytes; the message has {len(message) - _HEADER.size}")
    manifest = _check_manifest(message[_HEADER.size:start])
    sizes = [_size(shape, kind, used) for _, shape, kind, used in manifest]
    if start + sum(sizes) != len(message):
        raise WireError(f"the payload should be {sum(sizes)} bytes; the message has {len(message) - start}")
    tensors: Tensors = {}
    for (name, shape, kind, used), size in zip(manifest, sizes):
        tensors[name] = _decode(message[start:start + size], shape, kind, used)
        start += size
    return tensors


def _check_manifest(head: bytes) -> list[tuple[str, tuple[int, ...], str, str]]:
    try:
        manifest = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the manifest is no JSON: {shown(str(error))}") from None
    if not isinstance(manifest, list) or len(manifest) > MOST_TENSORS:
        raise WireError(f"the manifest is no list of up to {MOST_TENSORS} tensors")
    entries = [_check_entry(entry) for entry in manifest]
    if len({name for name, *_ in entries}) < len(entries):
        raise WireError("the manifest names a tensor twice")
    return entries


def _check_entry(entry: Any) -> tuple[str, tuple[int, ...], str, str]:
    if not isinstance(entry, list) or len(entry) != 4:
        raise WireError(f"{shown(entry)} in the manifest, expected [name, shape, dtype, encoding]")
    name, shape, kind, used = entry
    try:
        TENSOR.read(name)
    except SchemaError as error:
        raise WireError(f"the manifest names {error}") from None
    if not isinstance(kind, str) or not isinstance(used, str):
        raise WireError(f"{name}: dtype and encoding are no strings")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise WireError(f"{name}: the shape is {shown(shape)}, expected a list of up to {MOST_DIMENSIONS} sizes")
    # Each size counts as at least 1: an empty tensor with huge sizes beside the 0 cannot be made either.
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(max(n, 1) for n in shape) > MOST_ELEMENTS:
        raise WireError(f"{name}: an impossible shape, of sizes {', '.join(map(shown, shape))}")
    known = used in ENCODINGS if kind == "float32" else kind in _EXACT and used == "exact"
    if not known or (used == "int8" and len(shape) < 2):
        raise WireError(f"{name}: unknown form {shown(kind)}, {shown(used)}")
    return name, tuple(shape), kind, used


def _size(shape: tuple[int, ...], kind: str, used: str) -> int:
    count = math.prod(shape)
    if used == "int8":
        return 4 * math.prod(_scale_shape(shape)) + count
    return count * {"fp32": 4, "bf16": 2, "exact": 8}[used]


def _encode(tensor: Tensor, used: str) -> list[bytes]:
    if used == "fp32":
        return [tensor.numpy().tobytes()]
    if used == "bf16":
        return [tensor.bfloat16().view(torch.int16).numpy().tobytes()]
    matrix = tensor.reshape(_matrix_shape(tensor.shape))
    scale = torch.zeros(_scale_shape(tensor.shape))
    if tensor.numel():
        scale = matrix.abs().amax(1 if scale.shape[1] == 1 else 0, keepdim=True) / 127
    values = torch.round(matrix / scale.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.int8)
    return [scale.numpy().tobytes(), values.numpy().tobytes()]


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = _matrix_shape(shape)
    return (rows, 1) if rows <= columns else (1, columns)


def _decode(data: bytes, shape: tuple[int, ...], kind: str, used: str) -> Tensor:
    if used == "int8":
        scale = _values(data, "<f4", _scale_shape(shape))
        values = _values(data[scale.nbytes:], "i1", _matrix_shape(shape))
        return (values.float() * scale).view(shape)
    if used == "bf16":
        return _values(data, "<i2", shape).view(torch.bfloat16).float()
    return _values(data, {"float32": "<f4", "float64": "<f8", "int64": "<i8"}[kind], shape)


def _values(data: bytes, form: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, form, math.prod(shape)).reshape(shape).copy())
