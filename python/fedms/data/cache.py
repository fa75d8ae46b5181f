"""Where fetched data sets are kept, and how they get there whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .inputs import DataError


def cache_dir() -> Path:
    """$FEDMS_CACHE, or ~/.cache/fedms. Not created here."""
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to fill; it is renamed to `folder` at the end, which is therefore whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpack-"))
    try:
        yield scratch
        scratch.chmod(0o755)
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
