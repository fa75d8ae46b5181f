"""Fashion-MNIST: 70,000 images of clothing, 28 x 28, ten classes (Xiao, Rasul & Vollgraf, arXiv 1708.07747; MIT license).

The first 30,000 images are the *public half*, on which `fedms pretrain` trains the foundation model without their
labels. Clients never see it: what `load` returns are the other 40,000.

The files are those of the Debian package dataset-fashion-mnist: from /usr/share where it is installed, else fetched
with apt-get, which needs no root, verified and unpacked into `cache_dir()` once. `data.path` names a folder with the
same four files, or with others of their format.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from fedms.errors import DataError

from .cache import cache_dir, filling_cache, new_folder, scratch_folder, verify
from .dataset import Dataset, make_dataset, stratified_sample
from .debian import unpack_packages
from .images import gray_inputs
from .programs import FetchError

SPACE = 95_000_000      # bytes of the package and of what is unpacked of it, roughly
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
PUBLIC = 30_000


def load(config, model, seed: int) -> Dataset:
    """Load the images of the clients, see `fedms.data.load`.

    Args:
        config: The [data] table of the run file, for `path` and `max_samples`.
    """
    folder, images, labels = read(config.path)
    images, labels = images[PUBLIC:], labels[PUBLIC:]
    if config.max_samples is not None:
        kept = stratified_sample(labels, config.max_samples, np.random.default_rng(seed))
        images, labels = images[kept], labels[kept]
    return make_dataset("fashion-mnist", gray_inputs(pixels(images), model, str(folder)), torch.from_numpy(labels), CLASSES)


def status() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports whether the images are here or can be fetched."""
    if INSTALLED.exists() or (cache_dir() / "fashion-mnist").exists():
        return "ok", f"whole in {default_folder()}"
    if shutil.which("apt-get") and shutil.which("dpkg"):
        return "note", "not fetched yet; the first run that needs it does that with apt-get"
    return "note", ("not fetched yet, and there is no apt-get to fetch it with: put its four files into a folder and name it by "
                    "data.path")


def public_half(path: str | None = None) -> torch.Tensor:
    """Return the images to pretrain on: (30000, 1, 28, 28) float32 in [0, 1]. `path` is as `data.path`."""
    return pixels(read(path)[1][:PUBLIC])


def pixels(images: np.ndarray) -> torch.Tensor:
    """Return images (n, 28, 28) uint8 as (n, 1, 28, 28) float32 in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 255.0)[:, None]


def read(path: str | None) -> tuple[Path, np.ndarray, np.ndarray]:
    """Return the folder, all images (n, 28, 28) uint8 and their labels (n,) int64."""
    folder = Path(path) if path is not None else default_folder()
    image_parts, label_parts = [], []
    for part in ("train", "t10k"):
        image_parts.append(read_idx(_file(folder, f"{part}-images-idx3-ubyte"), 3))
        label_parts.append(read_idx(_file(folder, f"{part}-labels-idx1-ubyte"), 1))
        if image_parts[-1].shape != (len(label_parts[-1]), SIDE, SIDE):
            raise DataError(
                f"{folder}: the {part} files hold images of shape {image_parts[-1].shape} and {len(label_parts[-1])} "
                f"labels, expected one label an image of {SIDE} x {SIDE} pixels"
            )
    images, labels = np.concatenate(image_parts), np.concatenate(label_parts)
    if len(labels) <= PUBLIC:
        raise DataError(f"{folder}: {len(labels)} images; the first {PUBLIC} are for pretraining, none is left")
    return folder, images, labels.astype(np.int64)


def _file(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.exists():
            return path
    raise DataError(
        f"data.path: {folder} has no file {stem} or {stem}.gz; expected Fashion-MNIST's four files, as in the Debian "
        f"package {PACKAGE}, or unset data.path to have it fetched"
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format, gzipped or not.

    The file has two zero bytes, 8 (the type), the number of dimensions, their sizes as big-endian int32, and the values.

    Raises:
        DataError: If the file does not have this form.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); replace it by a whole copy") from error
    header = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:header], ">i4") if len(data) >= header else np.zeros(0)
    if data[:4] != bytes((0, 0, 8, dimensions)) or (shape < 0).any() or len(data) != header + int(np.prod(shape)):
        raise DataError(
            f"{path}: not a whole IDX file of unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)} "
            f"({len(data)} bytes, which begin with {data[:4].hex()}); replace it by a whole copy"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def default_folder() -> Path:
    """Return the folder of the published files. They are fetched if necessary, and verified."""
    if all((INSTALLED / name).exists() for name in FILES):
        return INSTALLED
    folder = cache_dir() / "fashion-mnist"
    if not folder.exists():
        _fetch(folder)
    for name, digest in FILES.items():
        verify(folder / name, digest, f"delete the folder {folder} and run again")
    return folder


def _fetch(folder: Path) -> None:
    """Download the package with apt-get, which any user may do, and unpack it with dpkg. Nothing is installed."""
    with filling_cache(SPACE), scratch_folder() as scratch:
        try:
            unpack_packages([PACKAGE], scratch)
        except FetchError as error:
            raise DataError(
                f"Fashion-MNIST is not here and could not be fetched: {error}\nEither make "
                f"`apt-get download {PACKAGE}` work (Debian, Ubuntu; `apt-get update` first), or put the four files "
                f"{', '.join(FILES)} into a folder and name it by --set data.path=FOLDER"
            ) from error
        with new_folder(folder) as new:
            for name, digest in FILES.items():
                file = scratch / INSTALLED.relative_to("/") / name
                verify(file, digest, "the package holds another version of the data; set data.path")
                (new / name).write_bytes(file.read_bytes())
