"""`Task`: the interface of a task."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """The quality of an expert on some samples. Both values are None without samples.

    Attributes:
        accuracy: In [0, 1], higher is better. The server's activation schedule uses it.
        loss: Mean over the units, in nats.
    """

    accuracy: float | None
    loss: float | None


class Task(ABC):
    """What experts predict, and how predictions are scored and mixed.

    A *unit* is what is predicted once. A sample has one unit, or several, as an answer has tokens. The *opinion* of an expert about
    U units is a tensor (U, K) with all that a loss, a score and a mixture with another expert's opinion need: class logits, or a
    few numbers about a token.

    Attributes:
        columns: K.
        per_token: Whether units are positions of a sequence; features are then those of each position.
        mixes_opinions: Whether `mix` of two opinions gives the complete opinion of the mixture. Otherwise `mixed_opinion` does.
        trains_head: Whether heads have parameters that are a part of an expert.
        shifts: Whether numbers (K,) may be added to an opinion, such as a class prior.
        blends_on: What `blend` mixes, "logits" or "probabilities".
    """

    columns: int
    per_token = False
    mixes_opinions = True
    trains_head = True
    shifts = False
    blends_on = "probabilities"

    @abstractmethod
    def new_head(self) -> nn.Module:
        """Return a new head for an expert, without parameters if heads are frozen."""

    def reset_head(self, head: nn.Module, generator: torch.Generator) -> None:
        """Initialize the parameters of a head again."""

    @abstractmethod
    def opinion(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        """Return the opinion (U, K) for features (U, D), differentiable by the features and by the head.

        Tasks with very many possible answers use the targets (U, ...) to avoid an opinion about each answer.
        """

    @abstractmethod
    def mix(self, weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
        """Mix two opinions with weights (U, 2) on "logits" or "probabilities", and return the opinion (U, K)."""

    def blend(self, logit: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """Mix two opinions with the weight sigmoid(logit) for the own expert; logit () is the same for all units."""
        weight = logit.sigmoid()
        return self.mix(torch.stack([1 - weight, weight]).expand(len(own), 2), shared, own, self.blends_on)

    def mixed_opinion(self, head: nn.Module, shared: Tensor, own: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        """Return the opinion (U, K) of a mixture from both experts' features (U, D), if `mixes_opinions` is False."""
        raise NotImplementedError

    def layer_opinion(self, heads: Mapping[str, nn.Module], shifts: Mapping[str, Tensor | None], features: Tensor,
                      targets: Tensor, weights: Tensor) -> Tensor:
        """Return the opinion (U, K) for experts that were mixed inside the layers; their heads are mixed by weights (U, 2)."""
        opinions = torch.stack([shifted(self.opinion(heads[e], features, targets), shifts[e]) for e in heads], dim=1)
        return (weights.unsqueeze(-1) * opinions).sum(1)

    @abstractmethod
    def loss(self, opinion: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss () of an opinion (U, K)."""

    @abstractmethod
    def accuracy(self, opinion: Tensor, targets: Tensor) -> float:
        """Return the fraction of units with a right answer."""

    def right(self, opinion: Tensor, targets: Tensor) -> Tensor:
        """Return for each unit whether its answer is right, (U,) bool."""
        raise NotImplementedError

    def score(self, opinion: Tensor, targets: Tensor) -> Score:
        """Return the score of an opinion; without units both of its values are None."""
        if len(targets) == 0:
            return Score(None, None)
        return Score(self.accuracy(opinion, targets), float(self.loss(opinion, targets)))

    @abstractmethod
    def confidences(self, opinion: Tensor) -> Tensor:
        """Return two measures of an expert's confidence, (U, 2), as further inputs of a gate."""

    def zero_shot(self, features: Tensor, targets: Tensor) -> Tensor | None:
        """Return the opinion (U, K) of the untrained foundation model for its features, or None if it has none."""
        return None

    def details(self, opinions: Mapping[str, Tensor | None], targets: Tensor, samples: Any) -> dict[str, Any]:
        """Return further fields for the record of a client.

        Args:
            opinions: Opinions about its test samples, by "personalized", "global", "local" and "zero_shot".
            targets: Targets of the test samples.
            samples: Their data set and `Subset`.
        """
        return {}

    def head_flops(self, units: int, training: bool) -> int:
        """Return the operations of a frozen head for a number of units; 0 for a small head, which is not counted."""
        return 0


def shifted(opinion: Tensor, shift: Tensor | None) -> Tensor:
    """Return an opinion (U, K) plus a shift (K,), or the opinion if the shift is None."""
    return opinion if shift is None else opinion + shift
