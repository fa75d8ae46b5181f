"""Caches, in memory or on disk, for values that stay constant during training.

Such values are the outputs of the constant prefix, the logits of a frozen expert, and pooled features. A value must depend
on nothing but its key. A cache holds at most `max_bytes`: it drops the least recently used values first, and does not keep
a value that is larger than the whole cache. A value that is not needed yet can be offered to it: it takes the place that is
left, and gives it up before any value that was asked for.
"""
from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:     # not on Windows
    fcntl = None        # type: ignore[assignment]

Key = tuple[object, ...]

STORAGE = ("fp32", "bf16", "int8")
WRITTEN_WITHIN = 3600       # seconds: an older temporary file belongs to no living process


class Ragged:
    """Rows of different lengths stored end to end, without padding.

    Args:
        rows: One tensor (T_i, ..., D) for each sample, all of the same dtype and trailing shape; at least one.
        storage: "fp32" (rows are stored unchanged), "bf16", or "int8" (symmetric, one scale for each vector of D values).
            With the last two, rows are returned in float32 with a rounding error.

    Raises:
        ValueError: If the storage is none of these.
    """

    def __init__(self, rows: Sequence[Tensor], storage: str = "fp32") -> None:
        self._allocate(torch.tensor([len(row) for row in rows]), rows[0], storage)
        for i, row in enumerate(rows):
            self.put(i, row)

    @classmethod
    def empty(cls, lengths: Tensor, like: Tensor, storage: str = "fp32") -> Ragged:
        """Allocate space for n rows, to be filled with `put`, so that no row is in memory twice.

        Args:
            lengths: (n,) the length T_i of each row.
            like: A row (T, ..., D) that gives dtype, device and trailing shape.
            storage: As above.
        """
        self = cls.__new__(cls)
        self._allocate(lengths, like, storage)
        return self

    def _allocate(self, lengths: Tensor, like: Tensor, storage: str) -> None:
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
        shape = (int(lengths.sum()), *like.shape[1:])
        dtype = {"fp32": like.dtype, "bf16": torch.bfloat16, "int8": torch.int8}[storage]
        self.scales = torch.empty(*shape[:-1], 1, dtype=like.dtype, device=like.device) if storage == "int8" else None
        self._set(torch.empty(shape, dtype=dtype, device=like.device), lengths)

    def _set(self, values: Tensor, lengths: Tensor) -> None:
        self.values, self.lengths = values, lengths
        self.offsets = torch.cumsum(lengths, 0) - lengths
        self.equal = len(lengths) > 0 and bool((lengths == lengths[0]).all())    # in length, as those of images are

    def put(self, i: int, row: Tensor) -> None:
        """Store row i, (T_i, ..., D)."""
        span = self._span(i)
        if self.scales is not None:
            scales = row.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny) / 127
            self.scales[span] = scales
            row = torch.round(row / scales)
        self.values[span] = row

    def _span(self, i: int) -> slice:
        start = int(self.offsets[i])
        return slice(start, start + int(self.lengths[i]))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values()) + self.offsets.nbytes

    def row(self, i: int) -> Tensor:
        """Return row i, (T_i, ..., D), as a view if it is stored unchanged."""
        span = self._span(i)
        return _restored(self.values[span], None if self.scales is None else self.scales[span])

    def pad(self, indices: Tensor) -> Tensor:
        """Return the rows at `indices` (B,), padded with zeros to the longest of them, as (B, T, ..., D)."""
        if self.equal:      # one gather, which threads share
            shape, at = (len(self), int(self.lengths[0])), indices.to(self.values.device)
            values = self.values.unflatten(0, shape).index_select(0, at)
            return _restored(values, None if self.scales is None else self.scales.unflatten(0, shape).index_select(0, at))
        return nn.utils.rnn.pad_sequence([self.row(i) for i in indices.tolist()], batch_first=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold the rows, for `from_tensors`."""
        parts = {"values": self.values, "lengths": self.lengths}
        return parts if self.scales is None else {**parts, "scales": self.scales}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Ragged:
        """Return the rows that `tensors` described, without a copy."""
        self = cls.__new__(cls)
        self.scales = tensors.get("scales")
        self._set(tensors["values"], tensors["lengths"])
        return self


def _restored(values: Tensor, scales: Tensor | None) -> Tensor:
    """Return stored values as they are read: unchanged, or in float32."""
    if scales is not None:
        return values * scales
    return values.float() if values.dtype == torch.bfloat16 else values


class ConstantCache:
    """A cache in memory of at most `max_bytes` bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.entries: OrderedDict[Key, Tensor | Ragged] = OrderedDict()

    def get(self, key: Key, compute: Callable[[], Tensor | Ragged]) -> Tensor | Ragged:
        """Return the value of a key, from the cache or by calling `compute`."""
        value = self.find(key)
        if value is None:
            value = compute()
            self.keep(key, value)
        return value

    def find(self, key: Key) -> Tensor | Ragged | None:
        """Return the value of a key, or None if it is not there."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key]

    def keep(self, key: Key, value: Tensor | Ragged) -> bool:
        """Store a value whose key is not there. Return False if it is larger than the whole cache."""
        if value.nbytes > self.max_bytes:
            return False
        while self.nbytes + value.nbytes > self.max_bytes:
            self.nbytes -= self.entries.popitem(last=False)[1].nbytes
        self.entries[key] = value
        self.nbytes += value.nbytes
        return True

    def offer(self, key: Key, value: Tensor | Ragged) -> None:
        """Keep a value that will be asked for later if there is room for it; it is then the first to be dropped."""
        if key not in self.entries and self.nbytes + value.nbytes <= self.max_bytes:
            self.entries[key] = value
            self.entries.move_to_end(key, last=False)
            self.nbytes += value.nbytes


class DiskCache:
    """A cache on disk: one memory-mapped safetensors file for each value, which is kept after the process ends.

    Each file is written under a temporary name and renamed, so it is either complete or absent. A process verifies the
    checksum of a file when it first opens it, and computes the value of a damaged file again. If the disk is full, values
    are not stored but computed at each request. A file is mapped only while its value is in use, so the cache takes no
    memory. While one process computes a value, others that ask for the same one wait for it.

    Args:
        folder: Created if it does not exist. Several processes may share it.
        max_bytes: Largest total size of the files in the folder.
        fingerprint: Text that identifies everything else that the values depend on (model and data).
    """

    SUFFIX = ".constant"

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, fingerprint: str) -> None:
        self.folder, self.max_bytes, self.fingerprint = Path(folder), max_bytes, fingerprint
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)      # the values are computed from private samples
        self.verified: dict[Path, int] = {}     # inodes of the files whose checksum this process has verified
        self._remove_leftovers()
        self._make_room(0)                               # max_bytes may have been larger in an earlier process

    def get(self, key: Key, compute: Callable[[], Tensor | Ragged]) -> Tensor | Ragged:
        """Return the value of a key, from the cache or by calling `compute`."""
        value = self.find(key)
        if value is not None:
            return value
        with self.alone(key):
            value = self.find(key)      # of another process, for which this one has waited
            if value is not None:
                return value
            value = compute()
            if not self.keep(key, value):
                return value
        value = self.find(key)
        if value is None:
            raise OSError(f"{self._path(key)}: cannot be read back although it was just written; the disk may be failing")
        return value

    def find(self, key: Key) -> Tensor | Ragged | None:
        """Return the value of a key, or None if it is not there, or damaged."""
        return self._read(self._path(key))

    def keep(self, key: Key, value: Tensor | Ragged) -> bool:
        """Store a value. Return False if it is larger than the whole cache, or the disk is full."""
        return self._write(self._path(key), value, self.max_bytes)

    @contextmanager
    def alone(self, key: Key) -> Iterator[None]:
        """Keep other processes out of the same context for the same key. Ask for no other key of this cache within it, unless the value
        depends on that one: two processes could wait for each other.

        Where the file system has no locks nobody waits, and two processes may compute the same value.
        """
        place = int(self._path(key).stem[:15], 16)      # a byte of the lock file, which need not be there
        with suppress(OSError, AttributeError):
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, place)
        try:
            yield
        finally:
            with suppress(OSError, AttributeError):
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    @cached_property
    def _locks(self) -> BinaryIO:
        """The lock file. It stays open: to close it would end all locks that this process has in it."""
        return open(os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")

    def offer(self, key: Key, value: Tensor | Ragged) -> None:
        """Keep a value that will be asked for later if there is room for it; it is then the first to be dropped."""
        path, room = self._path(key), self.max_bytes - self.nbytes
        if value.nbytes <= room and not path.exists() and self._write(path, value, room):
            with suppress(FileNotFoundError):       # another process has dropped it
                os.utime(path, (0, 0))

    def _path(self, key: Key) -> Path:
        return self.folder / (hashlib.sha256(repr((self.fingerprint, key)).encode()).hexdigest() + self.SUFFIX)

    @property
    def nbytes(self) -> int:
        """Total size of the files in the folder, in bytes."""
        return sum(file.stat().st_size for file in self.folder.glob("*" + self.SUFFIX))

    def _read(self, path: Path) -> Tensor | Ragged | None:
        from safetensors import SafetensorError, safe_open

        try:
            file_id = path.stat().st_ino        # a new file at every write
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                digest = (file.metadata() or {}).get("sha256")
            if self.verified.get(path) != file_id:
                if digest != _digest(tensors):
                    return None
                self.verified[path] = file_id
            os.utime(path)      # the least recently used files are dropped first
        except (FileNotFoundError, SafetensorError, OSError):
            return None
        return tensors["tensor"] if "tensor" in tensors else Ragged.from_tensors(tensors)

    def _write(self, path: Path, value: Tensor | Ragged, most: int) -> bool:
        """Write a value's file, and return whether it was written. A file of more than `most` bytes is not."""
        from safetensors.torch import save

        parts = {"tensor": value} if isinstance(value, Tensor) else value.tensors()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in parts.items()}
        data = save(tensors, {"sha256": _digest(tensors)})
        if len(data) > most:
            return False
        temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
        try:
            self._make_room(len(data))
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            return False
        return True

    def _remove_leftovers(self) -> None:
        """Remove what processes that were killed while they wrote a value have left. A value is written in seconds."""
        for file in self.folder.glob("*.tmp"):
            with suppress(OSError):     # another process was quicker
                if time.time() - file.stat().st_mtime > WRITTEN_WITHIN:
                    file.unlink()

    def _make_room(self, size: int) -> None:
        files = sorted(self.folder.glob("*" + self.SUFFIX), key=lambda file: file.stat().st_mtime_ns)
        held = sum(file.stat().st_size for file in files)
        for file in files:
            if held + size <= self.max_bytes:
                break
            held -= file.stat().st_size
            self.verified.pop(file, None)
            file.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([[n, str(t.dtype), list(t.shape)] for n, t in sorted(tensors.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(data)  # type: ignore[arg-type]  # numpy's stubs: a buffer from 3.12 on
    return digest.hexdigest()
