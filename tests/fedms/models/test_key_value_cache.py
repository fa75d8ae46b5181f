"""Keys and values that are written in place: the same as those of transformers' cache, which copies them."""
from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from fedms.models.key_value_cache import FIRST_ROOM, growing_cache


@pytest.mark.parametrize("pieces", [[40, *[1] * 150], [1, 1], [3 * FIRST_ROOM, 1], [FIRST_ROOM, 1], [5, 0, 2]], ids=lambda p: str(p[:3]))
def test_it_holds_what_transformers_cache_holds(pieces):
    ours, theirs = growing_cache(), DynamicCache()
    torch.manual_seed(0)
    for count in pieces:
        for layer, rows in enumerate((1, 2)):       # the blocks that experts share have one row, those above one an expert
            keys, values = torch.randn(2, rows, 3, count, 4)
            found = ours.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(found, theirs.update(keys, values, layer)))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_is_written_where_there_is_room_and_nothing_else_is_touched():
    cache = growing_cache()
    keys, values = torch.randn(2, 1, 3, 10, 4)
    before, _ = cache.update(keys, values, 0)
    where = before.data_ptr()
    for count in range(11, FIRST_ROOM + 2):
        now, _ = cache.update(*torch.randn(2, 1, 3, 1, 4), 0)
        assert now.shape[-2] == count and torch.equal(now[:, :, :10], keys)
        assert (now.data_ptr() == where) == (count <= FIRST_ROOM)
