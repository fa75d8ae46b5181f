"""A cache of keys and values that is written in place.

A `DynamicCache` of transformers copies all keys and values for every token. Here the memory of a layer is doubled when it is
full, so that a token costs only the writing of its own keys and values.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_ROOM = 64     # tokens for which a layer begins with memory


class GrowingLayer(DynamicLayer):
    """The keys and values (B, H, T, D) of one layer. `keys` and `values` are views of the filled part of the memory."""

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool
    _memory: list[Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, new, D), and return all keys and values (B, H, T, D)."""
        start = self.get_seq_length()
        count = key_states.shape[-2]
        if not self.is_initialized or start + count > self._memory[0].shape[-2]:
            self._memory = [_grown(old, new, start) for old, new in
                            ((self.keys, key_states), (self.values, value_states))]
            self.is_initialized = True
        for memory, new in zip(self._memory, (key_states, value_states)):
            memory.narrow(-2, start, count).copy_(new)
        self.keys, self.values = (memory.narrow(-2, 0, start + count) for memory in self._memory)
        return self.keys, self.values


def _grown(old: Tensor | None, new: Tensor, start: int) -> Tensor:
    """Return memory for twice as many tokens as needed, which begins with the first `start` tokens of the old memory."""
    *batch_and_heads, count, width = new.shape
    memory = new.new_empty(*batch_and_heads, max(FIRST_ROOM, 2 * (start + count)), width)
    if start:
        memory.narrow(-2, 0, start).copy_(old)
    return memory


def growing_cache() -> Cache:
    """Return an empty cache for a model of transformers."""
    return Cache(layer_class_to_replicate=GrowingLayer)
