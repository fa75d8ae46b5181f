"""Exported folders: files and modes, checksums in fedms.json, and a new folder that appears whole or not at all."""
from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedms.config import dump
from fedms.config.paths import with_bare_names
from fedms.errors import RunFolderError
from fedms.exports.trained_run import Task
from fedms.foreign import InnerPath, conform, parse_json, read_regular
from fedms.storage.durable import open_new, sync_folder

MANIFEST, CLIENTS = "fedms.json", "clients"
FORMAT = 1


def save_tensors(tensors: Mapping[str, Tensor], path: Path, private: bool = False) -> None:
    """Write tensors into a new safetensors file.

    Args:
        tensors: The tensors by name.
        path: The file, which must not be there.
        private: Whether only its owner may read it; otherwise the umask decides.
    """
    with open_new(path, private=private) as file:
        file.write(save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))


def check_free(out: Path, overwrite: bool) -> None:
    """Raise RunFolderError unless an export may be written to `out`: it is empty, or an export that is to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise RunFolderError(f"{out}: exists and is not empty; choose another --out, or replace it by --force")
    if not (out / MANIFEST).is_file():
        raise RunFolderError(f"{out}: holds no {MANIFEST}, so it is no earlier export and is not replaced; choose another "
                             "--out")


@contextmanager
def new_folder(out: Path, overwrite: bool, private: bool) -> Iterator[Path]:
    """Yield a folder beside `out`, which takes its place when all went well, and is removed otherwise.

    Args:
        out: The folder to write.
        overwrite: Replace an earlier export.
        private: Whether only its owner may enter it.

    Raises:
        RunFolderError: If it cannot be written.
    """
    scratch = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(mode=0o700 if private else 0o777)
        yield scratch
        if out.exists():
            check_free(out, overwrite)
            old = scratch.with_name(scratch.name + "-old")
            out.rename(old)
            scratch.rename(out)
            shutil.rmtree(old)
        else:
            scratch.rename(out)
        sync_folder(out.parent)
    except (OSError, SafetensorError) as error:     # a full disk is the latter where the file is written by safetensors
        raise RunFolderError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_manifest(folder: Path, kind: str, task: Task, **more: Any) -> None:
    """List all files of an exported folder in its manifest, with size and SHA-256.

    Each file gets the mode that its folder has: the libraries that wrote some have their own idea of it.

    Args:
        folder: The folder.
        kind: One of the formats of an export.
        task: What its tensors belong to.
        more: Further entries, see :class:`Manifest`.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(path.parent.stat().st_mode & 0o666)
        with open(path, "rb") as file:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(file)}
            os.fsync(file.fileno())
    content = {"format": FORMAT, "kind": kind, "classes": task.classes, "prompts": task.prompts, "clients": task.groups,
               "model_fingerprint": task.fingerprint, "config": dump(with_bare_names(task.config)),
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
    """The foundation model of a mixture. Nothing else of the run file's [model] may stand here.

    Attributes:
        id: None for a built-in model, "base" for the folder beside, else the name of an object.
        pooling: See the run file.
        blocks: See the run file.
    """

    id: str | None = None
    pooling: Literal["auto", "mean", "cls", "last"] | None = None
    blocks: str | None = None


class _Final(_Strict):
    stage: str
    round: _Count
    depth: _Count
    applied_depth: _Count


class Manifest(_Strict):
    """What fedms.json says.

    Attributes:
        format: Version of the form of this file.
        kind: Format of the export.
        classes: Names of the classes, in the order of the logits.
        prompts: Class prompts of each class, or None.
        clients: Name of each client's group, by client id.
        model_fingerprint: SHA-256 of the foundation model's weights.
        config: The run file as plain values.
        files: Size and SHA-256 of every other file.
        model: For a mixture, where its foundation model is.
        final: For a mixture, stage and depths after the last round.
        elsewhere: For a mixture, clients whose own expert is not in it.
        expert: For a merged export, the name of the expert in it.
    """

    format: Annotated[int, Field(ge=1)]
    kind: Literal["peft", "blend", "merged", "onnx", "mixture"]
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
    """Read the manifest of an exported folder, and check all its files.

    Clients' files that belong to another user are not read; their clients are added to `elsewhere`.

    Raises:
        RunFolderError: If it is no export, one of a newer version, or a file is missing or damaged.
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
    """Return the files with clients' own experts in an export, by client id."""
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
