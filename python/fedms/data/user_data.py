"""Read a user's own data: tables (.csv, .tsv, .parquet, .jsonl), folders of images, and data sets of the Hugging Face hub.

A table has a column of texts or of images (file names relative to the table, or the bytes of the files) and a column of
labels. The client of a sample is given by a column or by its table. A folder of images is CLASS/IMAGE or CLIENT/CLASS/IMAGE.
Tables or folders named train, validation and test are splits, of which `data.part` is read.

The modules `tables`, `image_folder` and `hub` read samples; `labels` determines classes and clients; `images` decodes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter

from fedms.config import registry
from fedms.errors import DataError
from fedms.foreign import conform, parse_toml, read_regular

from .dataset import Dataset, make_dataset, strata_of, stratified_sample
from .hub import from_hub, load_hub
from .image_folder import Tree, image_samples, is_image, scan
from .images import IMAGES, read_images
from .images import open_image as _open
from .labels import class_notes, groups_of, listed, natural, prompts_of
from .labels import classes_of as _classes
from .samples import SPLITS, Samples, left_out, split_name
from .tables import TABLES, read_table, samples_of, table_kind, table_stem, wanted_columns

__all__ = ["_classes", "_open", "from_hub", "inputs_of", "load", "natural", "read", "stamp"]

def load(config, model, seed: int) -> Dataset:
    """Load a user's own data, see `fedms.data.load`.

    Args:
        config: The [data] table of the run file.
    """
    samples = read(config, model.reads)
    labels, classes = _classes(config, samples)
    groups, group_names = groups_of(samples.clients)
    notes = [*samples.notes, *class_notes(config, samples, labels, classes)]
    kept = np.arange(len(labels))
    if config.max_samples is not None:
        kept = stratified_sample(strata_of(labels, groups), config.max_samples, np.random.default_rng(seed))
    content, places = [samples.content[i] for i in kept], [samples.places[i] for i in kept]
    if model.reads == "text":
        inputs = model.tokenize(content, config.max_tokens)
    else:
        images = read_images(content, places, model, config.name, strict=False)
        inputs, kept, notes = images.inputs, kept[images.kept], [*notes, *images.notes]
        if lost := sorted(set(labels.tolist()) - set(labels[kept].tolist())) if config.max_samples is None else []:
            raise DataError(f"{images.notes[-1]}; without these class {classes[lost[0]]!r} is empty; repair or remove them")
    return make_dataset(config.name, inputs, torch.from_numpy(labels[kept]), classes,
                        prompts=prompts_of(config, model, classes), notes=tuple(notes),
                        groups=None if groups is None else torch.from_numpy(groups[kept]), group_names=group_names)


def stamp(config) -> tuple[object, ...]:
    """Return a value that changes with the size or modification time of a file of `config.name`, to invalidate caches."""
    path = Path(config.name).expanduser()
    if config.name in registry.data_sets() or not path.exists():
        return ()
    tree = scan(path) if path.is_dir() else Tree(path, (), (), (path,), ())
    files = (*tree.tables, *tree.images, *tree.others)
    return tuple((str(file), *((at.st_size, at.st_mtime_ns) if (at := _stat(file)) else ())) for file in files)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def inputs_of(content: Sequence[Any], places: Sequence[str], model, source: str, max_tokens: int):
    """Convert texts or images to model inputs. A DataError names up to five images that cannot be read."""
    if model.reads == "text":
        return model.tokenize(list(content), max_tokens)
    return read_images(content, places, model, source, strict=True).inputs


def read(config, reads: str, *, labeled: bool = True) -> Samples:
    """Read all samples of `config.name`.

    Args:
        config: The [data] table, or an object with the same attributes.
        reads: "text" or "images".
        labeled: Whether labels and clients are needed; prediction does not need them.
    """
    path = Path(config.name).expanduser()
    if path.is_dir():
        return _folder(path, config, reads, labeled)
    if path.is_file():
        if table_kind(path):
            return _tables([path], config, reads, labeled)
        if path.suffix == ".toml":
            return _by_client(path, config, reads, labeled)
        if is_image(path):
            _check_images(path, reads)
            return image_samples(Tree(path.parent, (), (path,), (), ()), labeled)
        raise DataError(f"data.name: {path} is no table; accepted: {', '.join(TABLES)} (each also as .gz), or a folder of them "
                        f"or of images{_remedy(path)}")
    if path.exists():
        raise DataError(f"data.name: {path} is neither a file nor a folder")
    if config.name.startswith((".", "/", "~")) or path.suffix or config.name.count("/") > 1:
        raise DataError(f"data.name: {path}: no such file or folder (seen from {Path.cwd()})")
    return load_hub(config, reads)


_CLIENTS = TypeAdapter(dict[Literal["clients"], dict[str, str]])


def _by_client(path: Path, config, reads: str, labeled: bool) -> Samples:
    """Read samples of clients whose data are in different places.

    The file has a table `[clients]` with entries NAME = "PATH"; paths are relative to the file. Each client's data are read
    separately.
    """
    try:
        places = conform(_CLIENTS, parse_toml(read_regular(path))).get("clients", {})
    except (OSError, ValueError) as error:
        raise DataError(f'data.name: {path} names no clients: {error}; expected [clients] with lines of NAME = "PATH"') from None
    if not places or (labeled and config.classes is None):
        raise DataError(f"data.name: {path} names " + ("no client" if not places else "clients with data of their own, so the "
                        "run file must say what the classes are (data.classes)"))
    parts = []
    for name, place in places.items():
        found = read(_renamed(config, str(path.parent / Path(place).expanduser())), reads, labeled=labeled)
        if labeled:
            codes, classes = _classes(config, found)
            found = replace(found, labels=[classes[code] for code in codes], classes=None)
        parts.append(replace(found, clients=[name] * len(found.content), notes=tuple(f"{name}: {n}" for n in found.notes)))
    return Samples([c for part in parts for c in part.content], [p for part in parts for p in part.places],
                   [label for part in parts for label in part.labels] if labeled else None,
                   [client for part in parts for client in part.clients], notes=tuple(n for part in parts for n in part.notes))


def _renamed(config, name: str):
    return config.model_copy(update={"name": name})


def _remedy(path: Path) -> str:
    """Return advice on how to convert a file of an unsupported format."""
    suffix = path.suffix.lower()
    if suffix in (".bz2", ".xz", ".zip", ".zst", ".gz"):
        return "; unpack it first"
    if suffix in (".xlsx", ".xls", ".ods"):
        return "; save its sheet as .csv"
    return "; write one JSON object a line (.jsonl)" if suffix == ".json" else ""


def _folder(path: Path, config, reads: str, labeled: bool) -> Samples:
    tree = scan(path)
    tables = sorted((table for table in tree.tables if table.parent == path), key=lambda table: natural(table_stem(table)))
    if tables:
        deeper = [table for table in tree.tables if table.parent != path]
        others = [file for file in tree.others if file.parent == path]
        others += [file for file in tree.images if reads == "text" and file.parent == path]
        notes = [*left_out(deeper, path, "as they lie in a folder below it"),
                 *left_out(others, path, "as they are no tables that can be read")]
    else:
        if labeled and (split := _split_folder(tree, config.part)):
            chosen, notes = split
            inner = _folder(chosen, config, reads, labeled)
            return replace(inner, notes=(*notes, *inner.notes))
        if not tree.images:
            below = f"; tables lie in {tree.tables[0].parent}, name that folder" if tree.tables else ""
            raise DataError(f"data.name: {path} holds neither tables ({', '.join(TABLES)}) nor images "
                            f"({', '.join(IMAGES)}){below}")
        _check_images(path, reads)
        return image_samples(tree, labeled)
    by_table = True
    if labeled and (chosen_tables := _chosen({table: split_name(table_stem(table)) for table in tables}, path, config.part)):
        (tables, said), by_table = chosen_tables, False
        notes += said
    samples = _tables(tables, config, reads, labeled, by_table)
    return replace(samples, notes=(*notes, *samples.notes))


def _check_images(path: Path, reads: str) -> None:
    if reads != "images":
        raise DataError(f"data.name: {path} holds images, but the model reads text")


def _tables(paths: Sequence[Path], config, reads: str, labeled: bool, by_table: bool = True) -> Samples:
    """Read tables. `by_table`: whether each table is a client, if no column names clients."""
    wanted = wanted_columns(config, reads, labeled)
    clients = [table_stem(path) for path in paths] if by_table and len(paths) > 1 else None
    return samples_of([read_table(path, config, wanted, every=not labeled) for path in paths], clients, config, reads, labeled)


# Splits

def _split_folder(tree: Tree, part: str) -> tuple[Path, list[str]] | None:
    """Return the folder of the split `part`, and notes, if the subfolders are splits; otherwise None."""
    if any(len(file.relative_to(tree.root).parts) < 3 for file in tree.images):
        return None     # CLASS/IMAGE
    folders = [folder for folder in tree.folders if folder.parent == tree.root]
    split = _chosen({folder: split_name(folder.name) for folder in folders}, tree.root, part)
    if split is None:
        return None
    chosen, notes = split
    if len(chosen) > 1:
        raise DataError(f"data.name: {' and '.join(map(str, chosen))} hold the same split; name one of them as data.name")
    return chosen[0], notes


def _chosen(named: dict[Path, str | None], root: Path, part: str) -> tuple[list[Path], list[str]] | None:
    """Return the files or folders that hold the split `part`, and a note about the others; None if they are not splits.

    Args:
        named: The split of each file or folder, or None if its name denotes no split.
        root: The folder that contains them.
        part: The requested split.
    """
    splits = sorted({split for split in named.values() if split})
    strange = [path.name for path, split in named.items() if split is None]
    if not splits or (strange and len(splits) == 1):        # a client may well be called test
        return None
    if strange:
        raise DataError(f"data.name: {root} holds splits ({', '.join(splits)}) beside {listed(strange)}; are they splits or "
                        "clients? Keep one kind in a folder, or name the clients in a column (data.client)")
    wanted = SPLITS.get(part.lower(), part)
    if len(splits) == 1:
        return list(named), []
    if wanted not in splits:
        raise DataError(f"data.part: got {part!r}, but {root} holds the splits {', '.join(splits)}")
    others = [path.name for path, split in named.items() if split != wanted]
    return ([path for path, split in named.items() if split == wanted],
            [f"{root}: only the split {wanted!r} is read (data.part), and each client divides it anew; left out: "
             f"{listed(others)}"])
