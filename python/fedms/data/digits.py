"""Handwritten digits, 8 x 8 pixels, 1,797 images: shipped with scikit-learn, so nothing is downloaded.

`data.path` may name a .npz file of one's own with `images` (n, 8, 8), values 0..16, and `labels` (n,), 0..9.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from fedms.errors import DataError

from .dataset import Dataset, make_dataset, stratified_sample
from .images import gray_inputs
from .inputs import ImageInputs


def load(config, model, seed: int) -> Dataset:
    """Load the digits, see `fedms.data.load`.

    A model that was pretrained on digits has seen the public half, so its clients have the other half.

    Args:
        config: The [data] table of the run file, for `path` and `max_samples`.
    """
    source, images, labels = _read(config.path)
    pixels = torch.from_numpy(images.astype(np.float32) / 16.0)[:, None]
    labels = labels.astype(np.int64)
    ImageInputs(pixels, model.image_tokens, source)  # all images are checked, used or not
    kept = np.arange(_public(len(labels)) if model.pretrained_on == "digits" else 0, len(labels))
    if config.max_samples is not None:
        kept = kept[stratified_sample(labels[kept], config.max_samples, np.random.default_rng(seed))]
    inputs, labels = gray_inputs(pixels[kept], model, source), labels[kept]
    return make_dataset("digits", inputs, torch.from_numpy(labels), tuple(str(digit) for digit in range(10)))


def status() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports where the images come from."""
    _read(None)
    return "ok", "in scikit-learn"


def public_half(path: str | None = None) -> torch.Tensor:
    """Return the images to pretrain on, the first half: (898, 1, 8, 8) float32 in [0, 1]. `path` is as `data.path`."""
    images = _read(path)[1]
    return torch.from_numpy(images[: _public(len(images))].astype(np.float32) / 16.0)[:, None]


def _public(samples: int) -> int:
    return samples // 2


def _read(path: str | None) -> tuple[str, np.ndarray, np.ndarray]:
    """Return where the images come from, the images (n, 8, 8) with values 0 to 16, and the labels (n,)."""
    if path is not None:
        return str(path), *_read_npz(Path(path))
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: scikit-learn is missing; pip install 'fedms[train]'") from error
    digits = load_digits()
    return "scikit-learn's digits", digits.images, digits.target


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: expected a .npz file with the arrays `images` and `labels` ({error})"
        ) from error
    if images.ndim != 3 or images.shape[1:] != (8, 8) or images.dtype.kind not in "uif":
        raise DataError(
            f"{path}: images are {images.dtype} of shape {images.shape}, expected numbers (n, 8, 8)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "ui":
        raise DataError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape}, expected integers {images.shape[:1]}"
        )
    return images, labels
