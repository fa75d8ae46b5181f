"""Prompts with the answers of other samples, among which a language model is to find each prompt's own."""
from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from .dataset import Dataset
from .inputs import TextInputs
from .subset import Subset


def other_answers(dataset: Dataset, part: Subset, others: int, draw: torch.Generator) -> Tensor | None:
    """Draw for each sample of a subset other samples of it whose answers are different, from its own and from each other.

    Args:
        dataset: The data set, which has answers.
        part: n samples of it.
        others: How many are drawn for each sample.
        draw: Random numbers.

    Returns:
        (n, others) int64 positions in the subset; None if it has no more than `others` different answers.
    """
    texts = [tuple(tokens.tolist()) for tokens in _answers(dataset, part)]
    first_with = {text: place for place, text in reversed(list(enumerate(texts)))}
    if len(first_with) <= others:
        return None
    places = torch.tensor(sorted(first_with.values()))
    return torch.stack([kept[torch.randperm(len(kept), generator=draw)[:others]]
                        for kept in (places[places != first_with[text]] for text in texts)])


def with_answers(dataset: Dataset, part: Subset, answers: Tensor, max_tokens: int) -> Dataset:
    """Return a data set of prompts with answers of other samples.

    A prompt that is too long with an answer loses its beginning, as one with its own answer does.

    Args:
        dataset: The data set.
        part: n samples of it.
        answers: (n, m) int64, for each sample the positions in the subset of those whose answers it is given.
        max_tokens: Most tokens of a prompt with an answer.

    Returns:
        n * m samples, those of a prompt one after the other.
    """
    said, prompts = _answers(dataset, part), _prompts(dataset, part)
    pairs = [(prompt[-(max_tokens - len(said[other])):], said[other]) for prompt, row in zip(prompts, answers.tolist()) for other in row]
    lengths = torch.tensor([[len(prompt), len(answer)] for prompt, answer in pairs])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.sum(1).cumsum(0)])
    ids = torch.cat(list(chain.from_iterable(pairs)))
    labels = dataset.labels[part.indices].repeat_interleave(answers.shape[1])
    return replace(dataset, inputs=TextInputs({"input_ids": ids}, offsets, dataset.texts.pad_values), labels=labels, groups=None,
                   answers=lengths[:, 0], answer_bytes=None)


def _answers(dataset: Dataset, part: Subset) -> tuple[Tensor, ...]:
    """Return the tokens of each answer."""
    return dataset.targets(part.indices).split(dataset.units(part.indices).tolist())


def _prompts(dataset: Dataset, part: Subset) -> list[Tensor]:
    """Return the tokens before each answer."""
    ids, firsts = dataset.texts.fields["input_ids"], dataset.texts.offsets[part.indices].tolist()
    return [ids[first:first + count] for first, count in zip(firsts, dataset.answers[part.indices].tolist())]
