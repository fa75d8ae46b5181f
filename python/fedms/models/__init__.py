"""Foundation models, a family a file; what is known of each before it is imported is a row of `fedms.config.catalogue`.
Anything in Hugging Face's format is read by `huggingface` or `causal_lm`, and any other module by `ModuleModel`."""

from __future__ import annotations

from fedms.config import ModelTable, registry

from fedms.errors import ModelError

from . import causal_lm, huggingface
from .base import FoundationModel
from .huggingface import wrap
from .module import ModuleModel

__all__ = ["FoundationModel", "ModelError", "ModuleModel", "load", "wrap"]


def load(table: ModelTable, task: str = "classification") -> FoundationModel:
    """Loads the frozen model `table.id`: a registered one by its name, else what `huggingface.load`, or for the task
    "causal_lm" `causal_lm.load`, finds in a folder or on the hub.

    Raises:
        ModelError: if it cannot be had.
    """
    row = registry.models().get(table.id)
    if row is not None:
        return row.load()(table)
    return causal_lm.load(table) if task == "causal_lm" else huggingface.load(table)
