"""The result of reading a user's own data, and helpers that all readers share."""

from __future__ import annotations

import decimal
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Samples:
    """Samples as they were read; all lists have one entry for each sample, in the same order.

    Attributes:
        content: Texts, or images as PIL images, paths, or the bytes of their files.
        places: Where each sample came from (file and line or row), for error messages.
        labels: The labels as they were written, or None without labels.
        clients: The name of each sample's client, or None.
        classes: The names of the classes if the source defines them; the labels then are positions in this list.
        notes: One line for everything that was omitted or decided while reading.
        columns: Every column of the table by its name, where samples are read for prediction from a table; else None.
    """

    content: list[Any]
    places: list[str]
    labels: list[Any] | None
    clients: list[str] | None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    columns: Mapping[str, list[Any]] | None = None


def normal(text: str) -> str:
    """Return the form in which names are compared and shown: Unicode NFC, without surrounding white space.

    macOS writes file names in NFD.
    """
    return unicodedata.normalize("NFC", text).strip()


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: None, NaN, or white space."""
    return value is None or (isinstance(value, (float, decimal.Decimal)) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip())


# The names that splits go by, also as train-00000-of-00003.
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test", "testing": "test", "eval": "test"}


def split_name(name: str) -> str | None:
    """Return the split (such as "train") that the name of a file or folder denotes, or None."""
    return SPLITS.get(re.sub(r"-\d+-of-\d+$", "", normal(name)).lower())


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "1,200 images"."""
    if count == 1:
        return f"1 {noun}"
    plural = noun + "es" if noun.endswith(("s", "x")) else noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {plural}"


def left_out(files: Iterable[Path], root: Path, why: str) -> list[str]:
    """Return a note that names files which were not read, in a list that is empty without such files."""
    files = list(files)
    if not files:
        return []
    kinds = ", ".join(sorted({file.suffix or "no suffix" for file in files})[:5])
    shown = ", ".join(str(file.relative_to(root)) for file in files[:3])
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return [f"{root}: {counted(len(files), 'file')} left out, {why} ({kinds}): {shown}{more}"]
