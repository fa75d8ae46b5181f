"""What turns pooled features into class logits: frozen class prompts (`text`) or a trained layer (`linear`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextHead(nn.Module):
    """CLIP-style zero-shot head: cosine of the features with frozen class embeddings, over a temperature.

    Args:
        class_embeddings: (C, D), one per class, of unit length.
        temperature: above 0.
        learn_temperature: train the logarithm of the temperature with the expert (Radford et al. 2021).
    """

    class_embeddings: Tensor

    def __init__(self, class_embeddings: Tensor, temperature: float, learn_temperature: bool = False) -> None:
        super().__init__()
        self.register_buffer("class_embeddings", class_embeddings, persistent=False)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(temperature)), requires_grad=learn_temperature
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (B, D) -> logits (B, C)."""
        return F.normalize(features, dim=-1) @ self.class_embeddings.T / self.log_temperature.exp()


class LinearHead(nn.Linear):
    """A trained linear layer, part of the expert.

    Where the model can embed class prompts it starts as the zero-shot head (Wortsman et al. 2022 start fine-tuning
    there too), so that round 0 is the zero-shot model; otherwise at random from `generator`.

    Args:
        features: D. classes: C.
        class_embeddings: (C, D), of unit length, or None.
        temperature: of the zero-shot head it starts as.
    """

    def __init__(
        self, features: int, classes: int, class_embeddings: Tensor | None, temperature: float
    ) -> None:
        super().__init__(features, classes)
        self.class_embeddings, self.temperature = class_embeddings, temperature

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Starts the head afresh."""
        if self.class_embeddings is None:
            bound = 1 / math.sqrt(self.in_features)
            self.weight.uniform_(-bound, bound, generator=generator)
        else:
            self.weight.copy_(self.class_embeddings / self.temperature)
        self.bias.zero_()
