"""The words of messages about run files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fedms.foreign import printable


def did_you_mean(word: str, words: Iterable[str], prefix: str = "", suffix: str = "", cutoff: float = 0.6) -> str:
    """Return "; did you mean ...?" with the word that is nearest to `word`, or an empty text if none is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{near[0]}{suffix}?" if near else ""


def in_words(values: Iterable[Any]) -> str:
    """Return values as they would be written in a run file, separated by commas."""
    return ", ".join(show(v) for v in values)


def show(value: Any) -> str:
    """Return a value as it would be written in the run file."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(printable(value), ensure_ascii=False)
    return printable("true" if value is True else "false" if value is False else str(value))
