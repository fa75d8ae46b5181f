"""Read tables: .csv, .tsv, .parquet and .jsonl, also compressed as .gz.

Training and prediction use the same strict reader. It does not guess: a row that does not match the header, an unclosed
quotation mark, or bytes that are not valid in the given encoding are errors, which name the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedms.errors import DataError

from .labels import names_of
from .samples import Samples, counted, is_missing, normal

TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        source: File or data set, for error messages.
        folder: Folder to which names of image files are relative; None if the table must not name files.
        names: All column names, normalized.
        columns: The values of the requested columns (or of all) that exist, as plain Python objects.
        places: File and line, or row number, of each row.
        classes: The names of the classes if the source defines them; the labels then are positions in this list.
        hint: What to try if a column is missing.
        notes: One line for everything unusual.
    """

    source: str
    folder: Path | None
    names: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    classes: tuple[str, ...] | None = None
    hint: str = ""
    notes: tuple[str, ...] = ()


class _Unreadable(Exception):
    """A file cannot be read in the format that its name denotes; the message is the reason."""


def table_kind(path: Path) -> str | None:
    """Return the suffix of `TABLES` in which the name of a file ends, ignoring .gz; None if it is not a table."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        if suffixes[-1:] == [".parquet"]:      # compressed inside, and read at random places
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in TABLES else None


def table_stem(path: Path) -> str:
    """Return the name of a table without its suffix (.csv, .csv.gz, ...), normalized."""
    stem = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
    return normal(Path(stem).stem)


def wanted_columns(config, reads: str, labeled: bool) -> dict[str, str]:
    """Return the names of the needed columns, normalized, by the keys of the [data] table that name them."""
    wanted = {"data.text": config.text} if reads == "text" else {"data.image": config.image}
    if labeled:
        wanted |= {"data.label": config.label} | ({"data.client": config.client} if config.client else {})
    return {key: normal(name) for key, name in wanted.items()}


def read_table(path: Path, config, wanted: Mapping[str, str], every: bool = False) -> Table:
    """Read the columns `wanted` of a table, or every column.

    Args:
        path: The file.
        config: The [data] table, for the delimiter, encoding and quoting of text files.
        wanted: Names of the columns.
        every: Whether to read every column instead.

    Raises:
        DataError: If the table cannot be read; the message names the line, if there is one.
    """
    kind, chosen = table_kind(path), None if every else set(wanted.values())
    try:
        if kind == ".parquet":
            return _parquet(path, chosen, wanted.get("data.label"))
        text = _decoded(path, config.encoding)
        if kind == ".jsonl":
            return _json_lines(path, text, chosen)
        delimiter = config.delimiter or DELIMITERS[kind]
        return _delimited(path, text, delimiter, config.quoting, chosen)
    except _Unreadable as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_plain_text(path: Path, config) -> Table:
    """Return a file of plain text as a table of one row, in the column that `data.text` names.

    Raises:
        DataError: If the file cannot be read, is empty, or is no text in `data.encoding`.
    """
    try:
        text = _decoded(path, config.encoding)
    except _Unreadable as error:
        raise DataError(f"{path}: cannot be read as a text: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    name = normal(config.text)
    return Table(str(path), path.parent, [name], {name: [text]}, [str(path)])


def samples_of(tables: Sequence[Table], clients: Sequence[str] | None, config, reads: str, labeled: bool) -> Samples:
    """Return the samples of several tables in order.

    Args:
        tables: The tables.
        clients: The client of each table, if each table belongs to one client and no column names clients.
        config: The [data] table.
        reads: "text", "images" or "conversations".
        labeled: Whether labels and clients are needed.

    Raises:
        DataError: If a column is missing, a table has no samples, a cell is empty, or class names differ.
    """
    wanted = wanted_columns(config, reads, labeled)
    if labeled and config.empty == "drop":
        tables = [complete_rows(table, wanted.values()) for table in tables]
    for table in tables:
        check_columns(table, wanted)
    content_column, label, client = (wanted.get(key) for key in (f"data.{'text' if reads == 'text' else 'image'}",
                                                                 "data.label", "data.client"))
    content = [value for table in tables for value in _content(table, content_column, reads)]
    places = [place for table in tables for place in table.places]
    classes = {table.classes for table in tables}
    if labeled and len(classes) > 1:
        raise DataError(f"{tables[0].source} and {tables[-1].source}: name their classes differently, so their labels cannot "
                        "be compared; write the names as labels")
    owners: list[str] | None = None
    if client:
        owners = names_of([value for table in tables for value in table.columns[client]], places, "the client")
    elif clients is not None and labeled:
        owners = [owner for owner, table in zip(clients, tables) for _ in table.places]
    labels = [value for table in tables for value in table.columns[label]] if label else None
    return Samples(content, places, labels, owners, classes.pop() if labeled else None,
                   tuple(note for table in tables for note in table.notes), None if labeled else _all_columns(tables))


def _all_columns(tables: Sequence[Table]) -> dict[str, list[Any]]:
    """Return every column of several tables in order. Cells of columns that a table lacks are None."""
    names = dict.fromkeys(name for table in tables for name in table.names if name in table.columns)
    return {name: [cell for table in tables for cell in table.columns.get(name, [None] * len(table.places))] for name in names}


def complete_rows(table: Table, names: Iterable[str]) -> Table:
    """Return a table without the rows in which one of the columns `names` has nothing, and with a note that counts them."""
    columns = [table.columns[name] for name in names if name in table.columns]
    kept = [row for row, cells in enumerate(zip(*columns)) if not any(map(is_missing, cells))]
    if not columns or len(kept) == len(table.places):
        return table
    first = next(row for row in range(len(table.places)) if row == len(kept) or kept[row] != row)
    note = (f"{table.source}: {len(table.places) - len(kept):,} of {counted(len(table.places), 'row')} left out, as a cell that is "
            f"needed is empty (the first: {table.places[first]})")
    return replace(table, columns={name: [cells[row] for row in kept] for name, cells in table.columns.items()},
                   places=[table.places[row] for row in kept], notes=(*table.notes, note))


def check_columns(table: Table, wanted: Mapping[str, str]) -> None:
    """Raise a DataError if a table lacks one of the columns `wanted` or has it twice, has no rows, or has an empty cell in one."""
    for key, name in wanted.items():
        if table.names.count(name) > 1:
            raise DataError(f"{table.source}: has {table.names.count(name)} columns {name!r} ({key}); rename one")
        if name not in table.names:
            raise DataError(f"{table.source}: no column {name!r} ({key}); its columns are: {', '.join(table.names)}{table.hint}")
    if not table.places:
        raise DataError(f"{table.source}: holds no samples")
    for name in wanted.values():
        missing = [i for i, value in enumerate(table.columns[name]) if is_missing(value)]
        if missing:
            raise DataError(f"{table.places[missing[0]]} has nothing in column {name!r} ({len(missing)} of "
                            f"{len(table.places)} rows); fill or remove these rows, or leave them out by "
                            'data.empty = "drop"')


def _content(table: Table, name: str, reads: str) -> Iterator[Any]:
    for value, place in zip(table.columns[name], table.places):
        if reads == "text":
            if not isinstance(value, str):
                raise DataError(f"{place}: column {name!r} is {value!r}, expected a text")
            yield value
            continue
        image = value
        if isinstance(image, dict):  # as the datasets library stores it: the bytes, or a file in its cache
            image = image.get("bytes") or Path(image.get("path") or "")
        elif isinstance(image, str) and table.folder:
            image = _file(table.folder, image)
        if not isinstance(image, (bytes, Path)):
            raise DataError(f"{place}: column {name!r} is {str(value)[:60]!r}, expected an image"
                            + (", the name of an image file, or its bytes" if table.folder else ""))
        yield image


def _file(folder: Path, name: str) -> Path:
    """Return the file of this name, whichever Unicode form the file system uses."""
    forms = [folder / name, *(folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return next((path for path in forms if path.exists()), forms[0])


# Text files

def _decoded(path: Path, encoding: str) -> str:
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise _Unreadable(f"is not whole as a gzip file: {error}") from None
    if not raw.strip():
        raise _Unreadable("the file is empty")
    try:
        text = raw.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        raise _Unreadable(f"line {raw[:at].count(10) + 1} is no text in the encoding {encoding}; {_other_encoding(raw)}") from None
    if "\0" in text:
        raise _Unreadable(f"line {text[:text.index(chr(0))].count(chr(10)) + 1} holds a NUL character; "
                          + _other_encoding(raw))
    return text


def _other_encoding(raw: bytes) -> str:
    """Return advice on the encoding that a file seems to have."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return 'it begins as UTF-16 does: set data.encoding = "utf-16"'
    if b"\0" in raw:
        return 'set data.encoding if the file is text (UTF-16 without a mark is "utf-16-le"), or repair the file'
    try:
        raw.decode("cp1252")
        return 'if it comes from Windows or Excel, set data.encoding = "cp1252" (or "latin-1")'
    except UnicodeDecodeError:
        return 'set data.encoding to the one that it was written in, such as "latin-1"'


def _delimited(path: Path, text: str, delimiter: str, quoting: str, chosen: set[str] | None) -> Table:
    limit = csv.field_size_limit(sys.maxsize)       # of the process: put back below
    try:
        rows = list(_rows(text, delimiter, quoting))
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise _Unreadable("the file is empty")
    (_, _, header), *rows = rows
    names = [normal(name) for name in header]
    hint = _other_delimiter(names, delimiter)
    for first, _, row in rows:
        if len(row) != len(names):
            raise _Unreadable(f"line {first} has {counted(len(row), 'field')}, the header has {len(names)}; quote fields "
                              f"that hold {_shown(delimiter)}, and give each column a name{hint}")
    columns = {name: [row[i] for _, _, row in rows] for i, name in enumerate(names) if _is_chosen(name, chosen)}
    notes = []
    if quoting == "standard" and (first := _swallowed(rows, text, delimiter, len(names))):
        notes.append(f"{path}: the row at line {first} goes on over lines that look like rows of their own; if rows are "
                     'missing, a quotation mark is not closed: close it, or set data.quoting = "none"')
    return Table(str(path), path.parent, names, columns, [f"{path}, line {first}" for first, _, _ in rows], hint=hint, notes=tuple(notes))


def _is_chosen(name: str, chosen: set[str] | None) -> bool:
    return chosen is None or name in chosen


def _rows(text: str, delimiter: str, quoting: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the first line, the last line and the fields of each row, including the header. Blank lines are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                        quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL)
    first = 1
    try:
        for row in reader:
            if row:
                yield first, reader.line_num, row
            first = reader.line_num + 1
    except csv.Error as error:
        raise _Unreadable(f'line {first}: {error}; a quotation mark in a quoted field is written twice (""), and every one '
                          'is closed. If quotation marks mean nothing in this file, set data.quoting = "none"') from None


def _swallowed(rows: Sequence[tuple[int, int, list[str]]], text: str, delimiter: str, fields: int) -> int | None:
    """Return the first line of a row that seems to have swallowed others, or None: it spans several lines, and one of them
    other than the last would be a complete row."""
    over = [(first, last) for first, last, _ in rows if last > first]
    if not over or fields < 2:
        return None
    lines = io.StringIO(text, newline="").readlines()
    return next((first for first, last in over
                 if any(line.count(delimiter) == fields - 1 for line in lines[first - 1:last - 1])), None)


def _other_delimiter(names: Sequence[str], delimiter: str) -> str:
    """Return advice on the delimiter, if a header has only one column and seems to use another delimiter."""
    for other in (";", "\t", "|", ","):
        if len(names) == 1 and other != delimiter and other in names[0]:
            return f'. Its header holds {_shown(other)}: set data.delimiter = {json.dumps(other)}'
    return ""


def _shown(delimiter: str) -> str:
    return "tabs" if delimiter == "\t" else f'"{delimiter}"'


def _json_lines(path: Path, text: str, chosen: set[str] | None) -> Table:
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    names: dict[str, None] = {}     # in the order in which they come
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise _Unreadable(f"line {number}: {error}; expected one JSON object a line") from None
        if not isinstance(row, dict):
            raise _Unreadable(f"line {number} is {line.strip()[:40]!r}, expected one JSON object a line")
        names |= dict.fromkeys(row)
        rows.append(row)
        places.append(f"{path}, line {number}")
    columns = {name: [row.get(name) for row in rows] for name in names if _is_chosen(name, chosen)}
    return Table(str(path), path.parent, list(names), columns, places)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {normal(name): value for name, value in pairs}
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


# Parquet

def _parquet(path: Path, chosen: set[str] | None, label: str | None) -> Table:
    import pyarrow.parquet as pq

    try:
        # Every column of the file, those that pandas would make an index included, and none of the folders' names.
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = [normal(name) for name in schema.names]
            count = file.metadata.num_rows
            found = [i for i, name in enumerate(names) if _is_chosen(name, chosen) and names.count(name) == 1]
            table = file.read(columns=[schema.names[i] for i in found])
            columns = {normal(name): table.column(name).to_pylist() for name in table.column_names}
    except OSError:
        raise
    except Exception as error:  # pyarrow raises many types
        raise _Unreadable(str(error).strip().splitlines()[0]) from error
    places = [f"{path}, row {row + 1}" for row in range(count)]
    classes = _class_names(schema.metadata or {}, label)
    if classes and label in columns:
        columns[label] = positions(columns[label], classes, str(path))
    return Table(str(path), path.parent, names, columns, places, classes)


def _class_names(metadata: Mapping[bytes, bytes], label: str | None) -> tuple[str, ...] | None:
    """Return the class names that the datasets library stores in the metadata of a Parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = next(feature["names"] for name, feature in features.items() if normal(name) == label)
        return tuple(map(str, names))
    except (KeyError, TypeError, ValueError, StopIteration):
        return None


def positions(labels: Sequence[Any], classes: Sequence[str], source: str) -> list[int | None]:
    """Check labels that are positions in `classes`. The datasets library writes -1 for a hidden label; it counts as
    missing."""
    found = [None if is_missing(value) or value == -1 else value for value in labels]
    for row, value in enumerate(found):
        if value is not None and (type(value) is not int or not 0 <= value < len(classes)):
            raise DataError(f"{source}, row {row + 1}: label {value!r} is no position in its {len(classes)} class names")
    return found
