"""Generation with one or several experts of a causal language model, token by token.

All experts share the blocks below the first one in which they differ, and one key-value cache: it holds one row for each of
the shared blocks and one row an expert for those above, which run as one batch through one frozen product a layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedms_ext import ExpertLinear, segmented
from fedms_ext.sparse.skipping import entering
from fedms_ext.sparse.surgery import block_list

from .causal_lm import CausalModel

# The log-probabilities (V,) of the next token from each expert's last hidden states (E, D).
Mixture = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Largest number of tokens in an answer, at least 1.
        temperature: 0 chooses the most probable token; otherwise log-probabilities are divided by it.
        top_p: Tokens are drawn from the smallest set that has at least this probability, in (0, 1].
        seed: Seed of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected above 0 and at most 1")


@dataclass(frozen=True)
class Token:
    """A generated token and the log-probability that the model gave it, at temperature 1."""

    id: int
    log_p: float


class Decoder:
    """The decoder of a model with its key-value cache. It reads tokens and returns the last hidden state of every expert.

    Args:
        model: The model; its experts are set as they are to run.
        layers: Layers of the blocks in which several experts differ.
        shared: Number of blocks below those, which run once for all experts.
        experts: 1, or the number of experts of each layer, which then run as one batch.
        precision: Makes the context in which the model runs, such as autocast.
    """

    def __init__(self, model: CausalModel, layers: Sequence[ExpertLinear] = (), shared: int = 0, experts: int = 1,
                 precision: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        from .key_value_cache import growing_cache      # imports transformers, which takes seconds

        self.model, self.layers, self.experts, self.precision = model, layers if experts > 1 else (), experts, precision
        self.before: Callable[[Tensor], None] | None = None     # called with the tokens of every step, before it
        self.blocks = block_list(model.module, model.blocks)
        self.changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {self.blocks[shared]: self._repeated} if experts > 1 else {}
        self.cache = growing_cache()
        accepted = inspect.signature(model.module.forward).parameters
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"

    @torch.inference_mode()     # beside what no_grad leaves out, no tensor counts its versions: 12 % of a step
    def step(self, ids: Tensor) -> Tensor:
        """Read the next tokens (T,) int64, and return the hidden states (experts, D) float32 after the last one."""
        ids = ids.to(next(self.model.module.parameters()).device)
        if self.before is not None:
            self.before(ids)
        arguments: dict[str, Any] = {"input_ids": ids.unsqueeze(0), self.cache_name: self.cache, "use_cache": True}
        with entering(self.changes), segmented(self.layers, (1,) * self.experts), self.precision():
            return self.model.module(**arguments).last_hidden_state[:, -1].float()

    def _repeated(self, hidden: Tensor) -> Tensor:
        return hidden.repeat(self.experts, 1, 1)

    def watch(self, number: int, see: Callable[[Tensor], None]) -> None:
        """Call a function with the hidden state (rows, T, D) that the block of this number is given, counted from 0, in every step.
        There is a row for each expert where they run as one batch already."""
        block, change = self.blocks[number], self.changes.get(self.blocks[number])

        def seen(hidden: Tensor) -> Tensor:
            see(hidden)
            return hidden if change is None else change(hidden)
        self.changes[block] = seen


def generate(decoder: Decoder, prompt: Sequence[int], mixture: Mixture, stop_tokens: Sequence[int],
             sampling: Sampling) -> Iterator[Token]:
    """Yield the answer to a prompt token by token. A stop token is the last one, if there is one.

    Raises:
        ValueError: If the prompt is empty, or leaves no room for an answer within the longest sequence of the model.
    """
    longest = decoder.model.max_tokens
    if not 1 <= len(prompt) < longest:
        raise ValueError(f"the prompt has {len(prompt)} tokens, expected 1 to {longest - 1}: the model reads {longest} at most, "
                         "the answer included")
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = torch.tensor(prompt)
    for _ in range(min(sampling.max_new_tokens, longest - len(prompt))):
        log_p = mixture(decoder.step(ids)).cpu()
        ids = choose(log_p, sampling, generator).view(1)
        yield Token(int(ids), float(log_p[ids]))
        if int(ids) in stop_tokens:
            return


def choose(log_p: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return the next token (), chosen by log-probabilities (V,)."""
    if sampling.temperature == 0:
        return log_p.argmax()
    p = (log_p / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = p.sort(descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        return tokens[torch.multinomial(ordered, 1, generator=generator)].squeeze(0)
    return torch.multinomial(p, 1, generator=generator).squeeze(0)


def text_pieces(tokenizer: Any, tokens: Iterator[Token], stop_tokens: Sequence[int]) -> Iterator[str]:
    """Yield the text of tokens piece by piece. A character that consists of several tokens is held back until it is complete."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        if token.id not in stop_tokens:
            ids.append(token.id)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown):]
            shown = text
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown):]
