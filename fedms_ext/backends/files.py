"""The small JSON files of $FEDMS_CACHE (by default ~/.cache/fedms) in which measurements of a machine are kept."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path


def folder() -> Path:
    """Return the folder of the files."""
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")


def read(path: Path) -> dict[str, str]:
    """Return what `write` wrote. A file that is not there is empty; a broken one is too, with a warning."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        warnings.warn(f"{path} is not valid JSON ({error}); it is ignored and written anew", stacklevel=3)
        return {}


def write(path: Path, values: dict[str, str]) -> None:
    """Replace a file as a whole, so that other processes never read half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(values, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
