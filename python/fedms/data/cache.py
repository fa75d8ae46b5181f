"""The cache folder of downloaded data sets."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedms.errors import UNAVAILABLE, DataError, FedMSError
from fedms.storage.durable import private_folder

_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)


class CacheError(FedMSError):
    """The cache folder cannot be written."""

    exit_code = UNAVAILABLE
    title = "cache folder"


def cache_dir() -> Path:
    """Return $FEDMS_CACHE or ~/.cache/fedms, without creating it."""
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")


def made_cache_dir() -> Path:
    """Return `cache_dir()`, created if it does not exist.

    A new folder is accessible to its owner only, because others could change what is read from it. The mode of an existing
    folder is not changed, so that a team can share one.

    Raises:
        CacheError: If it cannot be made.
    """
    with filling_cache():
        return private_folder(cache_dir(), close=False)


@contextmanager
def filling_cache(needs: int | None = None) -> Iterator[None]:
    """Turn a full disk, and a folder that may not be written, into a CacheError within the context.

    Args:
        needs: Bytes that are written, about, if that is known.

    Raises:
        CacheError: It names the folder, the space, and how another folder is chosen.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors names the number of an error in words alone
        number = errno.ENOSPC if f"os error {errno.ENOSPC})" in str(error) else getattr(error, "errno", None)
        folder = cache_dir().absolute()
        elsewhere = "name another folder in the environment variable FEDMS_CACHE"
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
            needed = f" {needs / 1e6:,.0f} MB are needed, and" if needs else ""
            raise CacheError(f"{folder}: the disk is full:{needed} {free / 1e6:,.0f} MB are free. Make room, or {elsewhere}") from error
        if number in _FORBIDDEN:
            raise CacheError(f"{folder}: cannot be written: {os.strerror(number)}; {elsewhere}") from error
        raise


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder inside of the cache folder, which is removed at the end."""
    made_cache_dir()
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as scratch:
        yield Path(scratch)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` at the end, which is therefore either complete or absent."""
    made_cache_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".unpack-{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        yield scratch
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was quicker, with the same files
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def verify(path: Path, expected: str, remedy: str) -> None:
    """Raise a DataError that ends with `remedy` unless the SHA-256 of the file, in hexadecimal, is `expected`."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if found != expected:
        raise DataError(f"{path}: damaged file: expected sha256 {expected}, found {found}; {remedy}")
