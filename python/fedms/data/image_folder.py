"""Read folders of images: CLASS/IMAGE or CLIENT/CLASS/IMAGE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedms.errors import DataError

from .images import IMAGES
from .labels import natural
from .samples import Samples, left_out, normal, split_name
from .tables import table_kind


@dataclass(frozen=True)
class Tree:
    """The sorted contents of a folder. Links are followed; names that begin with a dot are skipped."""

    root: Path
    folders: tuple[Path, ...]
    images: tuple[Path, ...]
    tables: tuple[Path, ...]
    others: tuple[Path, ...]


def scan(root: Path) -> Tree:
    """Scan a folder. Raise a DataError if a folder cannot be listed, or is a link to a folder that contains it."""
    def refuse(error: OSError) -> None:
        raise DataError(f"data.name: {error.filename}: cannot be listed: {error.strerror}") from error

    folders: list[Path] = []
    files: list[Path] = []
    for name, below, here in os.walk(root, followlinks=True, onerror=refuse):
        below[:] = sorted(folder for folder in below if not folder.startswith("."))
        path = Path(name)
        for folder in below:
            real = (path / folder).resolve()
            if real == root.resolve() or real in path.resolve().parents or real == path.resolve():
                raise DataError(f"data.name: {path / folder} is a link to a folder above it; remove it")
        folders += [path / folder for folder in below]
        files += [path / file for file in here if not file.startswith(".")]
    files.sort()
    images = tuple(file for file in files if is_image(file))
    tables = tuple(file for file in files if table_kind(file))
    return Tree(root, tuple(folders), images, tables, tuple(f for f in files if not is_image(f) and not table_kind(f)))


def is_image(path: Path) -> bool:
    """Return whether the name of a file is that of an image."""
    return path.suffix.lower() in IMAGES


def image_samples(tree: Tree, labeled: bool) -> Samples:
    """Return the images of a folder, whose classes and clients are the names of their parent folders."""
    root, files = tree.root, tree.images
    places = [str(path) for path in files]
    notes = tuple(left_out((*tree.tables, *tree.others), root, "as they are no images that can be read"))
    if not labeled:
        return Samples(list(files), places, None, None, notes=notes)
    depths = {len(path.relative_to(root).parts): path for path in files}
    if len(depths) > 1 or not depths.keys() <= {2, 3}:
        shown = "; ".join(str(path) for path in list(depths.values())[:2])
        raise DataError(f"data.name: {root}: expected CLASS/IMAGE or CLIENT/CLASS/IMAGE throughout, got {shown}")
    by_client = 3 in depths
    labels = [normal(path.parent.name) for path in files]
    _refuse_empty(tree, labels, 2 if by_client else 1)
    if len(splits := {split_name(label) for label in labels}) > 1 and None not in splits:
        raise DataError(f"data.name: {root}: the folders around the images are splits ({', '.join(sorted(set(labels)))}), "
                        "where classes are expected; bring them into the form SPLIT/CLASS/IMAGE or CLASS/IMAGE")
    clients = [normal(path.parent.parent.name) for path in files] if by_client else None
    return Samples(list(files), places, labels, clients, notes=notes)


def _refuse_empty(tree: Tree, labels: Sequence[str], depth: int) -> None:
    classes = {normal(path.name) for path in tree.folders if len(path.relative_to(tree.root).parts) == depth}
    if empty := sorted(classes - set(labels), key=natural):
        raise DataError(f"data.name: {tree.root}: class {empty[0]!r} is empty: its folder holds no image ({', '.join(IMAGES)})")
