"""fedms.json, the manifest of an exported folder: what the export is, and size and SHA-256 of each of its other files."""
from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedms.config import dump
from fedms.export.trained_run import Task
from fedms.foreign import InnerPath, conform, parse_json, read_regular
from fedms.storage.durable import open_new
from fedms.storage.records import RunFolderError

MANIFEST, CLIENTS = "fedms.json", "clients"
FORMAT = 1


def write_manifest(folder: Path, kind: str, task: Task, **more: Any) -> None:
    """Lists all files, and gives each the mode that its folder has: the libraries that wrote some have their own."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(path.parent.stat().st_mode & 0o666)
        with open(path, "rb") as file:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(file)}
            os.fsync(file.fileno())
    content = {"format": FORMAT, "kind": kind, "classes": task.classes, "prompts": task.prompts, "clients": task.groups,
               "model_fingerprint": task.fingerprint, "config": dump(task.config),
               **more, "files": files}
    with open_new(folder / MANIFEST) as file:
        file.write(json.dumps(content, indent=2, sort_keys=True).encode())
        file.flush()
        os.fsync(file.fileno())


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


_Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _File(_Strict):
    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Model(_Strict):
    """Of a mixture: {} for a built-in model, "base" for the folder beside, else the name of an object. Nothing else of
    the run file's [model] may stand here."""

    id: str | None = None
    pooling: Literal["auto", "mean", "cls", "last"] | None = None
    blocks: str | None = None


class _Final(_Strict):
    stage: str
    round: _Count
    depth: _Count
    applied_depth: _Count


class Manifest(_Strict):
    """What fedms.json says; model, final and elsewhere: of a mixture, expert: of a merged one."""

    format: Annotated[int, Field(ge=1)]
    kind: Literal["peft", "merged", "onnx", "mixture"]
    classes: Annotated[list[str], Field(min_length=1)]
    prompts: list[Annotated[list[str], Field(min_length=1)]] | None
    clients: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], str | None]
    model_fingerprint: str
    config: dict[str, Any]
    files: dict[InnerPath, _File]
    model: _Model = _Model()
    final: _Final | None = None
    elsewhere: list[_Count] = []
    expert: str | None = None


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder, all its files checked. Clients' files that belong to another user are not read;
    their clients are added to `elsewhere`.

    Raises:
        RunFolderError: if it is no export, one of a newer version, or a file is missing or damaged.
    """
    try:
        value = parse_json(read_regular(folder / MANIFEST))
        version = value.get("format") if isinstance(value, dict) else None
        if type(version) is int and version > FORMAT:
            raise RunFolderError(f"{folder}: written by a newer version (format {version}; this one reads up to {FORMAT}); "
                                 "update fedms")
        content = conform(_MANIFEST, value)
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: holds no {MANIFEST}, so it is no export of a run; make one by `fedms export "
                             "RUN --out DIR`") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / MANIFEST}: cannot be read: {error}") from None
    for name, expected in list(content.files.items()):
        try:
            _check_file(folder / name, expected)
        except OSError as error:
            if not (isinstance(error, PermissionError) and name.startswith(f"{CLIENTS}/")):
                raise RunFolderError(f"{folder / name}: cannot be read: {error.strerror}") from None
            content.elsewhere.append(_client_of(folder, name))
            del content.files[name]
        except ValueError as error:
            raise RunFolderError(f"{folder / name}: {error}; copy or export it again") from None
    return content


def clients_in(folder: Path, content: Manifest) -> dict[int, Path]:
    """The files with clients' own experts in an export, by client id."""
    return {_client_of(folder, name): folder / name for name in content.files if name.startswith(f"{CLIENTS}/")}


def _client_of(folder: Path, name: str) -> int:
    number = name.removeprefix(f"{CLIENTS}/").removesuffix(".safetensors")
    if not re.fullmatch("[0-9]{1,9}", number):
        raise RunFolderError(f"{folder / name}: is no file of a client; expected {CLIENTS}/ID.safetensors")
    return int(number)


def _check_file(path: Path, expected: _File) -> None:
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.bytes:
            raise ValueError(f"{size} bytes, expected {expected.bytes}")
        if _sha256(file) != expected.sha256:
            raise ValueError("damaged (wrong SHA-256)")
