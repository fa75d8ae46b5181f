"""`QuantizedWeight`: the frozen weight of a linear layer in 16, 8 or 4 bits."""
from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

from fedms_ext import _C
from fedms_ext.quantization.formats import EIGHT_BITS, KINDS, dequantize, packed, quantize, unpacked
from fedms_ext.reference import GROUP, LEVELS, quantize_weight


class QuantizedWeight(nn.Module):
    """A weight (N, K) in 16, 8 or 4 bits, stored as `q` and a float32 `scale`::

        kind         q                       scale                  bits a weight (group 64)
        int8         (N, K) int8             (N,)                   8 and 32 / K
        int8_rotated like int8
        nf4, int4    (N, ceil(K / 2)) uint8  (N, ceil(K / group))   4.5
        fp16, bf16   (N, K) of that dtype    (N, 0)                 16

    int8 is symmetric: W is approximately q * scale. `fedms_ext.reference.LEVELS` defines the 4-bit formats. int8_rotated is
    for models whose activations have a few channels far larger than the others, as language models do: W is approximately
    `reference.rotate(q * scale)`, and the CPU rotates x before it quantizes it. K must be divisible by 4, or nothing is rotated.

    The table shows the logical form, which is used in the `state_dict`, in a pickle and on a GPU. On the CPU `data` holds q
    packed for the instruction set in use, (bytes,) uint8, except for fp16 and bf16. `sha256` identifies the original weight
    and `dtype` is its dtype. The `state_dict` holds both of them and the format in `identity`, and loads only into a weight
    of the same format.

    Args:
        weight: (N, K), any floating dtype; quantized in float32. It is not kept.
        kind: One of the formats above.
        group: Number of values that share a scale in the 4-bit formats, 32 or 64.

    Raises:
        ValueError: If the kind or the group is unknown, or if the weight is not a matrix, holds an infinity or a NaN, or
            has values beyond the range of fp16.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, kind: str = "int8", group: int = GROUP) -> None:
        super().__init__()
        weight = weight.detach().contiguous()
        if kind not in KINDS:
            raise ValueError(f"cannot quantize to {kind!r}; expected {', '.join(KINDS)}")
        if group not in (32, 64):
            raise ValueError(f"group is {group}, expected 32 or 64")
        if weight.dim() != 2:
            raise ValueError(f"the weight has the shape {tuple(weight.shape)}, expected (N, K)")
        if not weight.isfinite().all():
            raise ValueError("the weight holds an infinity or a NaN, so it cannot be quantized; repair it first")
        self.sha256, self.dtype = tensor_sha256(weight), weight.dtype
        self.kind, self.group = kind, group
        self._shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self._hold(*quantize(weight, kind, group))

    def _hold(self, q: Tensor, scale: Tensor) -> None:
        self.register_buffer("data", packed(q, scale, self.kind, self.group, self._shape[1]), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._transposed: tuple[Tensor, Tensor] | None = None
        self._transposed_of: tuple[int, int] | None = None   # the versions of data and scale that it was made from

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._shape

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """(data, scale), read without attribute access, which would take 2 us each: noticeable for an input of one row."""
        return self._buffers["data"], self._buffers["scale"]

    @property
    def q(self) -> Tensor:
        """The values in the logical form."""
        return unpacked(self.data, self.kind, *self._shape)

    @property
    def int8_steps(self) -> int:
        """Number of steps in which the CPU kernels quantize an input: to the integers from 0 to this one, see
        `reference.quantize_rows`."""
        return _C.int8_steps(self.data)

    def dequantize(self) -> Tensor:
        """Return the weight (N, K) in float32, with its quantization error."""
        return dequantize(self.data, self.scale, self.kind, self.group, self._shape[1])

    def for_dx(self) -> tuple[Tensor, Tensor]:
        """Return the data and the scale for computing the gradient of a layer's input.

        An int8 weight has one scale for each output channel, and the gradient of the input sums over output channels, so
        the scales cannot be factored out. The transposed weight (K, N) is therefore quantized separately from q * scale,
        with one scale for each input channel, at the first call, and kept. torch.compile breaks its graph at that first
        call only. The other formats return what the forward pass uses.
        """
        if self.kind not in EIGHT_BITS:
            return self.data, self.scale
        if self._transposed is None or (not torch.compiler.is_compiling() and self._transposed_of != self._versions()):
            # Not a decorator: importing this package would then import torch._dynamo, which takes 1.5 s.
            torch.compiler.disable(self._transpose)()
        return self._transposed

    def _versions(self) -> tuple[int, int]:
        """Return counters of in-place changes. Inference tensors have none, and cannot be changed outside of inference mode."""
        data, scale = (0 if t.is_inference() else t._version for t in self.operands)
        return data, scale

    def _transpose(self) -> None:
        self._transposed_of = self._versions()
        q, scale = quantize_weight(self.dequantize().T.contiguous())  # its rows are what a kernel reads
        self._transposed = packed(q.to(torch.int8), scale, "int8", self.group, self._shape[0]), scale

    @property
    def nbytes(self) -> int:
        """Bytes in memory, including the transposed weight."""
        return sum(t.nbytes for t in (self.data, self.scale, *(self._transposed or ())))

    # The packed form depends on the CPU, so only the logical form is saved and moved.

    def _apply(self, fn, recurse: bool = True) -> QuantizedWeight:
        moved = fn(self.scale)   # only the device counts: a change of dtype does not apply to a quantized weight
        if moved.device != self.scale.device:
            self._hold(self.q.to(moved.device), self.scale.to(moved.device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "q"], destination[prefix + "scale"] = self.q, self.scale
        destination[prefix + "identity"] = torch.tensor(list(self._identity().encode()), dtype=torch.uint8)

    def _identity(self) -> str:
        return f"{self._format()} {str(self.dtype).removeprefix('torch.')} {self.sha256}"

    def _format(self) -> str:
        return f"{self.kind}/{self.group}" if self.kind in LEVELS else self.kind

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        found = {name: state_dict.get(prefix + name) for name in ("q", "scale", "identity")}
        missing += [prefix + name for name, tensor in found.items() if tensor is None]
        if None not in found.values():
            q, scale, own = found["q"], found["scale"], self.q
            match = _IDENTITY.fullmatch(_text(found["identity"]))
            if match is None or match["format"] != self._format():
                told = repr(_text(found["identity"])[:100]) if match is None else match["format"]
                errors.append(f"{prefix}identity says {told}, expected a weight quantized to {self._format()}; quantize the "
                              "model to the format that was saved, then load")
            elif q.dtype != own.dtype or q.shape != own.shape or scale.shape != self.scale.shape:
                errors.append(f"{prefix}q is {q.dtype} {tuple(q.shape)} and {prefix}scale {tuple(scale.shape)}, expected "
                              f"{own.dtype} {tuple(own.shape)} and {tuple(self.scale.shape)} for {self.kind}")
            else:
                device = self.scale.device
                self._hold(q.to(device), scale.to(device, torch.float32))
                self.sha256, self.dtype = match["sha256"], getattr(torch, match["dtype"])

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["_buffers"] = {"data": self.q, "scale": self.scale}
        state["_transposed"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._hold(self._buffers["data"], self._buffers["scale"])

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.kind in LEVELS else ""
        return f"{self._shape[0]}, {self._shape[1]}, {self.kind}{group}"


_IDENTITY = re.compile(r"(?P<format>[a-z0-9_/]+) (?P<dtype>float64|float32|float16|bfloat16) (?P<sha256>[0-9a-f]{64})")


def _text(tensor: Tensor) -> str:
    """Decode a uint8 tensor as text; return an empty string for any other or a longer tensor."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > 256:
        return ""
    return bytes(tensor.tolist()).decode(errors="replace")


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    digest.update(data)  # type: ignore[arg-type]  # numpy's stubs: a buffer from 3.12 on
    return digest.hexdigest()
