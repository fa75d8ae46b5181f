"""Where fetched data sets are kept, and how they get there whole."""

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
    """$FEDMS_CACHE, or ~/.cache/fedms. Not created here."""
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")


def made_cache_dir() -> Path:
    """:func:`cache_dir`, made if it is not there: for its owner alone, as others could change what is read from it. A folder
    that is there keeps its mode: a team may share one."""
    return private_folder(cache_dir(), close=False)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to fill; it is renamed to `folder` at the end, which is therefore whole or not there."""
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
    """DataError, which ends with `remedy`, unless the file's sha256 (hex) is `expected`."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if found != expected:
        raise DataError(f"{path}: damaged file: expected sha256 {expected}, found {found}; {remedy}")
