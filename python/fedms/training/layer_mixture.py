"""The mixture of both experts inside the layers: one stream, in which each layer weights its pairs for each sample or token."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.training.expert_model import ExpertModel
from fedms.training.streams import Batch


def layer_mixture(model: ExpertModel, part: Subset, rows: Tensor, weights: Tensor) -> Tensor:
    """Return the opinion (U, K) with the experts mixed inside each trained layer by weights (U, 2), for the rows (B,) of a subset.

    Where the local pair is frozen, a layer holds the same pair twice; the global one alone is applied there, with weight 1.
    """
    with model.stream("mixture") as stream:
        batch = stream.read(part, rows)
    return layer_mixture_of(model, batch, model.targets(part, rows), model.shifts, weights, units_of_positions(model, part, rows))


def layer_mixture_of(model: ExpertModel, batch: Batch, targets: Tensor, shifts: Mapping[str, Tensor | None], weights: Tensor,
                     places: Tensor | None) -> Tensor:
    """Compute `layer_mixture` of a batch.

    Args:
        model: The model.
        batch: A batch of the stream "mixture".
        targets: (U, ...) targets.
        shifts: What is added to the opinion of each expert, (K,) or None.
        weights: (U, 2) weights of the global and the local expert.
        places: See `units_of_positions`.
    """
    mixed = [layer for layer in model.layers.values() if layer.block in model.order[:model.depths["local"][0]]]
    with model.stream("mixture") as stream:
        features = stream.features_of(batch, (mixed, weights if places is None else weights[places]))
    return model.task.layer_opinion(dict(model.heads.items()), shifts, features, targets, weights)


def units_of_positions(model: ExpertModel, part: Subset, rows: Tensor) -> Tensor | None:
    """Return the number of the unit whose weights a layer takes at each position, (B, T) int64; None if a sample is a unit.

    The positions before an answer take the weights of its first token.
    """
    if not model.task.per_token:
        return None
    indices = part.indices[rows]
    lengths, counts = model.dataset.inputs.lengths[indices], model.dataset.units(indices)
    places = torch.arange(int(lengths.max())) - (lengths - counts - 1)[:, None]
    of_sample = places.clamp_min(0).minimum(counts[:, None] - 1)
    return (of_sample + (counts.cumsum(0) - counts)[:, None]).to(model.device)


@torch.no_grad()
def all_layer_mixture(model: ExpertModel, part: Subset, weights: Tensor) -> Tensor:
    """Return the opinion (U, K) of `layer_mixture` for a whole subset, with weights (U, 2)."""
    return model.in_chunks(part, lambda rows: layer_mixture(model, part, rows, weights[model.units(part, rows)]), model.task.columns)
