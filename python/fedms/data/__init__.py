"""Data sets, a file each, and their division among clients. What is known of a data set before it is imported is a row of
`fedms.config.catalogue`; anything else is read by `user_data`, or by `language` for a causal language model."""

from __future__ import annotations

from fedms.config import registry
from fedms.errors import DataError

from . import language, user_data
from .cache import CacheError, cache_dir, made_cache_dir
from .dataset import Dataset, describe, make_dataset
from .inputs import ImageInputs, TextInputs
from .partitioning import ClientSplit, Partition, partition
from .probe import preprocessing_fingerprint, without_samples
from .samples import counted, normal
from .shard import Shard, ShardError, read_shard, shard_of, write_shard
from .user_data import stamp

__all__ = [
    "CacheError",
    "ClientSplit",
    "DataError",
    "Dataset",
    "ImageInputs",
    "Partition",
    "Shard",
    "ShardError",
    "TextInputs",
    "cache_dir",
    "counted",
    "describe",
    "made_cache_dir",
    "load",
    "make_dataset",
    "normal",
    "partition",
    "preprocessing_fingerprint",
    "read_shard",
    "shard_of",
    "stamp",
    "without_samples",
    "write_shard",
]


def load(config, model, *, seed: int = 0) -> Dataset:
    """Load the data set `config.name` in the form that `model` reads.

    A registered data set is loaded by its name. Any other is found in a file, in a folder or on the hub, by `language` for causal
    language models and by `user_data` otherwise.

    Args:
        config: The [data] table of the run file.
        model: A `fedms.models.FoundationModel`, which tokenizes texts and brings images to its size.
        seed: Seed of the subsample, if `max_samples` asks for one. Runs that differ only in their own seed should keep it, so that
            they see the same samples.

    Raises:
        DataError: If the name is unknown, the model reads something else, or files are missing, damaged, or hold NaN or infinity.
    """
    if config.max_samples is not None and config.max_samples < 1:
        raise DataError(f"data.max_samples: expected at least 1, got {config.max_samples}")
    row = registry.data_sets().get(config.name)
    if row is None:
        return (language if model.reads == "conversations" else user_data).load(config, model, seed)
    if model.reads != row.holds:
        raise DataError(
            f"data.name: {config.name!r} holds {row.holds}, but model.id {model.name!r} reads {model.reads}; "
            "choose a model and data that fit"
        )
    return row.load()(config, model, seed)
