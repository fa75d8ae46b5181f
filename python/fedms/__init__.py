"""FedMS: two-stage federated fine-tuning of a frozen foundation model with LoRA experts, a gate and sparse activation.

The names of `__all__` are all that other programs should use. Each is imported when it is first asked for, so that
`import fedms` loads neither torch nor pandas.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedms.config import Constant, RunConfig, Table, load_config, register_data, register_method, register_model
    from fedms.data import make_dataset
    from fedms.errors import (AllClientsFailed, CheckpointError, ConfigError, DataError, FedMSError, Interrupted, ModelError,
                              RunFolderError, WorkerDied)
    from fedms.exports import export
    from fedms.exports.mixture import Mixture, load
    from fedms.federated.method import BroadcastPolicy, Method, Prediction
    from fedms.models import ModuleModel
    from fedms.progress import Progress
    from fedms.report.results import Results, results
    from fedms.runs.batch import compare
    from fedms.runs.run import run

_ROOMS = {
    "config": ("Constant", "RunConfig", "Table", "load_config", "register_data", "register_method", "register_model"),
    "data": ("make_dataset",),
    "errors": ("AllClientsFailed", "CheckpointError", "ConfigError", "DataError", "FedMSError", "Interrupted", "ModelError",
               "RunFolderError", "WorkerDied"),
    "exports": ("export",),
    "exports.mixture": ("Mixture", "load"),
    "federated.method": ("BroadcastPolicy", "Method", "Prediction"),
    "models": ("ModuleModel",),
    "progress": ("Progress",),
    "report.results": ("Results", "results"),
    "runs.batch": ("compare",),
    "runs.run": ("run",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "AllClientsFailed", "BroadcastPolicy", "CheckpointError", "ConfigError", "Constant", "DataError", "FedMSError",
    "Interrupted", "Method", "Mixture", "ModelError", "ModuleModel", "Prediction", "Progress", "Results", "RunConfig",
    "RunFolderError", "Table", "WorkerDied", "compare", "export", "load", "load_config", "make_dataset", "register_data",
    "register_method", "register_model", "results", "run",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'fedms' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedms.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
