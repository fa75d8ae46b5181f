"""Plans for layers that share their input on the CUDA kernels: one C++ call for each pass of all of them, prepared once for a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import device as devices
from .cuda_plan import GemmConfig, chip_of, choices

_kernels: Any = devices.cuda_kernels()


class GroupShape(NamedTuple):
    """The properties of a call that a plan depends on. The module `base` explains the names of sizes.

    Attributes:
        device: Device of all tensors.
        dtype: Dtype of x, the weights, y and dy: bf16 or fp16.
        fp32_experts: Whether A and B are float32; otherwise they have `dtype`.
        m, k: Number of rows and of input features.
        ns: Number of output features of each layer.
        ranks: Ranks of the experts of each layer.
    """

    device: torch.device
    dtype: torch.dtype
    fp32_experts: bool
    m: int
    k: int
    ns: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]


def obstacle(shape: GroupShape) -> str | None:
    """Return why the kernels cannot compute layers of a shape together, or None if they can."""
    if not 2 <= len(shape.ns) <= _kernels.MOST_SIBLINGS or not all(shape.ranks):
        return f"a group is 2 to {_kernels.MOST_SIBLINGS} layers with experts, and these are {len(shape.ns)}"
    rank = len(_kernels.owners_of_group(shape.ranks))
    tiles = _kernels.gemm_tiles(chip_of(shape.device), shape.m, sum(shape.ns), shape.k, rank, False, False, True)
    if not any(_kernels.overlaps_shrink(tile, rank) for tile in tiles):
        return (f"a group needs compute capability 9.0 and at most 64 ranks, where those of each layer count up to a multiple of 16; "
                f"these are {rank}")  # fmt: skip
    return None


class GroupPlan:
    """The forward and backward pass of layers that share their input, for all calls of one shape.

    The tiles of the two GEMMs are chosen by measurement at the first call on a GPU.

    Attributes:
        shape: The shape of all calls; `obstacle` finds nothing against it.
        room_size: Size of the buffer `room`, in values of the dtype of x: what the forward pass makes and the backward pass reads.
        forward: Writes every y and fills the room. Takes the arguments of `_C.cuda.GroupPlan.forward`, in order. Raises `Declined`
            if the kernels cannot read a tensor in place.
        backward: Writes the gradients. Takes the arguments of `_C.cuda.GroupPlan.backward`, in order; the last four are the
            gradients of x, of the gates side by side, of every A and of every B, None for those that are not needed.
    """

    def __init__(self, shape: GroupShape) -> None:
        self.shape = shape
        owners = torch.tensor(_kernels.owners_of_group(shape.ranks), dtype=torch.int32, device=shape.device)
        self._kernels = _kernels.GroupPlan(
            bf16=shape.dtype == torch.bfloat16, fp32_experts=shape.fp32_experts, m=shape.m, k=shape.k, ns=shape.ns, ranks=shape.ranks,
            chip=chip_of(shape.device), owners=owners,
        )  # fmt: skip
        self.room_size: int = self._kernels.room_size
        self._kernels.forward_tile = self._kernels.dx_tile = self._kernels.tiles[0]
        self.forward: Callable[..., None] = self._first_forward
        self.backward: Callable[..., None] = self._first_backward

    def s_of(self, room: torch.Tensor) -> list[torch.Tensor]:
        """Return the part of the filled room that is S of each layer, (M, sum of r_e)."""
        s = room[self._kernels.s_at :][: self.shape.m * self._kernels.rank].view(self.shape.m, -1)
        return [s[:, first : first + sum(ranks)] for first, ranks in zip(self._kernels.first_ranks, self.shape.ranks)]

    def _first_forward(self, *args: Any) -> None:
        """Choose the tile of the GEMM. When that is final, `forward` is the C++ function itself."""
        ys, room = args[-2:]
        if self._choose("forward_tile", lambda: self._kernels.forward(*args), [*ys, *self.s_of(room)]):
            self.forward = self._kernels.forward
        self._kernels.forward(*args)

    def _first_backward(self, *args: Any) -> None:
        """Choose the tile of a pass with dx. When that is final, `backward` is the C++ function itself."""
        dx, dgate, da, db = args[-4:]
        if dx is not None and self._choose("dx_tile", lambda: self._kernels.backward(*args), [dx, dgate, *da, *db]):
            self.backward = self._kernels.backward
        self._kernels.backward(*args)

    def _choose(self, name: str, run: Callable[[], None], written: Sequence[torch.Tensor | None]) -> bool:
        """Set the fastest tile of a GEMM, and return whether it is final.

        `run` computes the pass and writes the tensors `written`. A tile whose results differ from those of the first one is not taken.
        A shape that first occurs while a CUDA graph is captured is measured at its next call.
        """
        shape = self.shape
        m = 1 << (shape.m - 1).bit_length()
        key = ("group", name, str(shape.dtype), m, *shape.ns, shape.k, *shape.ranks, shape.fp32_experts)
        configs = [GemmConfig(tile, "overlapped") for tile in self._kernels.tiles]

        def run_with(config: GemmConfig) -> None:
            setattr(self._kernels, name, config.tile)
            run()

        def result_with(config: GemmConfig) -> list[torch.Tensor]:
            tensors = [tensor.fill_(float("nan")) for tensor in written if tensor is not None]
            run_with(config)
            return tensors

        found = choices(devices.properties(shape.device).capability)
        chosen = found.choose(shape.device, key, lambda: {str(config): config for config in configs}, run_with, result_with)
        setattr(self._kernels, name, chosen.tile)
        return not devices.is_capturing(shape.device)
