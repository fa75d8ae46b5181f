"""The run file, and the catalogue of what it can name. Nothing here imports torch, so a mistake in a run file is answered at
once.

All problems of single keys are reported in one pass, then all of keys that do not fit together; one line each, by the
dotted key, the value found and the values accepted.
"""

from __future__ import annotations

from fedms.config import catalogue as _builtin_rows  # noqa: F401  # registers them
from fedms.config.reference import reference
from fedms.config.registry import Constant, register_data, register_method, register_model
from fedms.config.run_config import RunConfig
from fedms.config.run_file import (builtin_names, config_from_dict, dump, dump_toml, load_config, of_method, read_tables,
                                   source_name, with_run)
from fedms.config.table import Table, parse_size
from fedms.config.tables import CLIENTS, ClientsTable, DataTable, ModelTable, Stage
from fedms.config.upgrade import FORMAT, upgraded
from fedms.errors import ConfigError

__all__ = [
    "CLIENTS", "FORMAT", "ClientsTable", "ConfigError", "Constant", "DataTable", "ModelTable", "RunConfig", "Stage", "Table",
    "builtin_names", "config_from_dict", "dump", "dump_toml", "load_config", "of_method", "parse_size", "read_tables",
    "reference", "register_data", "register_method", "register_model", "source_name", "upgraded", "with_run",
]
