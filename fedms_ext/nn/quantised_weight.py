"""`QuantisedWeight`: the frozen weight of a linear layer as int8."""
from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fedms_ext import _C
from fedms_ext.reference import quantise_weight


class QuantisedWeight(nn.Module):
    """A weight (N, K) as int8 `q` (N, K) with one float32 `scale` (N,) an output channel: W is about q * scale.

    That is the logical form: the one in the `state_dict` (`q`, `scale`) and in a pickle, and the one that lies on a
    GPU. On the CPU `data` holds q packed for the instruction set in use instead, (bytes,) uint8, and nothing else
    is kept. `sha256` names the weight that it was made from.

    Args:
        weight: (N, K), any floating dtype; quantised symmetrically, row by row, in float32. It is not kept.

    Raises:
        ValueError: if the weight is no matrix or holds an infinity or a NaN.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.detach()
        if weight.dim() != 2:
            raise ValueError(f"the weight has the shape {tuple(weight.shape)}, expected (N, K)")
        if not weight.isfinite().all():
            raise ValueError("the weight holds an infinity or a NaN, so it cannot be quantised; repair it first")
        self.sha256 = tensor_sha256(weight)
        self._shape = tuple(weight.shape)
        q, scale = quantise_weight(weight)
        self._hold(q.to(torch.int8), scale)

    def _hold(self, q: Tensor, scale: Tensor) -> None:
        self.register_buffer("data", _pack(q) if q.device.type == "cpu" else q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._transposed: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._shape

    @property
    def q(self) -> Tensor:
        """(N, K) int8, unpacked."""
        return unpack(self.data, *self._shape)

    def dequantise(self) -> Tensor:
        """q * scale, (N, K) float32."""
        return self.q * self.scale.unsqueeze(1)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """The data and the scale (K,) of the transposed weight (K, N), for the gradient of a layer's input. It is
        quantised apart, one scale an input channel, from q * scale, when it is first asked for, and kept:
        there, and only then, torch.compile breaks its graph."""
        if self._transposed is None:
            # Not as a decorator: that would load torch._dynamo, 1.5 s, whenever this package is imported.
            torch.compiler.disable(self._transpose)()
        return self._transposed

    def _transpose(self) -> None:
        q, scale = quantise_weight(self.dequantise().T)
        q = q.to(torch.int8).contiguous()
        self._transposed = _pack(q) if q.device.type == "cpu" else q, scale

    @property
    def nbytes(self) -> int:
        """Bytes held, those of the transposed weight included."""
        return sum(t.nbytes for t in (self.data, self.scale, *(self._transposed or ())))

    # The packed form belongs to one machine, so only the logical one leaves it.

    def _apply(self, fn, recurse: bool = True) -> QuantisedWeight:
        moved = fn(self.scale)   # may also change the dtype, which is not for a quantised weight
        if moved.device != self.scale.device:
            self._hold(self.q.to(moved.device), self.scale.to(moved.device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "q"], destination[prefix + "scale"] = self.q, self.scale

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        found = {name: state_dict.get(prefix + name) for name in ("q", "scale")}
        missing += [prefix + name for name, tensor in found.items() if tensor is None]
        if None not in found.values():
            q, scale = found["q"], found["scale"]
            if q.dtype != torch.int8 or tuple(q.shape) != self._shape or scale.shape != self._shape[:1]:
                errors.append(f"{prefix}q is {q.dtype} {tuple(q.shape)} and {prefix}scale {tuple(scale.shape)}, "
                              f"expected int8 {self._shape} and {self._shape[:1]}")
            else:
                device = self.scale.device
                self._hold(q.to(device), scale.to(device, torch.float32))

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["_buffers"] = {"data": self.q, "scale": self.scale}
        state["_transposed"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._hold(self._buffers["data"], self._buffers["scale"])

    def extra_repr(self) -> str:
        return f"{self._shape[0]}, {self._shape[1]}, int8"


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _pack(q: Tensor) -> Tensor:
    packed = torch.empty(_C.int8_packed_size(*q.shape), dtype=torch.uint8)
    _C.int8_pack(q.contiguous(), packed)
    return packed


def unpack(data: Tensor, n: int, k: int) -> Tensor:
    """The logical form, (n, k) int8, of a weight's data in either form."""
    if data.dtype == torch.int8:
        return data
    q = torch.empty(n, k, dtype=torch.int8)
    _C.int8_unpack(data, q)
    return q
