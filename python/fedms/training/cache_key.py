"""What the bits of a model's constants depend on, beside the values that they are computed from, as a text.

`[sal] cache = "disk"` keeps constants for later runs, which find them by this text. What is left out of it lets a run read values that
were computed otherwise; what is in it without need costs a run the time to compute them again. So whatever may decide a bit is in it.
"""
from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import fedms_ext
from fedms import data, models, tasks, training
from fedms.training.device import describe
from fedms.training.frozen import held_format
from fedms_ext import available, build_info
from fedms_ext.backends.registry import preference
from fedms_ext.nn.pairs import Pairs

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel

# Rooms that compute constants: batches, the model, the opinion of an expert, and the passes through them.
ROOMS = (data, models, tasks, training)
# Other packages that compute, where they are installed.
LIBRARIES = ("torch", "transformers", "triton", "numpy")
PLAIN = (str, int, float, type(None))


def origin(model: ExpertModel) -> str:
    """Return a text that says what the bits of a constant depend on beside the values that it is computed from: model, data, code,
    arithmetic. Methods, ranks and seeds are not in it, so runs that differ in these alone find each other's values."""
    return repr((_foundation(model), model.dataset.fingerprint, model.dataset.prompts, _task(model), model.prefix_chunk, code(),
                 _other_code(model), _arithmetic(model)))


def _foundation(model: ExpertModel) -> tuple[object, ...]:
    """Return what a model computes: its weights, and all settings that are not weights, as the pooling of its features."""
    foundation = model.foundation
    settings = sorted((name, value) for name, value in vars(foundation).items() if isinstance(value, PLAIN))
    layers = [(name, type(m).__qualname__, "" if isinstance(m, fedms_ext.ExpertLinear) else m.extra_repr())
              for name, m in foundation.module.named_modules() if not isinstance(m, Pairs)]
    return foundation.fingerprint, settings, repr(getattr(foundation.module, "config", None)), layers


def _task(model: ExpertModel) -> tuple[object, ...]:
    config = model.config
    frozen = held_format(config, config.model.frozen)
    return type(model.task).__qualname__, config.task, config.model.model_copy(update={"frozen": frozen}), config.head


def _arithmetic(model: ExpertModel) -> tuple[object, ...]:
    """Return how numbers are rounded: by which kernels, with which instructions, in which dtypes, by how many threads."""
    built, run, (forced, _) = build_info(), model.config.run, preference()
    return (torch.__config__.show(), built["isa_used"], built["bf16_products"], available(), forced and forced.name,
            torch.get_float32_matmul_precision(), run.threads, run.dtype, describe(model.device), model.config.sal.cache_dtype)


@cache
def code() -> str:
    """Return a hash of the code that computes constants: rooms of this package, layers, compiled kernels, and versions of libraries.
    It takes 8 milliseconds of processor time (`fedms_ext/_C` of 0.9 MB, files in the page cache)."""
    found = hashlib.sha256()
    for package in (*ROOMS, fedms_ext):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            found.update(f"{package.__name__} {file.relative_to(folder)}\n".encode() + file.read_bytes())
    found.update(Path(fedms_ext._C.__file__).read_bytes())
    found.update(repr([(name, _version(name)) for name in LIBRARIES]).encode())
    return found.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _other_code(model: ExpertModel) -> str:
    """Return a hash of the files with code of this model's own: of a plugin, of a hub's repository, or given as an object."""
    found = hashlib.sha256()
    for name in sorted({*_defining(model)}):
        found.update(f"{name}\n".encode() + _source(name))
    return found.hexdigest()


def _defining(model: ExpertModel) -> Iterator[str]:
    """Yield the names of the modules that define the classes and functions of a model, but for those that `code` covers."""
    kinds = {type(m) for m in (*model.foundation.module.modules(), model.foundation, model.task, model.dataset.inputs)}
    functions = [value for value in vars(model.foundation).values() if callable(value) and not isinstance(value, nn.Module)]
    for each in (*(base for kind in kinds for base in kind.__mro__), *functions):
        name = getattr(each, "__module__", None) or type(each).__module__
        if name.split(".")[0] not in ("builtins", "torch", "fedms", "fedms_ext"):
            yield name


def _source(name: str) -> bytes:
    """Return what the file of a module holds. Code that is in no file, as in a notebook, is taken for new in every process."""
    try:
        return Path(sys.modules[name].__file__ or "").read_bytes()
    except (KeyError, AttributeError, OSError):
        return _unknown()


@cache
def _unknown() -> bytes:
    return secrets.token_bytes(16)
