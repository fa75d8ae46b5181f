"""One label of several a sample."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Task


class Classification(Task):
    """Single-label classification. The opinion is the logits (U, C), one unit for each sample; targets are class numbers (U,).

    Args:
        classes: Number C of classes.
        new_head: Makes a head from features (U, D) to logits.
        prompts: (C, D) unit vectors of the class prompts, or None.
        temperature: Temperature by which the cosine logits of the class prompts are divided.
    """

    shifts = True

    def __init__(self, classes: int, new_head: Callable[[], nn.Module], prompts: Tensor | None, temperature: float) -> None:
        self.columns, self._new_head, self.prompts, self.temperature = classes, new_head, prompts, temperature

    def new_head(self) -> nn.Module:
        return self._new_head()

    def reset_head(self, head: nn.Module, generator: torch.Generator) -> None:
        if isinstance(head, nn.Linear):
            head.reset(generator)  # type: ignore[operator]  # a LinearHead

    def opinion(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        return head(features)

    def mix(self, weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
        """On "probabilities" the result is the logarithm of the mixed class probabilities."""
        if on == "logits":
            return weights[:, :1] * shared + weights[:, 1:] * own
        both = torch.stack([F.log_softmax(shared, 1), F.log_softmax(own, 1)], dim=1)
        return torch.logsumexp(weights.clamp_min(1e-12).log().unsqueeze(-1) + both, dim=1)

    def blend(self, logit: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        return logit.sigmoid() * own + (1 - logit.sigmoid()) * shared

    def loss(self, opinion: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(opinion, targets)

    def right(self, opinion: Tensor, targets: Tensor) -> Tensor:
        return opinion.argmax(1) == targets

    def accuracy(self, opinion: Tensor, targets: Tensor) -> float:
        return float(self.right(opinion, targets).float().mean())

    def confidences(self, opinion: Tensor) -> Tensor:
        """Return the log-probability of the most likely class, and its lead over that of the second one."""
        best = F.log_softmax(opinion, 1).topk(2, dim=1).values
        return torch.stack([best[:, 0], best[:, 0] - best[:, 1]], 1)

    def zero_shot(self, features: Tensor, targets: Tensor) -> Tensor | None:
        return None if self.prompts is None else features @ self.prompts.T / self.temperature

    def details(self, opinions: Mapping[str, Tensor | None], targets: Tensor, samples: Any) -> dict[str, Any]:
        return {"macro_f1": macro_f1(opinions["personalized"].argmax(1), targets)}


def macro_f1(predicted: Tensor, targets: Tensor) -> float:
    """Return the mean F1 score of the classes that occur among the targets.

    It is not scikit-learn's, whose import takes 36 MiB of a client's memory.

    Args:
        predicted: (U,) predicted classes.
        targets: (U,) true classes.
    """
    classes = targets.unique()
    predicted_as, is_class = predicted == classes.unsqueeze(1), targets == classes.unsqueeze(1)
    both = (predicted_as & is_class).sum(1, dtype=torch.float64)
    return float((2 * both / (predicted_as.sum(1) + is_class.sum(1))).mean())
