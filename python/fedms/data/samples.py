"""What the readers of a user's own data hand on, and what they have in common."""

from __future__ import annotations

import decimal
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Samples:
    """What was read, one entry a sample, in one order.

    content: texts; or images as PIL images, paths, or the bytes of their files.
    places:  where each came from (file and line or row), for errors.
    labels:  as they were written, or None where there are none.
    clients: name of each sample's client, or None.
    classes: where the source itself names its classes: these names, in which the labels are positions.
    notes:   a line for each thing that was left out or decided.
    """

    content: list[Any]
    places: list[str]
    labels: list[Any] | None
    clients: list[str] | None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def normal(text: str) -> str:
    """The one form in which names are compared and shown: Unicode's NFC (macOS writes file names in NFD), without blanks
    around it."""
    return unicodedata.normalize("NFC", text).strip()


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or blanks."""
    return value is None or (isinstance(value, (float, decimal.Decimal)) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip())


# The names that splits go by, also as train-00000-of-00003.
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test", "testing": "test", "eval": "test"}


def split_name(name: str) -> str | None:
    """The split that a file or folder of this name holds, or None if it says none."""
    return SPLITS.get(re.sub(r"-\d+-of-\d+$", "", normal(name)).lower())


def counted(count: int, noun: str) -> str:
    """`1 image`, `1,200 images`; nouns in -s and -x get -es, and a final -y becomes -ies."""
    if count == 1:
        return f"1 {noun}"
    plural = noun + "es" if noun.endswith(("s", "x")) else noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {plural}"


def left_out(files: Iterable[Path], root: Path, why: str) -> list[str]:
    """A note that names files which were not read, or none if there are none."""
    files = list(files)
    if not files:
        return []
    kinds = ", ".join(sorted({file.suffix or "no suffix" for file in files})[:5])
    shown = ", ".join(str(file.relative_to(root)) for file in files[:3])
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return [f"{root}: {counted(len(files), 'file')} left out, {why} ({kinds}): {shown}{more}"]
