"""Handwritten digits, 8 x 8 pixels, 1,797 images: shipped with scikit-learn, so nothing is downloaded.

`data.path` may name a .npz file of one's own with `images` (n, 8, 8), values 0..16, and `labels` (n,), 0..9.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset, make_dataset, stratified_sample
from .inputs import DataError, ImageInputs


def load(config, model, seed: int) -> Dataset:
    """config: the run file's [data] table (path, max_samples). See `fedms.data.load`."""
    if config.path is not None:
        source = str(config.path)
        images, labels = _read_npz(Path(config.path))
    else:
        source = "scikit-learn's digits"
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("digits: scikit-learn is missing; pip install 'fedms[train]'") from error
        digits = load_digits()
        images, labels = digits.images, digits.target

    pixels = torch.from_numpy(images.astype(np.float32) / 16.0)[:, None]
    labels = labels.astype(np.int64)
    inputs = ImageInputs(pixels, model.image_tokens, source)  # all images are checked, used or not
    if model.pixel_shape != pixels.shape[1:]:
        raise DataError(f"data.name: the digits are {tuple(pixels.shape[1:])}, but model.id {model.name!r} reads images of "
                        f"{tuple(model.pixel_shape)}; use vit-digits, or save the digits as a folder of images")
    if config.max_samples is not None:
        kept = stratified_sample(labels, config.max_samples, np.random.default_rng(seed))
        inputs, labels = ImageInputs(pixels[kept], model.image_tokens, source), labels[kept]
    return make_dataset("digits", inputs, torch.from_numpy(labels), tuple(str(digit) for digit in range(10)))


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
