"""What every loader returns: labelled samples, with no client in them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .inputs import DataError, ImageInputs, TextInputs


@dataclass(frozen=True)
class Dataset:
    """A single-label classification data set.

    inputs:      n samples, see `TextInputs` and `ImageInputs`.
    labels:      (n,) int64 in [0, len(classes)).
    prompts:     for each class, texts that describe it (the zero-shot text head), or None.
    groups:      (n,) int64 natural group of each sample (its domain, its writer), or None.
    fingerprint: sha256 (hex) of what the model sees (tokens or pixels), labels and groups; the key of caches.
    """

    name: str
    inputs: TextInputs | ImageInputs
    labels: Tensor
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None
    groups: Tensor | None
    group_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return self.labels.numel()


def make_dataset(
    name: str,
    inputs: TextInputs | ImageInputs,
    labels: Tensor,
    classes: tuple[str, ...],
    *,
    prompts: tuple[tuple[str, ...], ...] | None = None,
    groups: Tensor | None = None,
    group_names: tuple[str, ...] = (),
) -> Dataset:
    """Check that the parts fit each other (DataError if not), fingerprint them, and put them together."""
    _check_codes(name, "label", labels, len(inputs), len(classes))
    if groups is not None:
        _check_codes(name, "group", groups, len(inputs), len(group_names))
    if prompts is not None and (len(prompts) != len(classes) or not all(prompts)):
        raise DataError(f"{name}: prompts are needed for each of the {len(classes)} classes, got {prompts!r}")

    digest = hashlib.sha256(inputs.digest())
    digest.update(labels.numpy().tobytes())
    if groups is not None:
        digest.update(groups.numpy().tobytes())
    return Dataset(name, inputs, labels, classes, prompts, groups, group_names, digest.hexdigest())


def _check_codes(name: str, what: str, codes: Tensor, samples: int, count: int) -> None:
    if codes.dtype != torch.int64 or codes.shape != (samples,):
        raise DataError(
            f"{name}: {what}s are {codes.dtype} of shape {tuple(codes.shape)}, "
            f"expected torch.int64 of shape ({samples},)"
        )
    bad = (codes < 0) | (codes >= count)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise DataError(f"{name}: sample {first} has {what} {int(codes[first])}, expected 0..{count - 1}")


def stratified_sample(strata: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `total` of n samples so that each stratum keeps its share (largest remainders; exact in sum).

    strata: (n,) integer code of each sample's stratum. Returns sorted indices, (min(total, n),) int64.
    """
    if total >= len(strata):
        return np.arange(len(strata))
    codes, counts = np.unique(strata, return_counts=True)
    quota = counts * (total / len(strata))
    take = np.floor(quota).astype(int)
    by_remainder = np.argsort(-(quota - take), kind="stable")
    take[by_remainder[: total - take.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(strata == code))[:k] for code, k in zip(codes, take)]
    return np.sort(np.concatenate(drawn))


def strata_of(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """One code per (group, class)."""
    return labels if groups is None else groups * (labels.max(initial=0) + 1) + labels
