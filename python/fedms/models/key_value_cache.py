"""Keys and values of the tokens that a decoder has read, in memory that is written in place.

A cache of transformers (`DynamicCache`) copies all of them for every token. Here the memory of a layer doubles when it is full,
so that a token costs the writing of its own keys and values.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_ROOM = 64     # tokens for which a layer begins with memory


class GrowingLayer(DynamicLayer):
    """The keys and values (B, H, T, D) of one layer. `keys` and `values` are the part of the memory that is filled."""

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool
    _memory: list[Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, new, D); return all of them."""
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
    """Memory of twice the room that is needed, with the first `start` tokens of the old one in it."""
    *batch_and_heads, count, width = new.shape
    memory = new.new_empty(*batch_and_heads, max(FIRST_ROOM, 2 * (start + count)), width)
    if start:
        memory.narrow(-2, 0, start).copy_(old)
    return memory


def growing_cache() -> Cache:
    """Return an empty cache, as models of transformers take it."""
    return Cache(layer_class_to_replicate=GrowingLayer)
