"""Data sets of the Hugging Face hub, through the datasets library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedms.errors import DataError

from .hub_access import advice, hub
from .samples import Samples, normal
from .tables import Table, positions, samples_of, wanted_columns


def load_hub(config, reads: str) -> Samples:
    """Load the split `config.part` of the hub's data set `config.name`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.name: a hub data set needs the package datasets; pip install 'fedms[train]'") from error
    with hub() as unreachable:
        try:
            table = datasets.load_dataset(config.name, config.subset, split=config.part)
        except Exception as error:  # no such id, several configurations, a damaged file, ...
            reason = (f"{unreachable}, {advice(config.name, 'data.name', 'dataset')}" if unreachable else
                      f"{type(error).__name__}: {str(error).strip().splitlines()[0]}; check the name, data.subset, data.part and, for a "
                      "private data set, the login of `hf auth login`")
            raise DataError(f"data.name: {config.name!r} is neither built in nor a file or folder in {Path.cwd()}; as a hub id it "
                            f"cannot be loaded: {reason}") from error
    return from_hub(table, config, reads)


def from_hub(table, config, reads: str) -> Samples:
    """Return the samples of a `datasets.Dataset`, by the same rules as for a file."""
    import datasets

    wanted = wanted_columns(config, reads, labeled=True)
    written = {normal(name): name for name in table.column_names}
    columns: dict[str, list[Any]] = {}
    for name in wanted.values():
        if name in written:
            column = written[name]
            if isinstance(table.features[column], datasets.Image):
                # Undecoded: an image that cannot be read is then one of many, not the end.
                table = table.cast_column(column, datasets.Image(decode=False))
            columns[name] = list(table[column])
    label = wanted["data.label"]
    names = getattr(table.features.get(written.get(label)), "names", None)
    if names is not None:
        columns[label] = positions(columns[label], names, config.name)
    places = [f"{config.name}, row {row + 1}" for row in range(len(table))]
    found = Table(config.name, None, [normal(name) for name in table.column_names], columns, places,
                  None if names is None else tuple(names))
    return samples_of([found], None, config, reads, labeled=True)
