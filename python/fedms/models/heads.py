"""Heads, which compute class logits from pooled features: by frozen class prompts (`text`) or by a trained layer (`linear`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextHead(nn.Module):
    """A zero-shot head as in CLIP: the cosine of the features with frozen class embeddings, divided by a temperature.

    Args:
        class_embeddings: (C, D), one for each class, of unit length.
        temperature: Above 0.
        learn_temperature: Whether the logarithm of the temperature is trained with the expert (Radford et al. 2021).
    """

    class_embeddings: Tensor

    def __init__(self, class_embeddings: Tensor, temperature: float, learn_temperature: bool = False) -> None:
        super().__init__()
        self.register_buffer("class_embeddings", class_embeddings, persistent=False)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(temperature)), requires_grad=learn_temperature
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of features (B, D)."""
        return F.normalize(features, dim=-1) @ self.class_embeddings.T / self.log_temperature.exp()


class LinearHead(nn.Linear):
    """A trained linear layer, which is a part of the expert.

    If the model can embed class prompts, the head starts as the zero-shot head, so that round 0 is the zero-shot model (Wortsman et
    al. 2022 start fine-tuning in the same way). Otherwise `reset` draws its weights.

    Args:
        features: Width D of the features.
        classes: Number C of classes.
        class_embeddings: (C, D), of unit length, or None.
        temperature: Temperature of the zero-shot head.
    """

    def __init__(
        self, features: int, classes: int, class_embeddings: Tensor | None, temperature: float
    ) -> None:
        super().__init__(features, classes)
        self.class_embeddings, self.temperature = class_embeddings, temperature

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set the initial weight and bias.

        Args:
            generator: Draws the weight if there are no class embeddings.
        """
        if self.class_embeddings is None:
            bound = 1 / math.sqrt(self.in_features)
            self.weight.uniform_(-bound, bound, generator=generator)
        else:
            self.weight.copy_(self.class_embeddings / self.temperature)
        self.bias.zero_()
