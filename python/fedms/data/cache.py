"""The cache folder of downloaded data sets."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedms.errors import DataError
from fedms.storage.durable import private_folder



def cache_dir() -> Path:
    """Return $FEDMS_CACHE or ~/.cache/fedms, without creating it."""
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")


def made_cache_dir() -> Path:
    """Return `cache_dir()`, created if it does not exist.

    A new folder is accessible to its owner only, because others could change what is read from it. The mode of an existing
    folder is not changed, so that a team can share one.
    """
    return private_folder(cache_dir(), close=False)


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
