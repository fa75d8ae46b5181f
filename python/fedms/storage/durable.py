"""Files that are whole or not there, files that only their owner can read, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import psutil
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedms.foreign import conform, parse_json, read_regular, safetensors_metadata

LOCK = ".lock"
SHARD = "data.safetensors"
TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{16})?\.tmp")
"""Name of a file that is being written, which a kill may leave behind; older versions put no random number into it."""

_OWNER_ONLY, _BY_UMASK = 0o600, 0o666


def open_new(path: Path, *, private: bool = False) -> BinaryIO:
    """A file that was not there, open for writing. private: only its owner can read it; otherwise the umask decides.

    Raises:
        FileExistsError: if there is anything of that name; a link is not followed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, _OWNER_ONLY if private else _BY_UMASK), "wb")


def write_durably(path: Path, data: bytes, *, private: bool = False, sync_name: bool = True) -> None:
    """Write a file so that after a crash the old or the new content is there, never a part, and so that it lasts.

    private: only its owner can read it; otherwise the umask decides. A link at `path` is replaced, not followed.
    sync_name: False leaves it to the caller to make the file's name last (:func:`sync_folder`), once for several files.

    Raises OSError if it cannot be written; the old content is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")      # nobody can lay a link there before
    try:
        with open_new(temporary, private=private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


def private_folder(path: Path, *, close: bool = True) -> Path:
    """Make a folder that only its owner can enter, its parents by the umask; returns it. One that is there and is the
    caller's own is closed to others, unless `close` is False: its owner may share it.

    Raises OSError if it cannot be made, or is a link or no folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            about = os.fstat(descriptor)
            if close and about.st_uid == os.geteuid() and stat.S_IMODE(about.st_mode) & 0o077:
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    return path


def sync_folder(path: Path) -> None:
    """Make the names in a folder last: a rename alone may be undone by a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owner(folder: Path) -> int | None:
    """The process that has the folder's :class:`FolderLock`, if one that lives has it. It asks without taking it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 32)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    number = int(text) if re.fullmatch(rb"[1-9][0-9]{0,8}\n?", text) else None
    return number if number is not None and psutil.pid_exists(number) else None


class ShardClient(BaseModel):
    """Whose samples a shard holds, and how many of them are for training."""

    id: Annotated[int, Field(ge=0, lt=2**31)]
    group: str | None
    n_train: Annotated[int, Field(ge=0)]


class ShardAbout(BaseModel):
    """The plain data of a shard (:mod:`fedms.data.shard`). `text` is how it was written, for the checksum."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    name: str
    classes: Annotated[list[str], Field(min_length=1)]
    prompts: list[Annotated[list[str], Field(min_length=1)]] | None
    group_names: list[str]
    inputs: dict[str, Any]
    fitting: list[Annotated[int, Field(ge=0)] | None]
    notes: list[str]
    clients: list[ShardClient]
    unseen: list[ShardClient]


_SHARD_ABOUT = TypeAdapter(ShardAbout)


def shard_about(folder: Path) -> dict[str, Any]:
    """The plain data of the shard of a data set (:mod:`fedms.data.shard`) in a folder; no tensor is loaded, nor torch.
    Whether the checksum is right is for :func:`fedms.data.read_shard` to say.

    Raises ValueError if there is none, or it is damaged.
    """
    path = folder / SHARD
    try:
        head = read_regular(path, 8)
        return parse_about(safetensors_metadata(read_regular(path, 8 + int.from_bytes(head, "little")))).model_dump()
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: no shard of a data set: {error}; `fedms flower init` writes them") from None


def parse_about(metadata: dict[str, str]) -> ShardAbout:
    """What a shard's metadata say about it. Raises ValueError if they say nothing, or it is not of this form."""
    if "shard" not in metadata:
        raise ValueError("its metadata have no entry 'shard'")
    return conform(_SHARD_ABOUT, parse_json(metadata["shard"]))


class FolderLock:
    """Exclusive use of a folder by this process, until :meth:`release` or the process's end, however it ends."""

    def __init__(self, folder: Path):
        """Raises :class:`BlockingIOError` with the owner's process id if another process has it."""
        self.path = folder / LOCK
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _BY_UMASK)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    break
            except BlockingIOError:
                owner = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(self._descriptor)
                raise BlockingIOError(f"in use by the process {owner}") from None
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)  # while it is held: a process that waits for this file will see it gone
        os.close(self._descriptor)

    def _is_current(self) -> bool:
        """Whether the locked file is still the one in the folder: its last owner may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
