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
        opinion = opinions["personalized"]
        probabilities = opinion.double().softmax(1)
        return {"macro_f1": macro_f1(opinion.argmax(1), targets), "calibration_error": calibration_error(probabilities, targets),
                "auroc": auroc(probabilities, targets)}


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


BINS = 15       # of confidence, as in Guo et al. and in torchmetrics


def calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    """Return the expected calibration error of the most likely class, in [0, 1] (Guo et al. 2017, arXiv 1706.04599).

    Samples are sorted into `BINS` bins of equal width by the probability of their most likely class. The error is the mean over
    samples of the distance between the accuracy and the mean probability of their bin. With few samples in a bin that distance
    is large by chance, so the error of a client with few test samples is too large on average.

    Args:
        probabilities: (U, C), of each class.
        targets: (U,) true classes.
    """
    confidence, predicted = probabilities.max(1)
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    excess = (predicted == targets).to(confidence.dtype) - confidence
    return float(excess.new_zeros(BINS).index_add(0, bins, excess).abs().sum() / len(targets))


def auroc(probabilities: Tensor, targets: Tensor) -> float | None:
    """Return the area under the ROC curve of each class against the others, averaged over the classes that occur among the targets.

    For one class it is the probability that a sample of the class gets a larger probability for it than another sample; a tie counts
    half. None if all targets are of one class.

    Args:
        probabilities: (U, C), of each class.
        targets: (U,) true classes.
    """
    areas = []
    for label in targets.unique():
        of_class, others = (probabilities[rows, label] for rows in (targets == label, targets != label))
        if len(others) == 0:
            return None
        others = others.sort().values
        below, not_above = (torch.searchsorted(others, of_class, right=right).sum() for right in (False, True))
        areas.append(float(below + not_above) / (2 * len(of_class) * len(others)))
    return sum(areas) / len(areas)
