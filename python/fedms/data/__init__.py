"""Data sets, and their division among clients. A new data set is one file here, and a line in `LOADERS`."""

from __future__ import annotations

from . import digits, sentiment
from .cache import cache_dir
from .dataset import Dataset, make_dataset
from .inputs import DataError, ImageInputs, TextInputs
from .partitioning import ClientSplit, Partition, partition

__all__ = [
    "ClientSplit",
    "DataError",
    "Dataset",
    "ImageInputs",
    "Partition",
    "TextInputs",
    "cache_dir",
    "load",
    "make_dataset",
    "partition",
]

# name -> (what the model must read, loader)
LOADERS = {
    "sentiment": ("text", sentiment.load),
    "digits": ("images", digits.load),
}


def load(config, model, *, seed: int = 0) -> Dataset:
    """Load the data set `config.name` in the form that `model` reads.

    config: the run file's [data] table (name, path, max_samples, max_tokens).
    model:  a `fedms.models.FoundationModel`; texts are tokenised by it.
    seed:   of the subsample, if `max_samples` asks for one. Runs that differ in their own seed only should
            keep it, so that they see the same sentences.

    Raises DataError: unknown name, a model that reads something else, damaged or missing files, NaN or
    infinity.
    """
    if config.name not in LOADERS:
        raise DataError(f"data.name: unknown data set {config.name!r}; known: {', '.join(LOADERS)}")
    if config.max_samples is not None and config.max_samples < 1:
        raise DataError(f"data.max_samples: expected at least 1, got {config.max_samples}")
    reads, loader = LOADERS[config.name]
    if model.reads != reads:
        raise DataError(
            f"data.name: {config.name!r} holds {reads}, but model.id {model.name!r} reads {model.reads}; "
            "choose a model and data that fit"
        )
    return loader(config, model, seed)
