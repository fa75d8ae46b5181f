"""`Task`: what a task must answer."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """How good an expert is on some samples; None on no samples.

    accuracy: in [0, 1], higher is better: what the server's schedule follows. loss: mean over the units, in nats.
    """

    accuracy: float | None
    loss: float | None


class Task(ABC):
    """A task sees *units*: what is predicted once. A sample has one unit, or several, as an answer has tokens.

    What an expert says about U units is its *opinion*, a tensor (U, K) that holds all that a loss, a score and a mixture
    with another expert's opinion need: class logits, or a few numbers about a token.

    columns: K.
    per_token: whether the units are positions of a sequence: features are then those of each position.
    mixes_opinions: whether `mix` of two opinions says all about the mixture; if not, `mixed_opinion` does.
    trains_head: whether heads hold parameters that are part of an expert.
    shifts: whether numbers (K,) may be added to an opinion, as a class prior is.
    blends_on: what `blend` mixes, "logits" or "probabilities".
    """

    columns: int
    per_token = False
    mixes_opinions = True
    trains_head = True
    shifts = False
    blends_on = "probabilities"

    @abstractmethod
    def new_head(self) -> nn.Module:
        """A new head of an expert; without parameters if the head is frozen."""

    def reset_head(self, head: nn.Module, generator: torch.Generator) -> None:
        """Draws a head's parameters anew."""

    @abstractmethod
    def opinion(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        """(U, K) opinion from features (U, D) of the units and their targets (U, ...), differentiable by the features and
        the head. `targets` serve tasks whose answers are too many to hold them all."""

    @abstractmethod
    def mix(self, weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
        """(U, K) opinion of the mixture of two by weights (U, 2); on: "logits" or "probabilities"."""

    def blend(self, logit: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """(U, K) opinion of the mixture in which the own expert has the weight sigmoid(logit), one () for all units."""
        weight = logit.sigmoid()
        return self.mix(torch.stack([1 - weight, weight]).expand(len(own), 2), shared, own, self.blends_on)

    def mixed_opinion(self, head: nn.Module, shared: Tensor, own: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        """(U, K) opinion of the mixture from both experts' features (U, D), where `mix` cannot say all of it."""
        raise NotImplementedError

    def layer_opinion(self, heads: Mapping[str, nn.Module], shifts: Mapping[str, Tensor | None], features: Tensor,
                      targets: Tensor, weights: Tensor) -> Tensor:
        """(U, K) opinion where the experts were mixed inside the layers; their heads are mixed by weights (U, 2) too."""
        opinions = torch.stack([shifted(self.opinion(heads[e], features, targets), shifts[e]) for e in heads], dim=1)
        return (weights.unsqueeze(-1) * opinions).sum(1)

    @abstractmethod
    def loss(self, opinion: Tensor, targets: Tensor) -> Tensor:
        """() mean loss of an opinion (U, K)."""

    @abstractmethod
    def accuracy(self, opinion: Tensor, targets: Tensor) -> float:
        """Share of the units that are answered right."""

    def right(self, opinion: Tensor, targets: Tensor) -> Tensor:
        """(U,) bool, which units are answered right."""
        raise NotImplementedError

    def score(self, opinion: Tensor, targets: Tensor) -> Score:
        """On no units: none."""
        if len(targets) == 0:
            return Score(None, None)
        return Score(self.accuracy(opinion, targets), float(self.loss(opinion, targets)))

    @abstractmethod
    def confidences(self, opinion: Tensor) -> Tensor:
        """(U, 2) how sure an expert is: what a gate may see beside the features."""

    def zero_shot(self, features: Tensor, targets: Tensor) -> Tensor | None:
        """(U, K) opinion of the foundation model without any training, from its own features; None if it has none."""
        return None

    def details(self, opinions: Mapping[str, Tensor | None], targets: Tensor, samples: Any) -> dict[str, Any]:
        """Further fields of a client's record. opinions: by "personalized", "global", "local" and "zero_shot", about its test
        samples; samples: their data set and `Subset`."""
        return {}

    def head_flops(self, units: int, training: bool) -> int:
        """Operations of a frozen head on so many units; 0 for one that is small."""
        return 0


def shifted(opinion: Tensor, shift: Tensor | None) -> Tensor:
    """An opinion (U, K) with a shift (K,) added, if there is one."""
    return opinion if shift is None else opinion + shift
