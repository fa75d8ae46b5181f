"""Files that are whole or not there, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path
from typing import Any

LOCK = ".lock"
SHARD = "data.safetensors"


def write_durably(path: Path, data: bytes, *, sync_name: bool = True) -> None:
    """Write a file so that after a crash the old or the new content is there, never a part, and so that it lasts.

    sync_name: False leaves it to the caller to make the file's name last (:func:`sync_folder`), once for several files.

    Raises OSError if it cannot be written; the old content is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


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
        number = int((folder / LOCK).read_text())
        os.kill(number, 0)
    except PermissionError:
        return number  # it lives, and belongs to somebody else
    except (OSError, ValueError):
        return None
    return number


def shard_about(folder: Path) -> dict[str, Any]:
    """The plain data of the shard of a data set (:mod:`fedms.data.shard`) in a folder; no tensor is loaded, nor torch.

    Raises ValueError if there is none, or it is damaged.
    """
    path = folder / SHARD
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("it is cut off")
            return json.loads(json.loads(file.read(size))["__metadata__"]["shard"])
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: no shard of a data set: {error}; `fedms flower init` writes them") from None


class FolderLock:
    """Exclusive use of a folder by this process, until :meth:`release` or the process's end, however it ends."""

    def __init__(self, folder: Path):
        """Raises :class:`BlockingIOError` with the owner's process id if another process has it."""
        self.path = folder / LOCK
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
