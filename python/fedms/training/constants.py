"""Where the constants of samples are kept, and how many outputs of the frozen blocks.

The output of the constant prefix is kept for each sample. When the schedule activates more blocks, the prefix becomes shorter, and
the output behind fewer blocks is needed. The first pass through the prefix has been there, so that output is kept then, and no
sample passes a frozen block twice while the depth grows. Where frozen pairs inside the prefix change, the pass starts behind the
blocks below them.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fedms.data import made_cache_dir
from fedms.training.cache_key import origin
from fedms_ext import ConstantCache, DiskCache

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel

STORED = {"fp32": 4, "bf16": 2, "int8": 1}         # bytes a value


def new_cache(model: ExpertModel) -> ConstantCache | DiskCache:
    """Return an empty cache of a model's constants, or with `[sal] cache = "disk"` the one that earlier runs have filled."""
    sal = model.config.sal
    if sal.cache != "disk":
        return ConstantCache(sal.cache_bytes if sal.cache == "memory" else 0)
    return DiskCache(made_cache_dir() / "constants", sal.cache_bytes, origin(model))


def prefix_bytes(model: ExpertModel, part: Tensor) -> int:
    """Return the bytes in which the cache keeps one output of the frozen blocks for samples (n,)."""
    storage = model.config.sal.cache_dtype
    scales = 4 if storage == "int8" else 0
    tokens = int(model.dataset.inputs.lengths[part].sum())
    return tokens * (STORED[storage] * model.foundation.width + scales) + 16 * len(part)


def boundaries(model: ExpertModel, depths: Iterable[int]) -> list[int]:
    """Return the numbers of blocks in the constant prefixes at these depths of activation, without 0: the largest first."""
    return sorted({model.untrained_below(depth) for depth in depths} - {0}, reverse=True)


def pass_start(model: ExpertModel, part: Tensor, depth: int) -> int:
    """Return behind how many blocks a pass starts that computes outputs behind `depth` blocks for samples (n,).

    It starts from the output below all applied pairs, which stays the same when frozen pairs above it change: in every round at a client
    that trains fewer blocks than are active, and in stage 2. Where that is not kept it starts from the inputs, 0: without
    `[sal] cache_ahead`, if half of the cache cannot hold two outputs, or if what it holds is not exact.
    """
    below = model.untrained_below(max(applied for _, applied in model.depths.values()))
    exact = model.config.sal.cache_dtype == model.config.run.dtype == "fp32"
    return below if below < depth and model.ahead is not None and exact and _outputs_in_room(model, part) > 1 else 0


def kept_ahead(model: ExpertModel, part: Tensor, prefix_depth: int) -> Sequence[int]:
    """Return the numbers of blocks behind which outputs for samples (n,) are kept beside that of the prefix, for later rounds: the
    next ones of those in `ExpertModel.ahead`.

    All outputs for a set of samples take at most half of `[sal] cache_bytes`, as a client has two sets, for training and for
    validation.
    """
    later = [depth for depth in boundaries(model, model.ahead or ()) if depth < prefix_depth]
    kept = 1 + (pass_start(model, part, prefix_depth) > 0)
    return later[:max(_outputs_in_room(model, part) - kept, 0)]


def _outputs_in_room(model: ExpertModel, part: Tensor) -> int:
    return model.cache.max_bytes // 2 // max(prefix_bytes(model, part), 1)
