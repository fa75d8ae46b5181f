"""Functions that convert between the formats of `nn.QuantizedWeight`, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..reference import (LEVELS, dequantize_groups, pack_nibbles, quantize_groups, quantize_weight, rotate, rotated_block,
                         unpack_nibbles)

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EIGHT_BITS = ("int8", "int8_rotated")
KINDS = (*EIGHT_BITS, *HALVES, "nf4", "int4")

STRIP = 2**16       # values that the CPU quantizes to 8 bits at a time: what is computed on the way then stays in its cache


def quantize(weight: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight (N, K) to the logical form (q, scale); see `nn.QuantizedWeight`.

    Raises:
        ValueError: If a value lies beyond the range of fp16.
    """
    if kind in EIGHT_BITS:
        rows = STRIP // max(weight.shape[1], 1) if weight.device.type == "cpu" else len(weight)
        strips = [quantize_weight(rotate(strip.float()) if kind == "int8_rotated" else strip) for strip in weight.split(max(rows, 1))]
        return torch.cat([q.to(torch.int8) for q, _ in strips]), torch.cat([scale for _, scale in strips])
    if kind in HALVES:
        q = weight.to(HALVES[kind], copy=True)
        if not q.isfinite().all():
            raise ValueError(
                f"the weight has a value of magnitude {weight.abs().max():.3g}, beyond the range of {kind}; use bf16"
            )
        return q, weight.new_empty((len(weight), 0), dtype=torch.float32)
    codes, scale = quantize_groups(weight, kind, group)
    return pack_nibbles(codes), scale


def packed(q: Tensor, scale: Tensor, kind: str, group: int, k: int) -> Tensor:
    """Return q as it is stored on its device: packed for the instruction set in use on the CPU, except for fp16 and bf16,
    and unchanged on other devices."""
    if kind in HALVES or q.device.type != "cpu":
        return q
    if kind in EIGHT_BITS:
        data = torch.empty(_C.int8_packed_size(*q.shape), dtype=torch.uint8)
        blocks = (rotated_block(k),) if kind == "int8_rotated" else ()
        _C.int8_pack(q.contiguous(), data, *blocks)
    else:
        data = torch.empty(_C.nibbles_packed_size(len(q), k, group), dtype=torch.uint8)
        _C.nibbles_pack(k, group, LEVELS[kind], q.contiguous(), scale.contiguous(), data)
    return data


def _is_packed(data: Tensor, kind: str) -> bool:
    return kind not in HALVES and data.dim() == 1


def unpacked(data: Tensor, kind: str, n: int, k: int) -> Tensor:
    """Return the logical form of the data of a weight (n, k), which may be packed or not."""
    if not _is_packed(data, kind):
        return data
    if kind in EIGHT_BITS:
        q = torch.empty(n, k, dtype=torch.int8)
        _C.int8_unpack(data, q)
    else:
        q = torch.empty(n, (k + 1) // 2, dtype=torch.uint8)
        _C.nibbles_unpack(k, data, q)
    return q


def dequantize(data: Tensor, scale: Tensor, kind: str, group: int, k: int) -> Tensor:
    """Return the float32 weight (N, k) of data, packed or not, and its scale."""
    if kind in LEVELS and _is_packed(data, kind):
        weight = torch.empty(scale.shape[0], k)
        _C.nibbles_dequantize(group, data, scale, weight)
        return weight
    q = unpacked(data, kind, scale.shape[0], k)
    if kind in HALVES:
        return q.float()
    if kind in EIGHT_BITS:
        return rotate(q * scale.unsqueeze(1)) if kind == "int8_rotated" else q * scale.unsqueeze(1)
    return dequantize_groups(unpack_nibbles(q, k), scale, kind, group)
