"""Run the streams of the global and the local expert as one batch above the prefix that they share."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.tasks.base import shifted
from fedms.training.expert_model import EXPERTS, ExpertModel
from fedms_ext import budget, segmented


@torch.no_grad()
def both_opinions(model: ExpertModel, part: Subset) -> tuple[Tensor, Tensor]:
    """Return `opinions` of the global and of the local expert.

    If both start from the same prefix, the two streams run as one batch above it: each layer computes one frozen product, and
    each half of the rows uses its own expert.
    """
    if not share_prefix(model):
        return model.opinions("global", part), model.opinions("local", part)

    def say(rows: Tensor, halves: Sequence[Tensor]) -> Tensor:
        return torch.cat(_opinions_of(model, halves, model.targets(part, rows)), dim=1)

    shared, own = _side_by_side(model, part, say, len(EXPERTS) * model.task.columns).chunk(len(EXPERTS), dim=1)
    return shared, own


# Returns the weights (B, 2) of the units at positions (B,) of a subset, from the opinions (B, K) of the global and the local expert.
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def mixed_opinions(model: ExpertModel, part: Subset, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for a whole subset the complete opinion (U, K) of the mixture, the opinions of the global and of the local expert, and
    the weights (U, 2). It is for tasks whose `Task.mix` cannot compute all of the first from the second and the third; a pass
    through the model serves them all."""
    task = model.task

    def say(rows: Tensor, halves: Sequence[Tensor]) -> Tensor:
        targets = model.targets(part, rows)
        shared, own = _opinions_of(model, halves, targets)
        weights = weigh(model.units(part, rows), shared, own)
        return torch.cat([task.mixed_opinion(model.heads["global"], halves[0], halves[1], weights, targets), shared, own, weights], dim=1)

    mixed, shared, own, weights = _side_by_side(model, part, say, 3 * task.columns + len(EXPERTS)).split(
        [task.columns] * 3 + [len(EXPERTS)], dim=1)
    return mixed, shared, own, weights


def _opinions_of(model: ExpertModel, halves: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """Return each expert's opinion (B, K) from its features (B, D)."""
    return [shifted(model.task.opinion(model.heads[e], own, targets), model.shifts[e]) for e, own in zip(EXPERTS, halves)]


def share_prefix(model: ExpertModel) -> bool:
    """Return whether both experts are equal up to the end of the local expert's constant prefix."""
    keys = []
    for expert in EXPERTS:
        with model.stream(expert) as stream:
            keys.append((stream.prefix_depth, stream.prefix_hash))
    return keys[0] == keys[1]


def _side_by_side(model: ExpertModel, part: Subset, say: Callable[[Tensor, Sequence[Tensor]], Tensor], width: int) -> Tensor:
    """Apply `say` to both experts' features of the same rows, and return the results for a whole subset as (U, width)."""
    if not share_prefix(model):
        def one_by_one(rows: Tensor) -> Tensor:
            halves = []
            for expert in EXPERTS:
                with model.stream(expert) as stream:
                    halves.append(stream.features(part, rows))
            return say(rows, halves)
        return model.in_chunks(part, one_by_one, width)
    with model.stream("local") as stream:
        prefix = stream.prefix(part) if stream.keeps and len(part) else None
        depth = stream.prefix_depth
    with model.stream("streams") as stream:
        with segmented(model.layers, (1, 1)):    # half of the rows with each expert
            costs = budget.block_costs(model.foundation.module)
        both = replace(stream, costs=costs, prefix_depth=depth)

    def start(rows: Tensor) -> Tensor | None:
        if prefix is not None:
            return prefix.pad(rows).to(model.device)
        with model.stream("local") as stream:
            return stream.hidden(part, rows)

    def compute(rows: Tensor) -> Tensor:
        hidden = start(rows)
        with model.stream("streams"), segmented(model.layers, (len(rows), len(rows))):
            batch = both.read(part, rows.repeat(len(EXPERTS)), None if hidden is None else torch.cat([hidden, hidden]))
            features = both.features_of(batch)
        return say(rows, features.chunk(len(EXPERTS)))
    return model.in_chunks(part, compute, width)
