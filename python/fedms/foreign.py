"""Readers of bytes that a stranger may have made: one for each format, each with ValueError as its only error.

A run folder, an export, a data shard or an adapter may come from anybody. Nothing here runs code that lies in a file, and
what is returned has been checked: numbers are finite, texts can be printed, tables have the form of a schema. Callers turn
the ValueError into their own error, which names the file and what to do.
"""
from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

MOST_DIGITS = 300       # of a number in JSON or TOML: what a float can hold
LONGEST, LONGEST_NOTE = 300, 2000       # characters of a name and of a note that are shown


def parse_json(data: bytes | str, *, surrogates: bool = False) -> Any:
    """Parse a JSON document in UTF-8.

    Args:
        data: The document.
        surrogates: Whether its texts may hold halves of surrogate pairs, which are no Unicode. :func:`printable` escapes
            them.

    Raises:
        ValueError: If it is none, is nested too deeply for Python, or holds a number that is not finite or a text that is
            not Unicode (half of a surrogate pair).
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_constant=_refused, parse_float=_finite, parse_int=_whole)
        if not surrogates and ("\\ud" in text or "\\uD" in text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no Unicode text") from None


def parse_toml(data: bytes | str) -> dict[str, Any]:
    """Parse a TOML document in UTF-8.

    Raises:
        ValueError: If it is none, is nested too deeply for Python, or holds a number that is too long.
    """
    try:
        value = tomllib.loads(data if isinstance(data, str) else data.decode("utf-8"))
        json.dumps(value, default=str)          # a value as deep as Python goes is too deep for whoever reads it
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def conform(schema: TypeAdapter[T], value: Any) -> T:
    """Return a value as the schema describes it. Types are not converted.

    Raises:
        ValueError: If it has another form; the message names the first place.
    """
    try:
        return schema.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{printable(place)}: {first['msg']}, got {printable(repr(first['input']), 60)}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parse a safetensors document.

    Returns:
        Its tensors by name, and its metadata.

    Raises:
        ValueError: If it is none, or has a tensor of a kind that PyTorch does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        metadata = safetensors_metadata(data)
        return load(data), metadata
    except (SafetensorError, KeyError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no safetensors file: {type(error).__name__}: {error}") from None


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata in the header of a safetensors document. Its tensors are not read.

    Raises:
        ValueError: If the document is cut off within its header, or the header is none.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"it is cut off: its header should have {size} bytes")
    header = parse_json(data[8:8 + size])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its header is no table with a table of texts as __metadata__")
    return metadata


def read_regular(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file. A device or a pipe, which may never end, is refused.

    Args:
        path: The file.
        most: Number of bytes to read at most; None for all.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no regular file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        return file.read(-1 if most is None else most)


def printable(text: str, longest: int = LONGEST, keep: str = "") -> str:
    r"""Return a text as it can stand in a line of a terminal, a page or a table.

    Control characters, halves of surrogate pairs, and marks that turn the direction of writing are escaped as in Python's
    literals (`\x1b`); unusual blanks become a blank.

    Args:
        text: Any text.
        longest: Most characters of the result; what is cut off is marked by an ellipsis.
        keep: Characters that stay as they are although they are not printable, such as a line break.
    """
    shown = text[:longest + 1]
    if not shown.isprintable():
        shown = "".join(map(partial(_printable, keep=keep), shown))
    return shown if len(shown) <= longest else shown[:longest - 1] + "…"


def _printable(character: str, keep: str) -> str:
    if character.isprintable() or character in keep:
        return character
    return " " if unicodedata.category(character) == "Zs" else ascii(character)[1:-1]


def few(names: Iterable[object], most: int = 5) -> str:
    """Return the first of many names, each :func:`printable`, and how many more there are."""
    listed = [printable(str(name), 80) for name in names]
    if len(listed) <= most + 1:
        return ", ".join(listed)
    return f"{', '.join(listed[:most])} and {len(listed) - most:,} more"


def all_printable(value: Any) -> Any:
    """Return plain data with all its texts and keys made :func:`printable`. Line breaks and tabs in texts stay."""
    if isinstance(value, str):
        return printable(value, LONGEST_NOTE, keep="\t\n")
    if isinstance(value, Mapping):
        return {printable(str(key)): all_printable(each) for key, each in value.items()}
    return [all_printable(each) for each in value] if isinstance(value, (list, tuple)) else value


def _inside(name: str) -> str:
    if not name or name.startswith("/") or "\\" in name or "\0" in name or set(name.split("/")) & {"", ".", ".."}:
        raise ValueError("expected the name of a file inside the folder")
    return name


InnerPath = Annotated[str, AfterValidator(_inside)]     # a file of a folder, named relative to it, and nothing outside


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too long")
    return int(text)
