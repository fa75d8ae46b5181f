"""Data sets, and their division among clients. A new built-in data set is one file here, and a line in `LOADERS` and
in `config.DATA`; anything else is read by `own`."""

from __future__ import annotations

from fedms.config import DATA
from fedms.errors import DataError

from . import digits, fashion, language, sentiment, user_data
from .cache import cache_dir, made_cache_dir
from .dataset import Dataset, describe, make_dataset
from .inputs import ImageInputs, TextInputs
from .partitioning import ClientSplit, Partition, partition
from .samples import normal
from .shard import Shard, ShardError, read_shard, shard_of, write_shard
from .user_data import stamp

__all__ = [
    "ClientSplit",
    "DataError",
    "PUBLIC_HALVES",
    "Dataset",
    "ImageInputs",
    "Partition",
    "Shard",
    "ShardError",
    "TextInputs",
    "cache_dir",
    "describe",
    "made_cache_dir",
    "load",
    "make_dataset",
    "normal",
    "partition",
    "read_shard",
    "shard_of",
    "stamp",
    "write_shard",
]

# name -> the images to pretrain a model on, (n, 1, H, W) float32 in [0, 1], which no client of it sees
PUBLIC_HALVES = {"digits": digits.public_half, "fashion-mnist": fashion.public_half}

LOADERS = {
    "sentiment": sentiment.load,
    "digits": digits.load,
    "fashion-mnist": fashion.load,
}


def load(config, model, *, seed: int = 0) -> Dataset:
    """Load the data set `config.name` in the form that `model` reads: a built-in one by its name, else what `own` finds
    in a file, in a folder or on the hub.

    config: the run file's [data] table.
    model:  a `fedms.models.FoundationModel`; texts are tokenized by it, images brought to its size.
    seed:   of the subsample, if `max_samples` asks for one. Runs that differ in their own seed only should
            keep it, so that they see the same samples.

    Raises DataError: unknown name, a model that reads something else, damaged or missing files, NaN or
    infinity.
    """
    if config.max_samples is not None and config.max_samples < 1:
        raise DataError(f"data.max_samples: expected at least 1, got {config.max_samples}")
    if model.reads == "conversations":
        return language.load(config, model, seed)
    if config.name not in LOADERS and config.name not in DATA:
        return user_data.load(config, model, seed)
    if model.reads != DATA[config.name]:
        raise DataError(
            f"data.name: {config.name!r} holds {DATA[config.name]}, but model.id {model.name!r} reads {model.reads}; "
            "choose a model and data that fit"
        )
    return LOADERS[config.name](config, model, seed)
