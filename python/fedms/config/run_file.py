"""Run files: TOML in and out, and the overrides of `--set`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from fedms.config import registry
from fedms.config.explain import explain, keys, suggest_key
from fedms.config.problems import did_you_mean, show
from fedms.config.run_config import RunConfig, config_class
from fedms.config.upgrade import FORMAT, upgraded
from fedms.errors import ConfigError
from fedms.foreign import parse_toml, read_regular

RUNFILES = Path(__file__).parent / "builtin"


def builtin_names() -> tuple[str, ...]:
    """Return the names of the built-in run files."""
    return tuple(sorted(path.stem for path in RUNFILES.glob("*.toml")))


def source_name(source: str | Path) -> str:
    """Return the short name of a run file: the built-in name, or the file name without `.toml`."""
    return Path(source).stem


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and validate a run file.

    Args:
        source: A built-in name (see `builtin_names`) or a path.
        overrides: Each is `table.key=value`. The value is TOML (`0.01`, `true`, `[0.6, 0.2, 0.2]`); any other text is taken
            as a string, and `none` unsets an optional key.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is not valid.
    """
    values = upgraded(read_tables(source), assumed=FORMAT)
    for override in overrides:
        _apply(values, override)
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Validate nested plain values, as read from TOML. Raise a ConfigError if they are not valid."""
    try:
        return config_class().model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, values)) from None


def with_run(config: RunConfig, **values: Any) -> RunConfig:
    """Return the configuration with values of its [run] table replaced.

    Raises:
        ConfigError: If they are not valid together with the rest of the configuration.
    """
    tables = config.model_dump()
    return config_from_dict({**tables, "run": {**tables["run"], **values}})


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the complete configuration as plain values, with the number of their format, which `upgraded` reads.

    Unset optional keys and the tables of other methods are omitted.
    """
    return {"format": FORMAT, **of_method(config.model_dump(mode="json", exclude_none=True))}


def of_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values without the tables of other methods."""
    method = values["run"]["method"]
    return {table: keys for table, keys in values.items() if registry.method_of_table(table) in (None, method)}


def dump_toml(config: RunConfig) -> str:
    """Return `dump(config)` as TOML. Loading the text gives `config` again."""
    import tomli_w

    return tomli_w.dumps(dump(config))


def read_tables(source: str | Path) -> dict[str, Any]:
    """Return the plain values of a run file without validating them. Raise a ConfigError if it cannot be read."""
    path = Path(source)
    if isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9_-]+", source) and not path.is_file():
        path = RUNFILES / f"{source}.toml"
        if not path.is_file():
            raise ConfigError(f"{source}: no such built-in run file and no such file; "
                              f"built in: {', '.join(builtin_names())}{did_you_mean(source, builtin_names())}")
    try:
        return parse_toml(read_regular(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a run file or a built-in name "
                          f"({', '.join(builtin_names())})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a run file (TOML)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a run file is TOML") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        hint = suggest_key(parts[0]) if equals and len(parts) == 1 else ", for example --set stage1.lr=0.002"
        raise ConfigError(f"--set {override}: expected table.key=value{hint}")
    text = text.strip()
    if text.lower() == "none":
        value = None
    else:
        try:
            value = parse_toml(f"value = {text}")["value"]
        except ValueError:
            value = text
    if not isinstance(value, str) and value is not None and _is_text(parts[0], parts[1]):
        value = [item if isinstance(item, str) else str(item) for item in value] if isinstance(value, list) else text
    table = values.setdefault(parts[0], {})
    if not isinstance(table, dict):
        raise ConfigError(f"{parts[0]}: got {show(table)}; accepted: a table [{parts[0]}]")
    table[parts[1]] = value


def _is_text(table: str, key: str) -> bool:
    """Return whether a key holds a string or a list of strings, so that an override such as 2020 or true is a string."""
    field = keys().get(table, {}).get(key)
    return field is not None and not {int, float, bool, dict} & _atoms(field.annotation) and str in _atoms(field.annotation)


def _atoms(annotation: Any) -> set[Any]:
    """Return the plain types in an annotation; for a Literal, the types of its values."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin is None:
        return {annotation}
    arguments = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return set().union(*map(_atoms, arguments))
