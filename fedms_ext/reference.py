"""Define in plain PyTorch what every operator of this package computes. All tests compare with this module.

Nothing here is fast. Every function accepts any floating dtype up to float64 and any device. M is the number of rows, K and N are
the input and output widths of a layer, r is the rank of an expert and E the number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


# The version of the dropout masks: another number stands for other bits from the same seed. 1 drew 32 bits a value with 10 rounds.
MASK_VERSION = 2


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor],
                rounds: int = 7) -> tuple[Tensor, ...]:
    """Return four random words for each counter by Philox4x32.

    The generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. With 7 rounds, the fewest with
    which it passes the BigCrush tests of that paper, it takes 0.7 of the operations of the usual 10.

    Args:
        counter: Four int64 tensors of one shape, each holding 32-bit words.
        key: Two 32-bit words.
        rounds: The number of rounds.

    Returns:
        Four int64 tensors of that shape, each holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product wraps around in int64, but its bits are right, and the masks keep 32 of them.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = k0 + 0x9E3779B9 & _MASK32, k1 + 0xBB67AE85 & _MASK32
    return c0, c1, c2, c3


def philox_mask(seed: int | Tensor, rows: int, cols: int, p: float, device: torch.device | str | None = None) -> Tensor:
    """Return the dropout mask of a layer, (rows, cols) bool, which is True where a value is kept.

    The element (row, col) has the index i = row * cols + col. Philox4x32-7 with the counter (i // 8 mod 2**32, i // 8 div 2**32, 0,
    0) and the key (seed mod 2**32, seed div 2**32) makes four words for eight elements. The element's random number is the lower
    half of word i % 8 // 2 if i is even, and the upper half if it is odd. The element is kept if these 16 bits are at least
    `dropout_threshold(p)`. Every kernel must produce exactly these bits, which are those of `MASK_VERSION` 2.

    Args:
        seed: A number from 0 to 2**63 - 1, or an int64 tensor with one element.
        rows, cols: The shape of the mask.
        p: The probability that a value is dropped, 0 <= p < 1, which is rounded to a multiple of 2**-16.
        device: The device of the mask; the default is PyTorch's.
    """
    count = rows * cols
    block = torch.arange((count + 7) // 8, device=device, dtype=torch.int64)
    zero = torch.zeros_like(block)
    words = philox_4x32((block & _MASK32, block >> 32, zero, zero), (seed & _MASK32, seed >> 32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    return (halves.reshape(-1)[:count] >= dropout_threshold(p)).reshape(rows, cols)


def dropout_threshold(p: float) -> int:
    """Return below which of the 2**16 values of a random number an element is dropped: p * 2**16, rounded, at most 2**16 - 1."""
    return min(round(p * 2.0**16), 2**16 - 1)


def dropout_scale(p: float) -> float:
    """Return by which the kept values are multiplied: 1 over the probability that a value is kept, which is that of the threshold."""
    return 2.0**16 / (2**16 - dropout_threshold(p))


def dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """Apply dropout to x (M, K): set the values that `philox_mask` drops to zero, and multiply the others by `dropout_scale(p)`.

    With p = 0 the seed is not used, and x itself is returned.
    """
    if p == 0:
        return x
    rows, cols = x.shape
    return torch.where(philox_mask(seed, rows, cols, p, x.device), x * dropout_scale(p), 0)


def own_expert(segments: Sequence[int], like: Tensor) -> Tensor:
    """Return which expert owns each row: (M, E) in the dtype and on the device of `like`, 1 for the owner and 0 for the others.

    `segments` holds the number of rows of each expert: the first rows belong to the first expert, and so on.
    """
    owners = torch.arange(len(segments), device=like.device).repeat_interleave(torch.tensor(segments, device=like.device))
    return torch.nn.functional.one_hot(owners, len(segments)).to(like.dtype)


def _gate_rows(gate: Tensor | None, x: Tensor, experts: int, segments: Sequence[int] | None) -> Tensor | None:
    """Return the gate as a matrix (M, E), or None without a gate. Segments act as a gate that is 1 for a row's owner and 0 elsewhere."""
    if segments is not None:
        own = own_expert(segments, x)
        return own if gate is None else own * gate.expand(*x.shape[:-1], 1).reshape(-1, 1)
    return None if gate is None else gate.expand(*x.shape[:-1], experts).reshape(-1, experts)


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
                  scale: Sequence[float] | Tensor, gate: Tensor | None = None, active: Sequence[bool] | None = None,
                  dropout_p: float = 0.0, seed: int | Tensor | None = None, segments: Sequence[int] | None = None) -> Tensor:
    """Return y = x W^T + b + sum over the active experts e of scale_e * gate_e * (dropout(x) A_e^T) B_e^T.

    The arguments are those of `fedms_ext.expert_linear`. Autograd can differentiate the result any number of times. Unlike the
    operator, this function also gives gradients to the weight and the bias if they require them.
    """
    experts = len(lora_a)
    rows = x.reshape(-1, x.shape[-1])
    gates = _gate_rows(gate, x, experts, segments)
    dropped = dropout(rows, dropout_p, seed)
    y = torch.nn.functional.linear(rows, weight, bias)
    for e in range(experts):
        if active is None or active[e]:
            s = scale[e] * (dropped @ lora_a[e].T)
            y = y + (s if gates is None else gates[:, e : e + 1] * s) @ lora_b[e].T
    return y.reshape(*x.shape[:-1], weight.shape[0])


def lora_branch(
    x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float] | Tensor, gate: Tensor | None,
    dropout_p: float, seed: int | Tensor | None, segments: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """Return what the experts add to the frozen product, (..., N) in the dtype of x, computed in the dtype of the experts."""
    dtype = lora_a[0].dtype
    gate = None if gate is None else gate.to(dtype)
    nothing = lora_b[0].new_zeros(lora_b[0].shape[0], x.shape[-1])
    return expert_linear(
        x.to(dtype), nothing, None, lora_a, lora_b, scale, gate, None, dropout_p, seed, segments
    ).to(x.dtype)  # fmt: skip


def expert_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
                           scale: Sequence[float] | Tensor, gate: Tensor | None = None,
                           active: Sequence[bool] | None = None, dropout_p: float = 0.0,
                           seed: int | Tensor | None = None, segments: Sequence[int] | None = None,
                           ) -> tuple[Tensor, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return the gradients of `expert_linear`, written out by hand: dx, dgate, [dA_e], [dB_e].

    `dy` (..., N) is the gradient of the output, and the other arguments are those of the forward pass. dgate has the shape
    x.shape[:-1] + (E,), or x.shape[:-1] + (1,) with segments: where the gate was broadcast, it has not been summed up yet. It is None
    without a gate. An inactive expert has a column of zeros in dgate, and None in the place of dA_e and dB_e.
    """
    experts = len(lora_a)
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, weight.shape[0])
    gates = _gate_rows(gate, x, experts, segments)
    dropped = dropout(rows, dropout_p, seed)
    dgate = None if gate is None else torch.zeros_like(gates)
    da: list[Tensor | None] = [None] * experts
    db: list[Tensor | None] = [None] * experts
    dx_lora = torch.zeros_like(rows)
    for e in range(experts):
        if active is not None and not active[e]:
            continue
        factor = scale[e] if gates is None else scale[e] * gates[:, e : e + 1]
        s = dropped @ lora_a[e].T
        u = dy_rows @ lora_b[e]
        if dgate is not None:
            dgate[:, e] = scale[e] * (s * u).sum(dim=1)
        ds = factor * u
        da[e] = ds.T @ dropped
        db[e] = dy_rows.T @ (factor * s)
        dx_lora += ds @ lora_a[e]
    dx = dy_rows @ weight + dropout(dx_lora, dropout_p, seed)
    if dgate is not None:
        if segments is not None:
            dgate = (dgate * own_expert(segments, dgate)).sum(dim=1)
        dgate = dgate.reshape(*x.shape[:-1], -1)
    return dx.reshape(x.shape), dgate, da, db


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight (N, K) symmetrically to int8 with one scale for each output channel, so that W is close to q * scale.

    Returns q (N, K), float32 with whole numbers from -127 to 127, and scale (N,), float32.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 127
    return torch.round(weight / scale.clamp_min(INT8_TINY).unsqueeze(1)).clamp(-127, 127), scale


def rotated_block(k: int) -> int:
    """Return the size of the blocks that `rotate` multiplies in a row of k values: the largest of 64, 16 and 4 that divides k, or 0 if
    none does. The square roots of these sizes are powers of two, so dividing by them is exact.
    """
    return next((block for block in (64, 16, 4) if k and k % block == 0), 0)


def rotate(x: Tensor) -> Tensor:
    """Multiply each block of each row of x (..., K) by a normalized Hadamard matrix.

    The block size is `rotated_block(K)`, and the matrix is divided by the square root of that size. If no block divides K, x is
    returned unchanged. The matrix is symmetric and orthogonal: rotating a row twice gives the row again up to rounding, and
    (rotated x) (rotated W)^T = x W^T. A single large value of a row is spread over its block, so that the levels of int8 lie closer
    together (QuaRot: Ashkboos et al., arXiv 2404.00456).

    The additions are made in the order of the C++ kernel, so that a weight is quantized to the same bits everywhere.
    """
    block = rotated_block(x.shape[-1])
    if not block:
        return x
    values = x.unflatten(-1, (-1, block))
    for _ in range(block.bit_length() - 1):
        first, last = values.chunk(2, -1)
        values = torch.stack([first + last, first - last], -1).flatten(-2)
    return (values / block**0.5).flatten(-2)


# A row whose levels would lie closer than this is quantized to zeros: 1 / scale must be a float32.
INT8_TINY = 2.0**-100


def quantize_rows(x: Tensor, steps: int = 255) -> tuple[Tensor, Tensor]:
    """Quantize each row of an activation, with 0 as one of the levels, so that x is close to q * scale.

    The levels divide the interval from low = min(x, 0) to high = max(x, 0) of a row into `steps` equal steps. x (..., K) is converted
    to float32 first, and every operation is rounded to float32.

    Returns q (..., K), float32 with whole numbers from -steps to steps, and scale (..., 1), float32, which is
    high / steps - low / steps. A row that holds an infinity or a NaN has the scale NaN.
    """
    x = x.float()
    low, high = x.amin(dim=-1, keepdim=True).clamp_max(0), x.amax(dim=-1, keepdim=True).clamp_min(0)
    scale = high / steps - low / steps
    inverse = torch.where(scale < INT8_TINY, 0.0, 1.0 / scale)
    q = torch.minimum(torch.round(x * inverse), steps - torch.round(-low * inverse))
    scale = torch.where(scale < INT8_TINY, 0.0, scale)
    return q, torch.where(scale.isfinite(), scale, torch.nan)


def frozen_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor],
                  lora_b: Sequence[Tensor], scale: Sequence[float] | Tensor, gate: Tensor | None = None,
                  active: Sequence[bool] | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
                  segments: Sequence[int] | None = None, steps: int = 255, rotated: bool = False) -> Tensor:
    """Return `expert_linear` for an int8 weight, (..., N) in float64. The arithmetic is float64 too.

    For the frozen product, and for nothing else, each row of x is quantized by `quantize_rows`. The gradient of x is that of the
    function before quantization: dy (weight * weight_scale), plus that of the experts. Arguments not named here are those of
    `expert_linear`.

    Args:
        weight: (N, K), with whole numbers from -127 to 127.
        weight_scale: (N,).
        steps: The steps that a row of x is quantized in: 255, or up to 4095 where the kernels multiply 16-bit values
            (`QuantizedWeight.int8_steps`).
        rotated: Whether the weight was rotated before it was quantized. Then x is rotated too for the frozen product.
    """
    q, row_scale = quantize_rows(rotate(x.float()) if rotated else x, steps)
    product = (q.double() * row_scale.double()) @ (weight.double() * weight_scale.double().unsqueeze(1)).T
    zero = torch.zeros(weight.shape[0], weight.shape[1], dtype=torch.float64, device=x.device)
    lora_a, lora_b = [a.double() for a in lora_a], [b.double() for b in lora_b]
    gate = None if gate is None else gate.double()
    bias = None if bias is None else bias.double()
    return product + expert_linear(
        x.double(), zero, bias, lora_a, lora_b, scale, gate, active, dropout_p, seed, segments
    )


# The 4-bit formats. Along K a row is cut into groups, each with one float32 scale, and
#     W[n, k] = LEVELS[kind][code[n, k]] * scale[n, k // group].
# Two codes share a byte: the one at an even k lies in the low nibble. Scales stay float32: at 64 values a group a weight
# takes 4.5 bits, 14.1 % of fp32; quantizing the scales too (QLoRA) would save 1.2 of these points and costs a second
# rounding.
GROUP = 64
LEVELS = {
    # NormalFloat, of QLoRA (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, 0 and +-1 among them.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),  # fmt: skip
    # Whole numbers. The scale has the sign that puts the value of largest magnitude at -8, as in GGUF's Q4_0: so all 16
    # levels are used, and the error is smaller than with -7 to 7.
    "int4": tuple(map(float, range(-8, 8))),
}  # fmt: skip


def _of_groups(scale: Tensor, k: int, group: int) -> Tensor:
    """Return the scale of every column, (N, k), from the scales of the groups (N, ceil(k / group))."""
    return scale.repeat_interleave(group, dim=1)[:, :k]


def quantize_groups(weight: Tensor, kind: str, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantize a weight (N, K) to the 4-bit format `kind`, with one scale for every `group` values of a row.

    The last group of a row may be shorter than the others. A value divided by its scale, in float32, is rounded to the nearest level.
    Halfway between two levels it goes to the lower one in nf4, and to the even one in int4. A group of zeros has the scale 0.

    Returns the codes (N, K), uint8 from 0 to 15, and the scale (N, ceil(K / group)), float32.
    """
    weight = weight.float()
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % group)).view(n, -(-k // group), group)
    extreme = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    scale = extreme.abs() if kind == "nf4" else extreme / -8
    wide = _of_groups(scale, k, group)
    relative = torch.where(wide == 0, 0, weight / wide)
    if kind == "nf4":
        levels = torch.tensor(LEVELS["nf4"], device=weight.device)
        codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
    else:
        codes = torch.round(relative).clamp(-8, 7) + 8
    return codes.to(torch.uint8), scale


def dequantize_groups(codes: Tensor, scale: Tensor, kind: str, group: int = GROUP) -> Tensor:
    """Return the weight (N, K), float32, that codes and scale of `quantize_groups` stand for."""
    levels = torch.tensor(LEVELS[kind], device=codes.device)
    return levels[codes.long()] * _of_groups(scale, codes.shape[1], group)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes (N, K) two to a byte, (N, ceil(K / 2)) uint8, with the even column in the low nibble. An unused last nibble is 0."""
    even, odd = codes[:, ::2], torch.nn.functional.pad(codes[:, 1::2], (0, codes.shape[1] % 2))
    return even | odd << 4


def unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    """Return the codes (N, k), uint8, that `pack_nibbles` packed."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :k]


def groups_as_int8(codes: Tensor, scale: Tensor, kind: str, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Convert a 4-bit weight to the int8 weight that the CPU multiplies by. The result is that of `quantize_weight`.

    The scale of a group is rounded to 1/2048 of the largest one of its row, and a level to 1/1008 of the largest one of the format.
    The int8 value is the rounded product of these whole numbers (pmulhrsw on x86, sqrdmulh on Arm). It lies between -63 and 63, so
    that AVX2 can add two products in 16 bits.
    """
    top = max(map(abs, LEVELS[kind]))
    largest = scale.abs().amax(dim=1, keepdim=True)
    factor = torch.round(torch.where(largest == 0, 0, scale / largest) * 2048)
    level = torch.round(torch.tensor(LEVELS[kind], dtype=torch.float64, device=codes.device) / top * 1008)
    product = level.long()[codes.long()] * _of_groups(factor, codes.shape[1], group).long()
    return ((product + (1 << 14)) >> 15).float(), (largest * (top / 63)).squeeze(1)


def token_log_prob(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, scale: float = 1.0,
                   cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability that a head gives to one token at each position, computed from all logits at once.

        z = scale * (hidden weight^T + bias),  with a cap: z = cap * tanh(z / cap),  log_p = z[label] - logsumexp(z)

    Args:
        hidden: (n, D).
        weight: (V, D), the weight of the head.
        labels: (n,) int64, tokens from 0 to V - 1.
        bias: (V,), or None.
        scale, cap: As in the formula; None means no cap.

    Returns:
        log_p (n,); confidence (n, 2), which is the entropy in nats and the largest log-probability; and best (n,) int64, the first
        token that has the largest probability.
    """
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    log_p = logits.log_softmax(-1)
    confidence = torch.stack([-(log_p.exp() * log_p).sum(-1), log_p.amax(-1)], -1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), confidence, logits.argmax(-1)


def mixture_log_prob(log_p: Tensor, gate: Tensor) -> Tensor:
    """Return the log-probability of a mixture, (n,): log(sum over e of gate_e p_e), from log_p (n, E) and gates (n, E) that add up to 1."""
    return (gate * log_p.exp()).sum(-1).log()
