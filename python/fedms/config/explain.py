"""What is wrong with a run file, in words: one line for each problem that pydantic found."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError

from fedms.config.problems import did_you_mean, in_words, show
from fedms.config.run_config import config_class
from fedms.config.table import OneOf, fits_64_bits
from fedms.config.tables import Budget


def keys() -> dict[str, dict[str, Any]]:
    """Return the fields of every table of a run file, by the names of table and key."""
    return {name: field.annotation.model_fields for name, field in config_class().model_fields.items()}


def explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Return one line of words for each problem that pydantic found; values: the run file as it was read."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "value_error" and not item["loc"]:
            return str(item["ctx"]["error"]).split("\n")
        key, field, value = _locate(item, values)
        if item["type"] == "extra_forbidden":
            lines[key] = f"{key}: unknown key{suggest_key(key)}"
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing; accepted: {accepted(field)}"
        elif field is None:
            lines[key] = f"{key}: got {show(value)}; accepted: a table [{key}] with keys {_key_list(key)}"
        else:
            hint = did_you_mean(value, _literals(field.annotation, field.metadata)) if isinstance(value, str) else ""
            if not fits_64_bits(value):
                hint = "; in any case of at most 64 bits"
            lines[key] = f"{key}: got {show(value)}; accepted: {accepted(field)}{hint}"
    return list(lines.values())


def _locate(item: Mapping[str, Any], whole: Any) -> tuple[str, Any, Any]:
    """Dotted key, field and value of an error in the run file ``whole``; pydantic's location goes on into branches of
    unions and items of lists, which we drop."""
    key = ""
    field: Any = None
    model: type[BaseModel] | None = config_class()
    for part in item["loc"]:
        if isinstance(part, int) and field is not None and Budget in get_args(field.annotation):
            key, model = f"{key}[{part}]", Budget
        elif model is not None and part in model.model_fields:
            field = model.model_fields[part]
            key = f"{key}.{part}" if key else str(part)
            is_table = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            model, field = (field.annotation, None) if is_table else (None, field)
        elif item["type"] == "extra_forbidden":
            return (f"{key}.{part}" if key else str(part)), None, None
        else:
            break
        if isinstance(whole, Mapping) and part in whole or isinstance(part, int):
            whole = whole[part]
    return key, field, whole


def suggest_key(key: str) -> str:
    """Return the end of a message on an unknown key: what was perhaps meant, or which keys there are."""
    tables = keys()
    if key.startswith("clients.budgets["):
        return f"; accepted: {', '.join(Budget.model_fields)}"
    table, _, name = key.partition(".")
    if not name or table not in tables:
        everywhere = [f"{t}.{k}" for t, fields in tables.items() for k in fields if k == key]
        return f"; did you mean {' or '.join(everywhere)}?" if everywhere else (
            did_you_mean(key, tables, prefix="[", suffix="]") or f"; tables: {', '.join(tables)}")
    if near := difflib.get_close_matches(name, tables[table], n=1):
        return f"; did you mean {table}.{near[0]}?"
    elsewhere = [f"{t}.{k}" for t, fields in tables.items() for k in fields if k == name]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else f"; keys of [{table}]: {_key_list(table)}"


def _key_list(table: str) -> str:
    return ", ".join(keys().get(table, Budget.model_fields))


def _literals(annotation: Any, metadata: Iterable[Any] = ()) -> list[str]:
    if names := [name for m in metadata if isinstance(m, OneOf) for name in m.names()]:
        return names
    if get_origin(annotation) is Literal:
        return [v for v in get_args(annotation) if isinstance(v, str)]
    return [word for part in get_args(annotation) for word in _literals(part)]


def accepted(field: Any) -> str:
    """Accepted values of a field in words, from its annotation and bounds."""
    return _type_words(field.annotation, field.metadata)


def _type_words(annotation: Any, metadata: Iterable[Any] = (), many: bool = False) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if names := [name for m in metadata if isinstance(m, OneOf) for name in m.names()]:
        return in_words(names)
    if any(isinstance(m, BeforeValidator) for m in metadata):
        return 'a size such as "2GiB" or "500MB", or a number of bytes'
    if origin is Annotated:
        return _type_words(args[0], args[1:], many)
    if origin is Literal:
        return in_words(args)
    if origin in (Union, types.UnionType):
        return "; or ".join("unset" if a is type(None) else _type_words(a, metadata) for a in args)
    if origin is tuple:
        if args[0] is Budget:
            return f"a list of tables with keys {', '.join(Budget.model_fields)}; share is required"
        length = next((f"{m.max_length} " for m in metadata if getattr(m, "max_length", None)), "")
        return f"a list of {length}{_type_words(args[0], (), True)}"
    nouns = {bool: "true or false", int: "integer", float: "number", str: "string"}
    if annotation is bool:
        return nouns[bool]
    noun = nouns[annotation] + "s" if many else f"{'an' if annotation is int else 'a'} {nouns[annotation]}"
    words = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    bounds = [text.format(show(getattr(m, name))) for m in metadata for name, text in words.items()
              if getattr(m, name, None) is not None]
    examples = [f"such as {in_words(m.examples)}" for m in metadata if getattr(m, "examples", None)]
    return ", ".join([" ".join([noun, *examples]), *bounds])
