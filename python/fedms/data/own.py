"""Data of one's own: tables (.csv, .tsv, .parquet, .jsonl), folders of images, data sets of the Hugging Face hub.

A table has a column of texts, or of images (file names beside the table, or the files' bytes), and a column of
labels. Clients are a column, or one table each. A folder of images is CLASS/IMAGE, or CLIENT/CLASS/IMAGE.

pandas, datasets and PIL do the reading; what is here maps columns to samples, classes and clients, and says what is
wrong by file and row.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset, make_dataset, strata_of, stratified_sample
from .inputs import DataError, ImageInputs

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
AT_ONCE = 64  # images that are decoded and resized together


@dataclass(frozen=True)
class Samples:
    """What was read, a row a sample, in one order.

    content: texts; or images as PIL images, paths, or the bytes of their files.
    places:  where each came from, for errors.
    labels:  as they were written, or None where there are none.
    clients: name of each sample's client, or None.
    classes: their names, where the source itself says them.
    table:   the table that they came from, or None.
    """

    content: list[Any]
    places: list[str]
    labels: list[Any] | None
    clients: list[str] | None
    classes: tuple[str, ...] | None = None
    table: pd.DataFrame | None = None


def load(config, model, seed: int) -> Dataset:
    """config: the run file's [data] table. See `fedms.data.load`."""
    samples = read(config, model.reads)
    labels, classes = _classes(config, samples)
    groups, group_names = _groups(samples.clients)
    kept = np.arange(len(labels))
    if config.max_samples is not None:
        kept = stratified_sample(strata_of(labels, groups), config.max_samples, np.random.default_rng(seed))
    content, places = [samples.content[i] for i in kept], [samples.places[i] for i in kept]
    inputs = inputs_of(content, places, model, config.name, config.max_tokens)
    return make_dataset(config.name, inputs, torch.from_numpy(labels[kept]), classes,
                        prompts=_prompts(config, model, classes),
                        groups=None if groups is None else torch.from_numpy(groups[kept]), group_names=group_names)


def read(config, reads: str, *, labelled: bool = True) -> Samples:
    """All samples of `config.name` (config: the [data] table, or what has its column names).

    reads:    "text" or "images".
    labelled: False where labels and clients are not wanted.
    """
    path = Path(config.name).expanduser()
    if path.suffix.lower() in TABLES and path.is_file():
        return _tables([path], config, reads, labelled)
    if path.suffix.lower() in IMAGES and path.is_file():
        return _image_files([path], path.parent, labelled)
    if path.is_dir():
        tables = sorted((p for p in path.iterdir() if p.suffix.lower() in TABLES and not p.name.startswith(".")),
                        key=lambda p: natural(p.stem))
        if tables:
            return _tables(tables, config, reads, labelled)
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES and not _hidden(p, path))
        if not files:
            raise DataError(f"data.name: {path} holds neither tables ({', '.join(TABLES)}) nor images "
                            f"({', '.join(IMAGES)})")
        if reads != "images":
            raise DataError(f"data.name: {path} holds images, but the model reads text")
        return _image_files(files, path, labelled)
    if path.exists():
        raise DataError(f"data.name: {path} is no table; accepted: {', '.join(TABLES)}, or a folder of them or of images")
    if config.name.startswith((".", "/", "~")) or path.suffix or config.name.count("/") > 1:
        raise DataError(f"data.name: {path}: no such file or folder (seen from {Path.cwd()})")
    return _hub(config, reads)


# Tables

def _tables(paths: Sequence[Path], config, reads: str, labelled: bool) -> Samples:
    import pandas as pd

    column = config.text if reads == "text" else config.image
    wanted = {"data.text" if reads == "text" else "data.image": column}
    if labelled:
        wanted |= {"data.label": config.label} | ({"data.client": config.client} if config.client else {})
    frames = []
    for path in paths:
        frame = _read_table(path)
        for key, name in wanted.items():
            if name not in frame.columns:
                raise DataError(f"{path}: no column {name!r} ({key}); its columns are: {', '.join(map(str, frame.columns))}")
        if len(frame) == 0:
            raise DataError(f"{path}: holds no samples")
        empty = _empty(frame, wanted.values())
        if empty:
            name, rows = empty
            raise DataError(f"{path}: row {rows[0] + 1} has nothing in column {name!r} ({len(rows)} of {len(frame)} rows); "
                            "fill or remove these rows")
        frames.append(frame)
    content = [value for path, frame in zip(paths, frames) for value in _content(frame[column], path, reads)]
    places = [f"{path}, row {row + 1}" for path, frame in zip(paths, frames) for row in range(len(frame))]
    together = pd.concat(frames, ignore_index=True)
    clients = None
    if labelled and config.client:
        clients = [_written(value) for value in together[config.client]]
    elif len(paths) > 1:
        clients = [path.stem for path, frame in zip(paths, frames) for _ in range(len(frame))]
    return Samples(content, places, together[config.label].tolist() if labelled else None, clients, table=together)


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    readers = {
        # A text or a label may well be "None" or "NA": empty is empty, and nothing else is.
        ".csv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""]),
        ".tsv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], sep="\t"),
        ".parquet": lambda: pd.read_parquet(path),
        ".jsonl": lambda: pd.read_json(path, lines=True, dtype=False),
    }
    try:
        return readers[path.suffix.lower()]()
    except Exception as error:  # pandas and its engines raise many types
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).strip().splitlines()[0]}") from error


def _empty(frame: pd.DataFrame, columns) -> tuple[str, list[int]] | None:
    for name in columns:
        missing = frame[name].isna() | frame[name].map(lambda v: isinstance(v, str) and not v.strip())
        if missing.any():
            return name, np.flatnonzero(missing).tolist()
    return None


def _content(column: pd.Series, path: Path, reads: str) -> Iterator[Any]:
    for row, value in enumerate(column):
        if isinstance(value, dict):  # an image as the datasets library stores it
            value = value.get("bytes") or value.get("path")
        if reads == "text" and not isinstance(value, str):
            raise DataError(f"{path}: row {row + 1} of column {column.name!r} is {value!r}, expected a text")
        yield path.parent / value if reads == "images" and isinstance(value, str) else value


# Folders of images

def _image_files(files: Sequence[Path], root: Path, labelled: bool) -> Samples:
    places = [str(path) for path in files]
    if not labelled:
        return Samples(list(files), places, None, None)
    depths = {len(path.relative_to(root).parts): path for path in files}
    if len(depths) > 1 or not depths.keys() <= {2, 3}:
        shown = "; ".join(str(path) for path in list(depths.values())[:2])
        raise DataError(f"data.name: {root}: expected CLASS/IMAGE or CLIENT/CLASS/IMAGE throughout, got {shown}")
    labels = [path.parent.name for path in files]
    by_client = 3 in depths
    folders = {path.name for path in root.glob("*/*" if by_client else "*") if path.is_dir() and not _hidden(path, root)}
    if empty := sorted(folders - set(labels), key=natural):
        raise DataError(f"data.name: {root}: class {empty[0]!r} is empty: its folder holds no image ({', '.join(IMAGES)})")
    clients = [path.parent.parent.name for path in files] if by_client else None
    return Samples(list(files), places, labels, clients)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def inputs_of(content: Sequence[Any], places: Sequence[str], model, source: str, max_tokens: int):
    """Texts or images as the model reads them. DataError names every image that cannot be read, up to five."""
    if model.reads == "text":
        return model.tokenize(list(content), max_tokens)
    pixels, bad = None, []
    for start in range(0, len(content), AT_ONCE):
        opened = []
        for item, place in zip(content[start:start + AT_ONCE], places[start:start + AT_ONCE]):
            try:
                opened.append(_open(item))
            except Exception as error:  # PIL's decoders raise many types
                bad.append(f"{place} ({error})")
        if bad or not opened:
            continue
        part = model.prepare(opened)
        if pixels is None:
            pixels = torch.empty(len(content), *part.shape[1:], dtype=part.dtype)
        pixels[start:start + AT_ONCE] = part
    if bad:
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"{source}: {len(bad)} of {len(content)} images cannot be read: {'; '.join(bad[:5])}{more}; repair "
                        "or remove them")
    return ImageInputs(pixels, model.image_tokens, source,
                       model.pixel_transform if pixels.dtype == torch.uint8 else None)


def _open(item: Any):
    from PIL import Image, ImageOps

    image = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    image.load()
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode}: more than 8 bits a channel; save it with 8")
    return ImageOps.exif_transpose(image)


# The hub

def _hub(config, reads: str) -> Samples:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.name: a hub data set needs the package datasets; pip install 'fedms[train]'") from error
    try:
        table = datasets.load_dataset(config.name, config.subset, split=config.part)
    except Exception as error:  # no network, no such id, several configurations, a damaged file, ...
        raise DataError(
            f"data.name: {config.name!r} is neither built in nor a file or folder here, and the hub's data set of that "
            f"name cannot be loaded ({type(error).__name__}: {str(error).strip().splitlines()[0]}); check the name, "
            "data.subset, data.part and the network"
        ) from error
    return from_hub(table, config, reads)


def from_hub(table, config, reads: str) -> Samples:
    """Samples of a `datasets.Dataset`."""
    column = config.text if reads == "text" else config.image
    for key, name in {"data.text" if reads == "text" else "data.image": column, "data.label": config.label,
                      "data.client": config.client}.items():
        if name is not None and name not in table.column_names:
            raise DataError(f"{config.name}: no column {name!r} ({key}); its columns are: {', '.join(table.column_names)}")
    labels = list(table[config.label])
    names = getattr(table.features[config.label], "names", None)
    places = [f"{config.name}, row {row + 1}" for row in range(len(table))]
    for name, values in ((column, table[column] if reads == "text" else []), (config.label, labels)):
        # -1 is how the datasets library marks a label that is kept secret.
        bad = [i for i, v in enumerate(values) if v is None or v == "" or (name == config.label and v == -1)]
        if bad:
            raise DataError(f"{places[bad[0]]} has nothing in column {name!r} ({len(bad)} of {len(table)} rows)")
    clients = None if config.client is None else [_written(v) for v in table[config.client]]
    return Samples(list(table[column]), places, labels, clients, tuple(names) if names else None)


# Classes and clients

def _classes(config, samples: Samples) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class index (n,) int64 of each sample, and the class names."""
    written = [_written(label) for label in samples.labels]
    names = config.classes or samples.classes
    if names is None:
        names = tuple(sorted(set(written), key=natural))
        if len(names) == len(written) > 2:
            raise DataError(f"{config.name}: every sample has a label of its own; is data.label = {config.label!r} the "
                            "column of classes?")
    index = {name: i for i, name in enumerate(names)}
    if not set(written) <= set(index) and all(re.fullmatch(r"\d+", w) and int(w) < len(names) for w in set(written)):
        index = {str(i): i for i in range(len(names))}  # integer labels count the classes
    for label, place in zip(written, samples.places):
        if label not in index:
            raise DataError(f"{place}: label {label!r} is no class; classes are: {', '.join(names)}")
    labels = np.array([index[label] for label in written], dtype=np.int64)
    counts = Counter(labels.tolist())
    if empty := [name for i, name in enumerate(names) if not counts[i]]:
        raise DataError(f"{config.name}: class {empty[0]!r} is empty: no sample has it; leave it out of data.classes, or "
                        "add samples")
    if len(names) < 2:
        raise DataError(f"{config.name}: all samples are of one class, {names[0]!r}; at least two are needed")
    return labels, tuple(names)


def _groups(clients: list[str] | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if clients is None:
        return None, ()
    names = tuple(sorted(set(clients), key=natural))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[client] for client in clients], dtype=np.int64), names


def _prompts(config, model, classes: tuple[str, ...]) -> tuple[tuple[str, ...], ...] | None:
    """One prompt a class, where the model can embed it and the class has a name, not a number."""
    if model.zero_shot_temperature is None or not all(any(c.isalpha() for c in name) for name in classes):
        return None
    template = config.prompt or ("{}" if model.reads == "text" else "a photo of a {}.")
    return tuple((template.format(name.replace("_", " ")),) for name in classes)


def _written(value: Any) -> str:
    """A label or a client as text: 3, 3.0 and "3" are the same."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def natural(name: str) -> list[tuple[int, int, str]]:
    """Key of an order in which client2 comes before client10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]
