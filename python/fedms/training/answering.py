"""Answers of a language model token by token, from what a method loads for a client."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedms.models.causal_lm import CausalModel
from fedms.models.generation import Decoder, Sampling, Token, generate
from fedms.tasks.causal_lm import CausalLM
from fedms.training.both import share_prefix
from fedms.training.expert_model import EXPERTS, ExpertModel
from fedms_ext import gated

# The weights (U, 2) of the global and the local expert for tokens whose features are (U, D), by both experts' opinions (U, K)
# about them, where these are known before.
Weights = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Speaker:
    """Which experts answer for a client, after a method has loaded them into the model.

    Attributes:
        experts: The expert that answers alone, or both experts.
        weigh: Returns the weights of both.
        sees: Features that the gate sees, "final" or "prefix", or None for none.
        layers: Whether the experts are mixed inside the layers.
    """

    experts: Sequence[str]
    weigh: Weights | None = None
    sees: str | None = None
    layers: bool = False


class Answerer:
    """Generates answers with the experts that a model holds. A new one is needed when other experts are loaded."""

    def __init__(self, model: ExpertModel, speaker: Speaker) -> None:
        if not isinstance(model.foundation, CausalModel) or not isinstance(model.task, CausalLM):
            raise TypeError(f"{model.foundation.name} writes no answers; expected a causal language model")
        self.model, self.speaker = model, speaker
        self.foundation, self.task = model.foundation, model.task
        self._weights: list[Tensor] = []            # those of `weights`, each ()
        self._features: Tensor | None = None        # (1, D) of the position that the next token follows

    @property
    def weights(self) -> list[float]:
        """Weight of the local expert for each token that was generated last. Empty if one expert answers alone."""
        return torch.stack(self._weights).tolist() if self._weights else []

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """Yield the answer to a prompt; see `generation.generate`."""
        model, speaker = self.model, self.speaker
        both = len(speaker.experts) > 1 and not speaker.layers
        self._weights = []
        with model.stream("streams" if both else "mixture" if speaker.layers else speaker.experts[0]) as stream:
            if both:
                with model.stream("local") as local:
                    boundary = local.prefix_depth
                shared = boundary if share_prefix(model) else 0
                decoder = Decoder(self.foundation, list(model.layers.values()), shared, len(EXPERTS), model.precision)
            else:
                boundary, decoder = stream.prefix_depth, self._plain_decoder()
            mixed = [layer for layer in model.layers.values() if layer.block > boundary] if speaker.layers else []
            gate = torch.ones(1, len(EXPERTS), device=model.device)      # filled in every step
            if speaker.sees == "prefix" or speaker.layers:
                decoder.watch(boundary, partial(self._at_boundary, gate))
            if speaker.sees == "final":
                decoder.before = self._final_features(self._plain_decoder())
            with gated(mixed, gate):
                yield from generate(decoder, prompt, self._mixture, self.foundation.stop_tokens, sampling)

    def _plain_decoder(self) -> Decoder:
        """Return a decoder of one stream."""
        return Decoder(self.foundation, precision=self.model.precision)

    def _final_features(self, plain: Decoder) -> Callable[[Tensor], None]:
        """Take the gate's features from the foundation model alone, which reads the same tokens."""
        def read(ids: Tensor) -> None:
            with self.model.stream(None):
                self._features = plain.step(ids)
        return read

    def _at_boundary(self, gate: Tensor, hidden: Tensor) -> None:
        """Take the gate's features at the end of the constant prefix, and the weights of the layers above it where they mix."""
        self._features = hidden[-1:, -1].float()        # of the last position; the last row, where there is one an expert
        if self.speaker.layers:
            gate.copy_(self._weigh(None, None))

    def _weigh(self, shared: Tensor | None, own: Tensor | None) -> Tensor:
        features = self._features
        if features is None:
            features = torch.empty(1, 0, device=self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):     # the gate is in float32
            weights = self.speaker.weigh(features, shared, own)
        self._weights.append(weights[0, 1])
        return weights

    @torch.no_grad()
    def _mixture(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities (V,) of the next token from each expert's hidden state (E, D)."""
        log_p = self.task.head(hidden).log_softmax(-1)
        if len(log_p) == 1:
            return log_p[0]
        opinions = [self.task.opinion_of(each[None]) for each in log_p]
        weights = self._weigh(*opinions)
        return self.task.next_log_p(hidden, log_p, weights[0])
