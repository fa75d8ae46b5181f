"""Files that appear whole or not at all, private files, and folders that one process at a time writes to."""

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
    """Create a file, and return it open for writing.

    Args:
        path: The file.
        private: Whether only its owner can read it; otherwise the umask decides.

    Raises:
        FileExistsError: If there is anything of that name. A link is not followed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, _OWNER_ONLY if private else _BY_UMASK), "wb")


def write_durably(path: Path, data: bytes, *, private: bool = False, sync_name: bool = True) -> None:
    """Write a file so that it survives a crash: the old or the new content is there after it, never a part.

    A link at `path` is replaced, not followed.

    Args:
        path: The file.
        data: Its content.
        private: Whether only its owner can read it; otherwise the umask decides.
        sync_name: Whether the file's name must survive a power cut too. If not, the caller calls :func:`sync_folder`, once
            for several files.

    Raises:
        OSError: If it cannot be written. The old content is then untouched.
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
    """Make a folder that only its owner can enter, and return it. The umask decides for its parents.

    Args:
        path: The folder.
        close: Whether a folder that is there already, and is the caller's own, is closed to others. False where its owner
            may want to share it.

    Raises:
        OSError: If it cannot be made, or is a link or no folder.
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
    """Make the names in a folder survive a power cut, which may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owner(folder: Path) -> int | None:
    """Return the id of the process that holds a folder's :class:`FolderLock`, or None. The lock is not taken for it."""
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
    """A client whose samples are in a shard.

    Attributes:
        id: Its id.
        group: Name of its group in the data, or None.
        n_train: Number of its training samples.
    """

    id: Annotated[int, Field(ge=0, lt=2**31)]
    group: str | None
    n_train: Annotated[int, Field(ge=0)]


class ShardAbout(BaseModel):
    """What the metadata of a shard say about it; :mod:`fedms.data.shard` writes them."""

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
    """Read the metadata of the shard in a folder, without its tensors and without torch.

    The checksum is not verified; :func:`fedms.data.read_shard` does that.

    Returns:
        The fields of :class:`ShardAbout`.

    Raises:
        ValueError: If there is no shard, or its metadata are damaged.
    """
    path = folder / SHARD
    try:
        head = read_regular(path, 8)
        return parse_about(safetensors_metadata(read_regular(path, 8 + int.from_bytes(head, "little")))).model_dump()
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: no shard of a data set: {error}; `fedms client join` writes them") from None


def parse_about(metadata: dict[str, str]) -> ShardAbout:
    """Return what a shard's metadata say about it. ValueError if they say nothing, or not in this form."""
    if "shard" not in metadata:
        raise ValueError("its metadata have no entry 'shard'")
    return conform(_SHARD_ABOUT, parse_json(metadata["shard"]))


class FolderLock:
    """Exclusive use of a folder by this process, until :meth:`release` or the process's end, however it ends."""

    def __init__(self, folder: Path):
        """Take the lock. BlockingIOError names the process that holds it, if another one does."""
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
        """Tell whether the locked file is still the one in the folder: its last owner may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
