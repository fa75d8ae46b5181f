"""The next token of an answer, under a frozen head."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext.token_loss import FrozenHead, mixture_log_prob, token_log_prob

from fedms.progress import perplexity

from .base import Score, Task

LOG_P, ENTROPY, LARGEST, RIGHT, TOKEN, HIDDEN = range(6)
ROWS = 16                 # positions whose logits of a mixture are made at a time: what is computed from them comes from the cache


class CausalLM(Task):
    """Predicting the tokens of answers; a mixture mixes the probabilities of two experts.

    A unit is a token of an answer, and its target is that token, (U,). An opinion is four numbers for each token: its
    log-probability; the entropy and the largest log-probability over all tokens; and 1 if it is the most probable token, else 0.

    Args:
        head: The head of the foundation model; experts have none of their own.
        chunk: Number of positions whose logits are in memory at the same time.
    """

    columns = 4
    per_token = True
    mixes_opinions = False
    trains_head = False

    def __init__(self, head: FrozenHead, chunk: int) -> None:
        self.head, self.chunk = head, chunk

    def new_head(self) -> nn.Module:
        return nn.Identity()

    def opinion(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        found = token_log_prob(features, self.head, targets, self.chunk)
        return torch.cat([found.log_p[:, None], found.confidence, (found.best == targets).to(found.log_p.dtype)[:, None]], 1)

    def opinion_of(self, log_p: Tensor) -> Tensor:
        """Return the opinion (U, 4) about tokens that are not known yet from the log-probabilities (U, V) of all tokens. What
        depends on the token is NaN."""
        unknown = torch.full_like(log_p[:, 0], float("nan"))
        return torch.stack([unknown, _entropy(log_p), log_p.amax(-1), unknown], 1)

    def next_log_p(self, hidden: Tensor, log_p: Tensor, weights: Tensor) -> Tensor:
        """Return the log-probabilities (V,) of the next token under a mixture.

        Args:
            hidden: (2, D) hidden states of both experts.
            log_p: (2, V) log-probabilities of both experts.
            weights: (2,) weights of both experts.
        """
        return _mixed(log_p, weights)

    def mix(self, weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
        """Mix on "probabilities", the only kind that is supported. The opinion (U, 4) holds the log-probability of the token;
        its other columns need the probabilities of all tokens and are NaN."""
        log_p = mixture_log_prob(torch.stack([shared[:, LOG_P], own[:, LOG_P]], 1), weights)
        return torch.cat([log_p[:, None], torch.full_like(own[:, 1:], float("nan"))], 1)

    @torch.no_grad()
    def mixed_opinion(self, head: nn.Module, shared: Tensor, own: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        few = min(self.chunk, ROWS)
        parts = zip(shared.split(few), own.split(few), weights.split(few), targets.split(few))
        found = []
        for ours, mine, gate, wanted in parts:
            log_p = _mixed(torch.stack([self.head(ours).log_softmax(-1), self.head(mine).log_softmax(-1)], 1), gate)
            best = log_p.max(-1)
            found.append(torch.stack([log_p.gather(1, wanted[:, None]).squeeze(1), _entropy(log_p), best.values,
                                      (best.indices == wanted).to(log_p.dtype)], 1))
        return torch.cat(found) if found else own.new_empty(0, self.columns)

    def layer_opinion(self, heads: Mapping[str, nn.Module], shifts: Mapping[str, Tensor | None], features: Tensor,
                      targets: Tensor, weights: Tensor) -> Tensor:
        """Return the opinion with mixed layers. All experts have the same head."""
        return self.opinion(next(iter(heads.values())), features, targets)

    def loss(self, opinion: Tensor, targets: Tensor) -> Tensor:
        return -opinion[:, LOG_P].mean()

    def score(self, opinion: Tensor, targets: Tensor) -> Score:
        """Return the loss and the accuracy, which is exp(-loss), the geometric mean of the tokens' probabilities: 1 / perplexity.
        """
        if len(targets) == 0:
            return Score(None, None)
        loss = float(self.loss(opinion, targets))
        return Score(math.exp(-loss), loss)

    def right(self, opinion: Tensor, targets: Tensor) -> Tensor:
        return opinion[:, RIGHT] > 0.5

    def accuracy(self, opinion: Tensor, targets: Tensor) -> float:
        """Share of the tokens that are the most probable ones."""
        return float(opinion[:, RIGHT].mean())

    def confidences(self, opinion: Tensor) -> Tensor:
        """Entropy, and the largest log-probability."""
        return opinion[:, ENTROPY:LARGEST + 1]

    def zero_shot(self, features: Tensor, targets: Tensor) -> Tensor | None:
        return self.opinion(nn.Identity(), features, targets)

    def details(self, opinions: Mapping[str, Tensor | None], targets: Tensor, samples: Any) -> dict[str, Any]:
        """Return the fields of a client's record under "language".

        They are the loss of each opinion in nats a token; and of the personalized opinion the perplexity, the bits for each byte
        of the answers' text, which compare models with different tokens, and the share of answers that greedy generation would
        give exactly.
        """
        dataset, part = samples
        nats = {name: -float(opinion[:, LOG_P].double().mean()) for name, opinion in opinions.items() if opinion is not None}
        own = nats.pop("personalized")
        counts = dataset.units(part.indices).tolist()
        exact = [bool(answer.all()) for answer in self.right(opinions["personalized"], targets).split(counts)]
        bytes_ = None if dataset.answer_bytes is None else int(dataset.answer_bytes[part.indices].sum())
        return {"language": {"nats": own, **{f"nats_{name}": value for name, value in nats.items()}, "tokens": len(targets),
                             "perplexity": perplexity(own), "exact_match": sum(exact) / len(exact),
                             "bits_per_byte": own * len(targets) / math.log(2) / bytes_ if bytes_ else None}}

    def head_flops(self, units: int, training: bool) -> int:
        return (4 if training else 2) * units * self.head.weight.numel()


class LogitMixingLM(CausalLM):
    """Predicting the tokens of answers; a mixture mixes the logits of two experts.

    All experts have the same linear head, so mixed logits are the logits of mixed hidden states. Opinions therefore hold hidden
    states instead of all logits: in addition to those of `CausalLM` they have columns for the token and its hidden state (D,).

    Args:
        head: As in `CausalLM`.
        chunk: As in `CausalLM`.

    Raises:
        ValueError: If the head caps its logits, because it is not linear then.
    """

    mixes_opinions = True
    blends_on = "logits"

    def __init__(self, head: FrozenHead, chunk: int) -> None:
        super().__init__(head, chunk)
        tokens, width = head.weight.shape
        if head.cap is not None:
            raise ValueError('"logits" are capped by this model, so they are not those of a mixed hidden state; use "probabilities"')
        assert tokens <= 2**24, "a token's number must be exact in float32"
        self.columns = HIDDEN + width

    def opinion(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([super().opinion(head, features, targets), targets[:, None].to(features.dtype), features], 1)

    def mix(self, weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
        """Mix on "logits", the only kind that is supported, and return the opinion (U, 5 + D)."""
        hidden = weights[:, :1] * shared[:, HIDDEN:] + weights[:, 1:] * own[:, HIDDEN:]
        return self.opinion(nn.Identity(), hidden, own[:, TOKEN].long())

    def next_log_p(self, hidden: Tensor, log_p: Tensor, weights: Tensor) -> Tensor:
        return self.head(weights @ hidden).log_softmax(-1)


def _mixed(log_p: Tensor, weights: Tensor) -> Tensor:
    """Return the log-probabilities (..., V) of a mixture from those of experts (..., E, V) and their weights (..., E)."""
    return torch.logsumexp(log_p + weights.clamp_min(torch.finfo(weights.dtype).tiny).log().unsqueeze(-1), -2)


def _entropy(log_p: Tensor) -> Tensor:
    """Return the entropy (...), in nats, of log-probabilities (..., V)."""
    return -(log_p.exp() * log_p).sum(-1)
