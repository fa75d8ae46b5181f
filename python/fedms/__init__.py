"""FedMS: two-stage federated fine-tuning of a frozen foundation model with LoRA experts, a gate and SAL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedms.export.mixture import Mixture, load
    from fedms.report.results import Results, results

__all__ = ["Mixture", "Results", "load", "results"]

_HOMES = {"Mixture": "fedms.export.mixture", "Results": "fedms.report.results", "load": "fedms.export.mixture",
          "results": "fedms.report.results"}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: the commands answer before torch and pandas are loaded.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedms' has no attribute {name!r}")
