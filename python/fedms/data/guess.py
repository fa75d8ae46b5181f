"""How a table of text is written, guessed from its first lines: for `fedms init`, which says what it guessed and writes it down.

Training guesses nothing: :mod:`fedms.data.tables` reads what the run file says, and refuses the rest.
"""
from __future__ import annotations

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .tables import DELIMITERS, table_kind

CANDIDATES = (",", ";", "\t", "|")
ROWS = 50               # that are looked at for the delimiter
BYTES = 1 << 20         # that are looked at for both


@dataclass(frozen=True)
class Format:
    """How a table of text is written.

    Attributes:
        encoding: Name of its encoding, such as "utf-8" or "cp1252".
        delimiter: Character between its fields; None where it is the one that its name stands for, or it has none.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None


def guess_format(path: Path) -> Format:
    """Guess how a table is written. Parquet files, and what cannot be read, give the defaults.

    Args:
        path: A table, also compressed as .gz.
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
    """UTF-8 where the bytes are; UTF-16 by its mark; else what Windows and Excel write."""
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
    """The candidate that divides the first rows into the same number of fields, of which there are most; else the usual one."""
    fields = {}
    for candidate in sorted(CANDIDATES, key=lambda each: each != usual):
        try:
            rows = [row for row in islice(csv.reader(io.StringIO(text, newline=""), delimiter=candidate), ROWS) if row]
        except csv.Error:
            continue
        if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            fields[candidate] = len(rows[0])
    return max(fields, key=lambda candidate: fields[candidate], default=usual)
