"""What every loader returns: labeled samples, with no client in them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedms.errors import DataError

from .inputs import ImageInputs, TextInputs
from .samples import counted

MOST_NAMED = 10     # classes or groups that a description names


@dataclass(frozen=True)
class Dataset:
    """A data set. By default each sample has a single label.

    Attributes:
        inputs: n samples, see `TextInputs` and `ImageInputs`.
        labels: (n,) int64 in [0, len(classes)).
        prompts: For each class, texts that describe it (for the zero-shot text head), or None.
        groups: (n,) int64, the natural group of each sample (its domain, its writer), or None.
        fingerprint: SHA-256, in hexadecimal, of what the model sees (tokens or pixels), of labels, groups and their names. It is
            the key of caches, and tells other data with the same name apart.
        notes: A line for each thing that the user should know about how the data were read.
        answers: (n,) int64, for causal language models: the first token of each sample's answer; labels are then the categories of
            the samples. None if the label of a sample is its answer.
        answer_bytes: (n,) int64, bytes of each answer's text in UTF-8, or None.
        values: (n, ...), the answers of tasks of other kinds, or None.
    """

    name: str
    inputs: TextInputs | ImageInputs
    labels: Tensor
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None
    groups: Tensor | None
    group_names: tuple[str, ...]
    fingerprint: str
    answers: Tensor | None = None
    answer_bytes: Tensor | None = None
    values: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.labels.numel()

    @property
    def texts(self) -> TextInputs:
        """The inputs of a data set of texts. Raises TypeError if it holds images."""
        if not isinstance(self.inputs, TextInputs):
            raise TypeError(f"the data set {self.name} holds images, expected texts")
        return self.inputs

    def units(self, indices: Tensor) -> Tensor:
        """Return how many things are to be answered in each of the samples `indices` (B,), (B,) int64: 1, or an answer's tokens."""
        return torch.ones_like(indices) if self.answers is None else self.inputs.lengths[indices] - self.answers[indices]

    def targets(self, indices: Tensor) -> Tensor:
        """Return the correct answers (U, ...) of the samples `indices` (B,), one sample after the other."""
        if self.answers is None:
            return (self.labels if self.values is None else self.values)[indices]
        ends = self.texts.offsets[1:][indices]
        counts = self.units(indices)
        firsts = torch.repeat_interleave(ends - counts.cumsum(0), counts)
        return self.texts.fields["input_ids"][firsts + torch.arange(int(counts.sum()))]

    def at_units(self, indices: Tensor, width: int) -> Tensor:
        """Return the positions, (B, width) bool, from which the tokens of the answers are predicted.

        The sequences are padded to `width` on the right.
        """
        places = torch.arange(width)
        return (places >= self.answers[indices, None] - 1) & (places < self.inputs.lengths[indices, None] - 1)


def make_dataset(
    name: str,
    inputs: TextInputs | ImageInputs,
    labels: Tensor,
    classes: tuple[str, ...],
    *,
    prompts: tuple[tuple[str, ...], ...] | None = None,
    groups: Tensor | None = None,
    group_names: tuple[str, ...] = (),
    answers: Tensor | None = None,
    answer_bytes: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Check that the parts fit each other (DataError if not), fingerprint them, and put them together."""
    _check_codes(name, "label", labels, len(inputs), len(classes))
    if groups is not None:
        _check_codes(name, "group", groups, len(inputs), len(group_names))
    if prompts is not None and (len(prompts) != len(classes) or not all(prompts)):
        raise DataError(f"{name}: prompts are needed for each of the {len(classes)} classes, got {prompts!r}")
    if answers is not None:
        _check_answers(name, inputs, answers, answer_bytes)

    digest = hashlib.sha256(inputs.digest())
    digest.update(labels.numpy().tobytes())
    if groups is not None:
        digest.update(groups.numpy().tobytes())
    if answers is not None:
        digest.update(answers.numpy().tobytes())
    digest.update(json.dumps([classes, group_names]).encode())
    return Dataset(name, inputs, labels, classes, prompts, groups, group_names, digest.hexdigest(), answers, answer_bytes,
                   notes=notes)


def describe(dataset: Dataset) -> str:
    """Return one line with the numbers of samples, classes and groups; for a language model with tokens, and categories for classes."""
    parts = [f"{dataset.name}: {counted(len(dataset), 'sample')}"]
    speaks = dataset.answers is not None
    if speaks:
        learned = int(dataset.units(torch.arange(len(dataset))).sum())
        parts[0] += f" of {counted(int(dataset.inputs.lengths.sum()), 'token')}, of which {learned:,} are learned"
    kinds = (("category" if speaks else "class", dataset.classes, dataset.labels), ("group", dataset.group_names, dataset.groups))
    for noun, names, codes in kinds:
        if codes is not None and (len(names) > 1 or not speaks):
            sizes = torch.bincount(codes, minlength=len(names)).tolist()
            shown = ", ".join(f"{name} ({size:,})" for name, size in list(zip(names, sizes))[:MOST_NAMED])
            more = f", and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            least, most = min(sizes), counted(max(sizes), "sample")
            spread = f"{least:,} to {most}" if least < max(sizes) else f"{most} each"
            parts.append(f"{counted(len(names), noun)} of {spread}: {shown}{more}")
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
    """Return `total` <= n distinct positions in range(n), ascending and evenly spaced from a random start on."""
    return ((np.arange(total) + rng.random()) * n / max(total, 1)).astype(np.int64).clip(max=n - 1)


def strata_of(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Return the class of each sample, and its group before it if there are groups, (n, 1) or (n, 2) int64."""
    return labels[:, None] if groups is None else np.stack([groups, labels], axis=1)


def _check_answers(name: str, inputs: TextInputs | ImageInputs, answers: Tensor, answer_bytes: Tensor | None) -> None:
    """Raise a DataError unless the samples are texts, and each has a token before its answer and one of the answer."""
    for what, numbers in (("answers", answers), ("answer_bytes", answer_bytes)):
        if numbers is not None and (numbers.dtype != torch.int64 or numbers.shape != (len(inputs),)):
            raise DataError(f"{name}: {what} are {numbers.dtype} of shape {tuple(numbers.shape)}, expected int64 ({len(inputs)},)")
    if not isinstance(inputs, TextInputs):
        raise DataError(f"{name}: answers belong to texts, and it holds images")
    wrong = (answers < 1) | (answers >= inputs.lengths)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise DataError(f"{name}: the answer of sample {first} begins at token {int(answers[first])}, expected 1 to "
                        f"{int(inputs.lengths[first]) - 1}")
