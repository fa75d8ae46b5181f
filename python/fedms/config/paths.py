"""The keys of a run file that name files and folders of this machine."""
from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from fedms.config import registry
from fedms.config.run_config import RunConfig

# What each key accepts in the place of a path; nothing else where that is None. A name of the hub is a path if there is one.
_KEYS: dict[tuple[str, str], Callable[[], Collection[str]] | None] = {
    ("model", "id"): registry.models, ("data", "name"): registry.data_sets, ("data", "path"): None, ("lora", "start"): None,
    ("clients", "arrivals"): None, ("privacy", "key"): None}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return a run file whose paths do not depend on the working folder, for processes that have another one."""
    return _changed(config, lambda path: str(Path(path).expanduser().absolute()))


def with_real_paths(config: RunConfig) -> RunConfig:
    """Return a run file in which different paths of one file are the same text."""
    return _changed(config, lambda path: os.path.realpath(Path(path).expanduser()))


def with_bare_names(config: RunConfig) -> RunConfig:
    """Return a run file without the folders that absolute paths name, for what is given away."""
    return _changed(config, bare_name, here=False)


def bare_name(path: str) -> str:
    """Return the last part of an absolute path, and anything else as it is."""
    return Path(path).name if Path(path).is_absolute() else path


def _changed(config: RunConfig, change: Callable[[str], str], here: bool = True) -> RunConfig:
    """Return a run file with every path changed.

    Args:
        here: Whether a key that may name something else holds a path only if there is a file or folder of this name.
    """
    for (table, key), others in _KEYS.items():
        values = getattr(config, table)
        value = getattr(values, key)
        if value is None or (table == "privacy" and values.mode == "off"):
            continue
        if others is not None and (value in others() or (here and not Path(value).expanduser().exists())):
            continue
        config = config.model_copy(update={table: values.model_copy(update={key: change(value)})})
    return config
