"""Names of classes and clients, normalized alike for tables, folders and the hub."""

from __future__ import annotations

import ast
import datetime
import decimal
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fedms.errors import DataError

from .samples import Samples, counted, is_missing, normal

MANY_CLASSES = 20       # from which on it is asked whether the labels are classes at all


def name_of(value: Any) -> str:
    """Return a label or a client as text. 3, 3.0, "3" and "3.0" give the same name, and so do Unicode forms of a word.

    Raises:
        ValueError: If the value is not a single name: a list, a struct, bytes, an empty value, or a text with control
            characters.
    """
    try:
        return _name(value)
    except TypeError:  # lists and dicts have no hash
        raise ValueError(f"is {_short(value)}, a {type(value).__name__}; expected one text or number a sample") from None


@lru_cache(maxsize=65536, typed=True)
def _name(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if is_missing(value) or not isinstance(value, (str, bool, int, float, decimal.Decimal, datetime.date)):
        raise ValueError(f"is {_short(value)}, a {type(value).__name__}; expected one text or number a sample")
    name = normal(str(value))
    if isinstance(value, float) and value.is_integer():
        name = str(int(value))
    elif whole := re.fullmatch(r"(-?\d+)\.0+", name):
        name = whole[1]
    elif name.lower() in ("inf", "-inf") and not isinstance(value, str):
        raise ValueError(f"is {name}; expected a finite number or a text")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise ValueError(f"is {_short(name)}, which holds a line break or another control character; expected one line of text")
    if name[:1] + name[-1:] in ("[]", "{}", "()") and _is_collection(name):
        raise ValueError(f"is {_short(name)}, a written list; expected one text or number a sample")
    return name


def _is_collection(text: str) -> bool:
    try:
        return len(text) <= 1000 and isinstance(ast.literal_eval(text), (list, tuple, dict, set))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def names_of(values: Sequence[Any], places: Sequence[str], key: str) -> list[str]:
    """Apply `name_of` to all values. A DataError names the place of an invalid one, and `key`, which is what they name."""
    names = []
    for value, place in zip(values, places):
        try:
            names.append(name_of(value))
        except ValueError as error:
            raise DataError(f"{place}: {key} {error}") from None
    return names


def classes_of(config, samples: Samples) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class index of each sample, (n,) int64, and the names of the classes.

    `config.classes` takes precedence over other names. It is matched by name if possible; otherwise it gives the names of
    positions, which are those of the source's classes or labels that are integers from 0 on. Classes of the source without
    samples are omitted.
    """
    labels, places = samples.labels, samples.places
    if samples.classes is not None:
        return _named_by_source(config, labels, samples.classes, places)
    written = names_of(labels, places, "the label")
    found = set(written)
    if config.classes is None:
        names = tuple(sorted(found, key=natural))
        if len(names) == len(written) > 2:
            raise DataError(f"{config.name}: every sample has a label of its own; is data.label = {config.label!r} the "
                            "column of classes?")
        index = {name: i for i, name in enumerate(names)}
    else:
        names = config.classes
        index = _index(names)
        numbers = [name for name in found if re.fullmatch(r"\d+", name) and int(name) < len(names)]
        if not found <= set(index) and len(numbers) == len(found) and not any(re.fullmatch(r"-?\d+", n) for n in index):
            index = {str(i): i for i in range(len(names))}  # integer labels count the classes
    for label, place in zip(written, places):
        if label not in index:
            raise DataError(f"{place}: label {label!r} is no class; classes are: {listed(names)}")
    return _checked(config, np.array([index[label] for label in written], dtype=np.int64), names)


def _named_by_source(config, positions: Sequence[int], names: tuple[str, ...],
                     places: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the classes if the labels are positions in `names`."""
    held = sorted(set(positions))
    if config.classes is None:
        order = {position: i for i, position in enumerate(held)}
        return _checked(config, np.array([order[p] for p in positions], dtype=np.int64), tuple(names[p] for p in held))
    index = _index(config.classes)
    own = [name_of(name) for name in names]
    if all(own[p] in index for p in held):
        codes = np.array([index[own[p]] for p in positions], dtype=np.int64)
    elif len(config.classes) == len(names):
        codes = np.array(positions, dtype=np.int64)
    else:
        at = next(i for i, p in enumerate(positions) if own[p] not in index)
        raise DataError(f"{places[at]}: label {own[positions[at]]!r} is no class; classes are: {listed(config.classes)}")
    return _checked(config, codes, config.classes)


def _index(names: Sequence[str]) -> dict[str, int]:
    index = {name_of(name): i for i, name in enumerate(names)}
    if len(index) < len(names):
        raise DataError(f"data.classes: {listed(names)}: two of these are the same name")
    return index


def _checked(config, labels: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        raise DataError(f"{config.name}: class {names[int(counts.argmin())]!r} is empty: no sample has it; leave it out of "
                        "data.classes, or add samples")
    if len(names) < 2:
        raise DataError(f"{config.name}: all samples are of one class, {names[0]!r}; at least two are needed")
    return labels, tuple(names)


def class_notes(config, samples: Samples, labels: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Return notes about anything unusual in the classes."""
    notes = []
    if samples.classes is not None and config.classes is None and (unused := [c for c in samples.classes if c not in names]):
        notes.append(f"{config.name}: {counted(len(unused), 'class')} of its {len(samples.classes)} left out, as no sample "
                     f"has one: {listed(unused)}")
    if len(names) > MANY_CLASSES and len(labels) < 10 * len(names):
        notes.append(f"{config.name}: {len(names):,} classes for {len(labels):,} samples; is data.label = {config.label!r} "
                     "the column of classes?")
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        notes.append(f"{config.name}: classes differ in upper and lower case alone: {listed(alike)}")
    return notes


def groups_of(clients: Sequence[str] | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return the group index of each sample, (n,) int64, and the names of the groups in natural order; None without groups."""
    if clients is None:
        return None, ()
    names = tuple(sorted(set(clients), key=natural))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[client] for client in clients], dtype=np.int64), names


def prompts_of(config, model, classes: tuple[str, ...]) -> tuple[tuple[str, ...], ...] | None:
    """Return a prompt for each class, if the model can embed prompts and the classes have names rather than numbers."""
    if model.zero_shot_temperature is None or not all(any(c.isalpha() for c in name) for name in classes):
        return None
    template = config.prompt or ("{}" if model.reads == "text" else "a photo of a {}.")
    return tuple((template.format(name.replace("_", " ")),) for name in classes)


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return a text that lists the first names."""
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key with which client2 comes before client10."""
    if re.fullmatch(r"-\d+", name):
        return [(0, int(name), name)]
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]
