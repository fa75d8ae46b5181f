"""The compiled kernels. They know no torch: tensors are looked at in place, for the length of a call.

Unless said otherwise tensors are float32, on the CPU and dense (row-major without gaps), their last dimension is the columns and
all others together are the rows; a tensor that is not raises ValueError, what is no tensor TypeError. Outputs are tensors that
the caller made. M rows, a layer (N, K), E experts of rank r_e, R the sum of the ranks. What is computed is described in
csrc/include/fedms/, and in float64 in `fedms_ext.reference`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

INTERFACE: str

def set_tensor_types(tensor: type, parameter: type, use_exchange: bool = True) -> bool:
    """Tells torch.Tensor and nn.Parameter. Returns whether tensors come in through DLPack's exchange API."""

def build_info() -> dict[str, Any]:
    """version, cuda (targets or None), isa_detected, isa_used, isa_available, bf16_products and openmp (its date) of this build."""

def set_isa(name: str) -> None:
    """Sets the instruction set of the CPU kernels. ValueError where it is unknown or not available here."""

# --- one call a pass, see fedms_ext/operators/plain.py

def linear_forward(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor],
    scale: Sequence[float], gate: Tensor | None, dropout_p: float, seed: int, segments: Sequence[int] | None = None,
    keeps_s: bool = True, product: Callable[..., Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """y (..., N) and s (M, R), new tensors, or None where an operand is not plain. s is None unless `keeps_s`.

    `weight` is (N, K) float32 with `weight_scale` None, or packed, (bytes,) uint8, with its scale: (N,) for int8, (N, groups)
    for 4 bits. `gate` is x.shape[:-1] + (E,), of any strides, or None. `segments` are the numbers of rows that each expert takes
    alone; only without a gate and dropout, and s then is (M, 0).

    PyTorch multiplies more than a few rows (none to four, by the instruction set) by a float32 weight: `product(x, weight, bias,
    rows, rank, experts, dropout_p)` is called when all operands are known to be plain, and returns x W^T + bias, which then is y,
    or None to decline the call. Without `product` such calls are declined.
    """

def linear_backward(
    dy: Tensor, x: Tensor | None, k: int, weight: Tensor | None, weight_scale: Tensor | None, a: Sequence[Tensor],
    b: Sequence[Tensor], scale: Sequence[float], gate: Tensor | None, dropout_p: float, seed: int, s: Tensor | None,
    needs: Sequence[bool], product: Callable[..., Tensor | None] | None = None,
) -> list[Tensor | None] | None:  # fmt: skip
    """dx, dgate, every dA and every dB, None where `needs`, in the same order, is False; or None as above.

    `weight` and its scale are what dx comes from: of int8 the transposed weight, quantized apart. 4 bits are declined with
    more than `nibbles_few_rows` rows. `product(dy, weight, rows, rank, experts, dropout_p)` returns dy W, or None, as above.
    """

def siblings_forward(x: Tensor, layers: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor]] | None:
    """y and s of each of several layers of one x, or None as above, or if a weight is not packed.

    Each of `layers` is (weight, weight_scale, bias, a, b, scale, gate, dropout_p, seed), as for `linear_forward`.
    """

def siblings_backward(
    x: Tensor | None, k: int, layers: Sequence[tuple[Any, ...]], needs_dx: bool
) -> tuple[Tensor | None, list[list[Tensor | None]]] | None:
    """dx, the sum over all layers, and for each of them [None, dgate, every dA, every dB]; or None as above, or if a weight is not
    int8.

    Each of `layers` is (dy, weight, weight_scale, a, b, scale, gate, dropout_p, seed, s, needs), as for `linear_backward`.
    """

# --- attention of short sequences, csrc/include/fedms/attention.h

def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, rounded: bool
) -> tuple[Tensor, Tensor] | None:
    """out (batch, queries, heads, width) and the softmax's constants (rows, 2), new tensors, or None where an operand is not
    plain. q, k and v are (batch, heads, rows, width), float32, dense along width; the mask is added and may be expanded. If
    `rounded`, products round their operands to bfloat16 where the CPU multiplies such values."""

def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, rounded: bool,
    softmax: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """dq, dk and dv, each (batch, rows, heads, width), or None as above."""

# --- the norm of rows, csrc/include/fedms/rms_norm.h

def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """weight x / sqrt(mean(x^2) + epsilon) of every row of x (..., D), a new tensor, or None where an operand is not plain."""

# --- the LoRA branch beside a frozen product of others, csrc/include/fedms/lora.h

def lora_forward(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], gate: Tensor | None, dropout_p: float,
    seed: int, s: Tensor, y: Tensor, first_row: int = 0,
) -> None:  # fmt: skip
    """Writes s (M, R) and adds the branch to y (M, N). `first_row`: where these rows lie in the layer's dropout mask."""

def lora_backward(
    dy: Tensor, x: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], gate: Tensor | None,
    s: Tensor | None, dropout_p: float, seed: int, dx: Tensor | None, dgate: Tensor | None, da: Sequence[Tensor | None],
    db: Sequence[Tensor | None], first_row: int = 0,
) -> None:  # fmt: skip
    """Adds to dx, which holds dy W, and writes dgate (M, E), every dA and dB; None for what is not needed."""

# --- layers with a weight of 8 or 4 bits, csrc/include/fedms/int8.h

def int8_packed_size(n: int, k: int) -> int:
    """Bytes of a packed int8 weight (n, k)."""

def int8_pack(weight: Tensor, packed: Tensor, rotated: int = 0) -> None:
    """Packs weight (N, K) int8 into packed (bytes,) uint8, for the instruction set used now. rotated: values of a block of x that
    are rotated before x is quantized, 4, 16 or 64 and a divisor of K; 0: none."""

def int8_unpack(packed: Tensor, weight: Tensor) -> None:
    """The inverse of `int8_pack`. ValueError where `packed` is no packed (N, K) weight."""

def int8_steps(packed: Tensor) -> int:
    """In how many steps x is quantized for this packed weight of 8 or 4 bits."""

def nibbles_few_rows() -> int:
    """Up to how many rows `nibbles_input_gradient` is faster than a product with the weight written out."""

def nibbles_input_gradient(dy: Tensor, packed: Tensor, scale: Tensor, dx: Tensor) -> None:
    """Writes dx (M, K) = dy (M, N) W from a packed 4-bit weight and its scale (N, groups)."""

def int8_forward(
    x: Tensor, packed: Tensor, weight_scale: Tensor | None, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor],
    scale: Sequence[float], gate: Tensor | None, dropout_p: float, seed: int, s: Tensor, y: Tensor,
) -> None:  # fmt: skip
    """Writes s (M, R) and y (M, N). `weight_scale` is (N,) for int8 and None for 4 bits, which have theirs inside."""

def int8_backward(
    dy: Tensor, x: Tensor | None, k: int, packed_t: Tensor | None, weight_t_scale: Tensor | None, a: Sequence[Tensor],
    b: Sequence[Tensor], scale: Sequence[float], gate: Tensor | None, s: Tensor | None, dropout_p: float, seed: int,
    dx: Tensor | None, dgate: Tensor | None, da: Sequence[Tensor | None], db: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Writes dx (M, K), dgate, every dA and dB; None for what is not needed. `packed_t`: W^T (K, N), quantized apart."""

def nibbles_packed_size(n: int, k: int, group: int) -> int:
    """Bytes of a packed 4-bit weight (n, k) with one scale for every `group` (32 or 64) values of a row."""

def nibbles_pack(k: int, group: int, levels: Sequence[float], q: Tensor, scale: Tensor, packed: Tensor) -> None:
    """Packs codes q (N, ceil(k / 2)) uint8, two a byte, of 16 levels, and scale (N, ceil(k / group))."""

def nibbles_unpack(k: int, packed: Tensor, q: Tensor) -> None:
    """The codes of a packed weight; its scale does not come back."""

def nibbles_dequantize(group: int, packed: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Writes the weight (N, K)."""

# --- few rows of a 16-bit weight, csrc/include/fedms/half.h

def fp16_forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (M, N) from weight (N, K) float16."""

def bf16_forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """The same from bfloat16."""

# --- csrc/include/fedms/token_loss.h

def token_log_prob(
    hidden: Tensor, weight: Tensor | None, packed: Tensor | None, weight_scale: Tensor | None, bias: Tensor | None,
    labels: Tensor, scale: float, cap: float, chunk: int, work: Tensor, log_p: Tensor, confidence: Tensor, best: Tensor,
    gradient: Tensor | None,
) -> None:  # fmt: skip
    """Writes log_p (n,), confidence (n, 2), best (n,) int64 and, unless it is None, gradient (n, d) of n hidden states (n, d)
    and their labels (n,) int64. `work` is (chunk, TOKEN_STRETCH)."""

TOKEN_STRETCH: int

# The plans of csrc/include/fedms/cuda_layer.h, where the build has CUDA kernels; fedms_ext/backends/cuda_plan.py is their only user.
cuda: Any
