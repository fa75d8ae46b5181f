"""Checkpoints: the state of a run or of a client's node on disk, which survives a crash at any moment.

    checkpoint/
      000012.json            a manifest: the plain state, and which object holds which tensors
      <sha256>.safetensors   objects, named by the hash of their content

A checkpoint is its manifest. Objects are written before it, each file by way of a temporary one, fsync and rename, and
the names of all are made to last together: a power cut before that may leave a manifest without its object, a damaged
checkpoint like any other. Older checkpoints are dropped after it. A client whose private state did not change since the
checkpoint before keeps its object. The last two checkpoints are kept; every byte is verified on load, and a damaged
checkpoint falls back to the one before it. As they hold what clients keep to themselves, only their owner can read them.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors.numpy import save as save_arrays

from fedms.errors import CheckpointError
from fedms.foreign import conform, parse_json, read_regular, read_tensors
from fedms.storage.durable import private_folder, write_durably
from fedms.tensors import Tensors

FORMAT = 2
KEPT = 2


def _keep_replies(content: dict[str, Any]) -> dict[str, Any]:
    """Migrate format 1, which knew no aggregation rule that needs all replies of a round at once."""
    content["state"]["server"]["collected"] |= {"streams": True, "replies": 0}
    return content


# From each older format a function that turns its manifest's content into the next one's.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _keep_replies}


_Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0)]
_Id = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class _Content(BaseModel):
    """What a manifest says: the plain state, and the objects of the server and of each client."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Annotated[int, Field(ge=1)]
    state: dict[str, Any]
    server: _Sha
    private: dict[_Id, _Sha]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    sha256: _Sha
    content: dict[str, Any]


_CONTENT, _MANIFEST = TypeAdapter(_Content), TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on.

    Attributes:
        state: Plain data (whatever JSON holds).
        tensors: The server's tensors, by name.
        private: Each client's own tensors, by client id.
    """

    state: dict[str, Any]
    tensors: Tensors
    private: Mapping[int, Tensors]


class CheckpointFolder:
    """Writes and reads the checkpoints in one folder.

    Args:
        path: The folder, which is made when it is first written to.
        kept: Number of checkpoints that stay, the newest ones.
    """

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        self.path, self.kept = path, kept
        self.good: list[int] = []                           # numbers of the checkpoints known to be whole, ascending
        self.written: dict[int, tuple[Tensors, str]] = {}   # each client's tensors as last saved, and their object

    def save(self, snapshot: Snapshot) -> str:
        """Write a checkpoint, then drop all but the newest ones.

        Returns:
            SHA-256 of its content, the same for the same snapshot.

        Raises:
            CheckpointError: If it cannot be written. The checkpoints before it are untouched.
        """
        try:
            private_folder(self.path)
            server = self._write_object(snapshot.tensors)
            changed = {client: tensors for client, tensors in snapshot.private.items()
                       if client not in self.written or self.written[client][0] is not tensors}
            if changed:
                name = self._write_object({f"{client}/{key}": tensor for client, tensors in changed.items()
                                           for key, tensor in tensors.items()})
                self.written |= {client: (tensors, name) for client, tensors in changed.items()}
            number = max([*self.good, *self._numbers()], default=0) + 1
            content = {"format": FORMAT, "state": snapshot.state, "server": server,
                       "private": {str(i): self.written[i][1] for i in sorted(snapshot.private)}}
            digest = _digest(content)
            write_durably(self._manifest(number), _dump({"sha256": digest, "content": content}), private=True)
            self.good = [*self.good, number][-self.kept:]
            self._drop_unused()
            return digest
        except OSError as error:
            raise CheckpointError(f"{self.path}: checkpoint cannot be written: {error.strerror or error}; the one "
                                  "before is intact") from error

    def load(self, digest: str | None = None) -> tuple[Snapshot | None, list[str]]:
        """Read the newest checkpoint that is whole. Those newer than it are dropped by the next :meth:`save`.

        Args:
            digest: SHA-256 of the checkpoint that is wanted, as :meth:`save` returned it; None for the newest.

        Returns:
            The snapshot, or None if there is none at all; and a note for each damaged checkpoint.

        Raises:
            CheckpointError: If there are checkpoints but none is whole, or one is of a newer format.
        """
        notes: list[str] = []
        for number in sorted(self._numbers(), reverse=True):
            try:
                if digest is not None and _digest(self._read_manifest(number)) != digest:
                    continue
                snapshot = self._read(number)
            except _Damaged as damage:
                notes.append(f"checkpoint {number} is damaged ({damage}); going back to the one before")
            else:
                self.good = [*self._readable(number)[:self.kept - 1][::-1], number]
                return snapshot, notes
        if notes and digest is None:
            raise CheckpointError(f"{self.path}: no checkpoint is whole: {'; '.join(notes)}. Start the run again")
        return None, notes

    def _readable(self, below: int) -> list[int]:
        """Return the numbers of older checkpoints whose manifests can be read, the newest first."""
        found = []
        for number in sorted((n for n in self._numbers() if n < below), reverse=True):
            try:
                self._read_manifest(number)
            except _Damaged:
                continue
            found.append(number)
        return found

    def _read(self, number: int) -> Snapshot:
        content = self._read_manifest(number)
        objects: dict[str, Tensors] = {}
        for name in {content["server"], *content["private"].values()}:
            objects[name] = self._read_object(name)
        private: dict[int, Tensors] = {}
        for client, name in content["private"].items():
            prefix = f"{client}/"
            private[int(client)] = {key.removeprefix(prefix): tensor for key, tensor in objects[name].items()
                                    if key.startswith(prefix)}
        self.written = {int(i): (private[int(i)], name) for i, name in content["private"].items()}
        return Snapshot(content["state"], objects[content["server"]], private)

    def _read_manifest(self, number: int) -> dict[str, Any]:
        path = self._manifest(number)
        try:
            outer = conform(_MANIFEST, parse_json(read_regular(path)))
        except (OSError, ValueError) as error:
            raise _Damaged(f"{path.name}: {error}") from None
        content = outer.content
        if _digest(content) != outer.sha256:
            raise _Damaged(f"{path.name}: wrong checksum")
        version = content.get("format")
        if type(version) is int and version > FORMAT:
            raise CheckpointError(f"{path}: written by a newer version (format {version}; this one reads up "
                                  f"to {FORMAT}); update fedms, or start the run again")
        try:
            conform(_CONTENT, content)
            for older in range(content["format"], FORMAT):
                content = {**MIGRATIONS[older](content), "format": older + 1}
        except (ValueError, KeyError, TypeError) as error:
            raise _Damaged(f"{path.name}: {type(error).__name__}: {error}") from None
        return content

    def _read_object(self, name: str) -> Tensors:
        path = self._object(name)
        try:
            data = read_regular(path)
        except (OSError, ValueError) as error:
            raise _Damaged(f"{path.name}: {error}") from None
        if hashlib.sha256(data).hexdigest() != name:
            raise _Damaged(f"{path.name}: wrong checksum")
        try:
            return read_tensors(data)[0]
        except ValueError as error:
            raise _Damaged(f"{path.name}: {error}") from None

    def _write_object(self, tensors: Tensors) -> str:
        data = save_arrays({name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
        name = hashlib.sha256(data).hexdigest()
        write_durably(self._object(name), data, private=True, sync_name=False)        # the manifest after it syncs all names at once
        return name

    def _drop_unused(self) -> None:
        used = {self._manifest(number).name for number in self.good}
        for number in self.good:
            content = self._read_manifest(number)
            used |= {self._object(name).name for name in (content["server"], *content["private"].values())}
        for file in self.path.iterdir():
            if file.name not in used:
                file.unlink()

    def _numbers(self) -> list[int]:
        return [int(file.stem) for file in self.path.glob("*.json") if re.fullmatch("[0-9]{6,9}", file.stem)]

    def _manifest(self, number: int) -> Path:
        return self.path / f"{number:06d}.json"

    def _object(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


class _Damaged(Exception):
    pass


def _dump(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, allow_nan=False).encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()
