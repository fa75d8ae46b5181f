"""Guess how a table is written and what its columns hold. `fedms init` prints each guess and writes it into the run file.

Training does not guess: :mod:`fedms.data.tables` reads tables as the run file says, and refuses others.
"""
from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .samples import is_missing
from .tables import DELIMITERS, Table, table_kind

CANDIDATES = (",", ";", "\t", "|")
ROWS = 50               # that are looked at for the delimiter
BYTES = 1 << 20         # that are looked at for both
VALUES = 100            # that a column of labels has at most


@dataclass(frozen=True)
class Format:
    """The format of a table of text.

    Attributes:
        encoding: Name of its encoding, such as "utf-8" or "cp1252".
        delimiter: Character between fields; None if it is the usual one for the name of the file, or the file has none.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None


def guess_format(path: Path) -> Format:
    """Guess the format of a table. The result is the default for Parquet files and for files that cannot be read.

    Args:
        path: The table, possibly compressed as .gz.
    """
    kind = table_kind(path)
    if kind in (None, ".parquet"):
        return Format()
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            raw = file.read(BYTES)
    except (OSError, EOFError, zlib.error):
        return Format()
    encoding = _encoding(raw)
    text = raw.decode("utf-8-sig" if encoding == "utf-8" else encoding, errors="ignore")
    usual = DELIMITERS.get(kind)
    delimiter = _delimiter(text, usual) if usual else None
    return Format(encoding, None if delimiter == usual else delimiter)


def _encoding(raw: bytes) -> str:
    """Return "utf-8" if the bytes are valid; "utf-16" if they begin with its mark; otherwise an encoding of Windows."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    lines = raw[:raw.rfind(b"\n") + 1] or raw       # the last line may be cut in the middle of a character
    for encoding in ("utf-8", "cp1252"):
        try:
            lines.decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    return "latin-1"


def _delimiter(text: str, usual: str) -> str:
    """Return the candidate with which the first rows have equally many, and the most, fields; otherwise the usual one."""
    fields = {}
    for candidate in sorted(CANDIDATES, key=lambda each: each != usual):
        try:
            rows = [row for row in islice(csv.reader(io.StringIO(text, newline=""), delimiter=candidate), ROWS) if row]
        except csv.Error:
            continue
        if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            fields[candidate] = len(rows[0])
    return max(fields, key=lambda candidate: fields[candidate], default=usual)


def longest_texts(table: Table) -> str | None:
    """Return the column whose cells are the longest on average, which is likely that of texts; None if none holds texts."""
    lengths = {name: sum(len(cell) for cell in cells if isinstance(cell, str)) for name, cells in table.columns.items()}
    return max((name for name in lengths if lengths[name]), key=lambda name: lengths[name], default=None)


def repeated_values(table: Table, but: Sequence[str] = ()) -> dict[str, int]:
    """Return the columns that could hold labels, with the number of their values, the fewest first.

    Such a column has 2 to `VALUES` values, and each of them occurs five times on average.

    Args:
        table: A table with all its columns.
        but: Columns that are left out.
    """
    counts = {}
    for name, cells in table.columns.items():
        there = [cell for cell in cells if not is_missing(cell) and isinstance(cell, (str, int, float, bool))]
        found = len(set(there))
        if name not in but and 2 <= found <= VALUES and 5 * found <= len(there):
            counts[name] = found
    return dict(sorted(counts.items(), key=lambda item: item[1]))
