"""What every loader returns: labeled samples, with no client in them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .inputs import DataError, ImageInputs, TextInputs
from .samples import counted

MOST_NAMED = 10     # classes or groups that a description names


@dataclass(frozen=True)
class Dataset:
    """A single-label classification data set.

    inputs:      n samples, see `TextInputs` and `ImageInputs`.
    labels:      (n,) int64 in [0, len(classes)).
    prompts:     for each class, texts that describe it (the zero-shot text head), or None.
    groups:      (n,) int64 natural group of each sample (its domain, its writer), or None.
    fingerprint: sha256 (hex) of what the model sees (tokens or pixels), of labels and groups and of their names; the key
                 of caches, and what tells other data of the same name apart.
    notes:       a line for each thing that the user should know of how the data were read.
    """

    name: str
    inputs: TextInputs | ImageInputs
    labels: Tensor
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None
    groups: Tensor | None
    group_names: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

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
    notes: tuple[str, ...] = (),
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
    digest.update(json.dumps([classes, group_names]).encode())
    return Dataset(name, inputs, labels, classes, prompts, groups, group_names, digest.hexdigest(), notes)


def describe(dataset: Dataset) -> str:
    """How many samples, classes and groups there are, and how large they are, in one line."""
    parts = [f"{dataset.name}: {counted(len(dataset), 'sample')}"]
    for noun, names, codes in (("class", dataset.classes, dataset.labels), ("group", dataset.group_names, dataset.groups)):
        if codes is not None:
            sizes = torch.bincount(codes, minlength=len(names)).tolist()
            shown = ", ".join(f"{name} ({size:,})" for name, size in list(zip(names, sizes))[:MOST_NAMED])
            more = f", and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            parts.append(f"{counted(len(names), noun)} of {min(sizes):,} to {max(sizes):,} samples: {shown}{more}")
    return "; ".join(parts)


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
    """Draw `total` of n samples so that every stratum keeps its share, rounded up or down.

    This is systematic sampling: the samples are put in an order that keeps strata together and is random otherwise, and
    every (n / total)-th is drawn from a random start on. So each sample is equally likely to be drawn, and what is
    rounded up is chosen at random, not by its place in the data.

    Args:
        strata: (n,) or (n, levels) integer codes, the outermost level first, as `strata_of` gives them. The share holds
            at each level: of a client's samples, and of each class of a client.

    Returns:
        Sorted indices, (min(total, n),) int64.
    """
    n = len(strata)
    if total >= n:
        return np.arange(n)
    levels = strata.reshape(n, -1)
    keys = [rng.random(n)]
    for depth in range(levels.shape[1], 0, -1):
        _, code = np.unique(levels[:, :depth], axis=0, return_inverse=True)
        keys.append(rng.permutation(code.max() + 1)[code.reshape(-1)])
    return np.sort(np.lexsort(keys)[evenly_spaced(n, total, rng)])


def evenly_spaced(n: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """`total` <= n distinct positions in range(n), evenly spaced from a random start on, ascending."""
    return ((np.arange(total) + rng.random()) * n / max(total, 1)).astype(np.int64).clip(max=n - 1)


def strata_of(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """(n, 1) or (n, 2) int64: group, where there are groups, and class of each sample."""
    return labels[:, None] if groups is None else np.stack([groups, labels], axis=1)
