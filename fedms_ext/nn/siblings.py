"""`group`: layers that are called with the same input one after the other, such as an attention's query, key and value."""
from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fedms_ext import backends
from fedms_ext.backends.device import ON_GPU, is_capturing
from fedms_ext.nn.seeds import draw_seed
from fedms_ext.operators.planned_siblings import GroupPlans
from fedms_ext.operators.siblings import Sibling, joined_dtype, sibling_linears

_MOST_CALLS = 64


class SharesInput:
    """A linear layer, a module, that can be computed together with others that read the same x.

    Attributes:
        in_features: Number of input features.
        siblings: The layers that share their input with this one, or None. Set by `fedms_ext.group`. `forward` asks it first.
    """

    in_features: int
    siblings: Siblings | None = None

    def as_sibling(self, x: Tensor) -> Sibling | None:
        """Return what this layer's output is computed from besides x, with the seed 0, or None if it has to be called for that."""
        raise NotImplementedError

    def sibling_kind(self) -> tuple[object, ...]:
        """Return what is cheap to read of what decides whether this layer can be computed together with others."""
        raise NotImplementedError

    def sibling_state(self) -> tuple[list[Tensor | None], tuple[object, ...]]:
        """Return what the output of this layer depends on besides x, now: all tensors, and all settings."""
        raise NotImplementedError


class _Held:
    """The outputs for one x that have been computed and not been asked for yet.

    Attributes:
        outputs: By the index of the layer: its output, and its state when the output was computed. Emptied when x is deleted.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, outputs: dict[int, tuple[Tensor, _State]]) -> None:
        self.outputs = outputs
        self._x, self._version = weakref.ref(x, lambda _: outputs.clear()), x._version
        self._mode = torch.is_grad_enabled(), x.requires_grad, dtype

    def take(self, index: int, layer: SharesInput, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the output of a layer and forget it; None if it is not here, or if something has changed since."""
        mode = torch.is_grad_enabled(), x.requires_grad, dtype
        same = self._x() is x and self._version == x._version and self._mode == mode
        if not same or index not in self.outputs:
            return None
        then, now = self.outputs[index][1], _State(layer)
        same = (len(now.tensors) == len(then.tensors) and all(map(is_, now.tensors, then.tensors))
                and now.versions == then.versions and now.settings == then.settings)
        return self.outputs.pop(index)[0] if same else None


class _State:
    """What the output of a layer depends on besides x, at one moment."""

    def __init__(self, layer: SharesInput) -> None:
        self.tensors, self.settings = layer.sibling_state()
        self.versions = [0 if t is None or t.is_inference() else t._version for t in self.tensors]


class Siblings:
    """Layers that share their input x. The first one that is called with x computes the outputs of all.

    The outputs of the others are held until they are asked for. They are used only for the same x, recognized by its identity and
    by its counter of changes in place, in the same thread, under the same modes of gradients and of autocast, and while the layer's
    tensors and settings are unchanged. Otherwise a layer is computed anew: so layers that do not share their input are never wrong,
    only slower. If the first outputs that are computed together are not all asked for, the layers are no siblings, and each is
    computed by itself from then on.

    Args:
        layers: At least two layers with the same number of input features.
        on_cpu: Whether to compute them together on a CPU, too. On a GPU they are where that was measured to be faster.
    """

    def __init__(self, layers: Sequence[SharesInput], on_cpu: bool = True) -> None:
        self.layers, self.on_cpu = tuple(layers), on_cpu
        self._start()

    def _start(self) -> None:
        self.together: bool | None = None     # whether the layers have proved to share their input; None: not known yet
        self.plans: GroupPlans = {}           # what the CUDA kernels keep for the group
        self._apart: set[tuple[object, ...]] = set()   # the calls on a GPU that are computed one by one
        self._of_thread = threading.local()
        self._numbers = {id(layer): number for number, layer in enumerate(self.layers)}

    def __getstate__(self) -> tuple[tuple[SharesInput, ...], bool]:
        return self.layers, self.on_cpu

    def __setstate__(self, state: tuple[tuple[SharesInput, ...], bool]) -> None:
        self.layers, self.on_cpu = state
        self._start()

    def part(self) -> None:
        """Let each layer compute its output by itself again."""
        for layer in self.layers:
            if layer.siblings is self:
                layer.siblings = None

    def output(self, layer: SharesInput, x: Tensor) -> Tensor | None:
        """Return the output of one of the layers, or None if it has to be computed by itself."""
        on_gpu = getattr(x, ON_GPU)
        if self.together is False or not (on_gpu or self.on_cpu):
            return None
        dtype = joined_dtype(x)
        if dtype is None:
            return None
        index = self._numbers.get(id(layer))
        if index is None:   # a copy of the layer
            return None
        held: _Held | None = getattr(self._of_thread, "held", None)
        if held is not None:
            y = held.take(index, layer, x, dtype)
            if y is None:
                self._missed(held)
            elif not held.outputs:
                self.together, self._of_thread.held = True, None
            if y is not None or self.together is False:
                return y
        call = self._call(x, dtype) if on_gpu else None
        if call in self._apart:
            return None
        y = self._compute(index, x, dtype)
        if y is None and call is not None and not is_capturing(x.device):
            if len(self._apart) >= _MOST_CALLS:
                self._apart.clear()
            self._apart.add(call)
        return y

    def _call(self, x: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
        """Return what is cheap to read of what decides whether a call on a GPU is computed one by one.

        If something else changes, such as the dropout of an expert, layers that could be computed together stay apart: that is slower,
        but never wrong.
        """
        kinds = [layer.sibling_kind() for layer in self.layers]
        return x.shape, x.dtype, dtype, x.device, x.requires_grad, backends.preference(), *kinds

    def _missed(self, held: _Held) -> None:
        """Drop the outputs that were held, since they are not those that are asked for."""
        self._of_thread.held = None
        # Activation checkpointing computes a layer twice, and both times it has to save the same tensors.
        if self.together is None and held.outputs and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            self.together = False

    def _compute(self, index: int, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        parts = [part for layer in self.layers if (part := layer.as_sibling(x)) is not None]
        if len(parts) < len(self.layers):
            return None
        drops = {part.dropout_p > 0 for part in parts}
        if len(drops) > 1:
            return None
        if True in drops and getattr(x, ON_GPU):   # before a seed is drawn: the CUDA kernels compute no group with dropout
            return None
        if True in drops:
            # One number from the generator, as for a layer by itself; each sibling makes a seed of its own from it.
            seed: Any = draw_seed(x)   # on the CPU it is a number
            parts = [part._replace(seed=(seed + i - index) % 2**63) for i, part in enumerate(parts)]
        ys = sibling_linears(self.plans, x, parts)
        if ys is None:
            return None
        others = {i: (y, _State(self.layers[i])) for i, y in enumerate(ys) if i != index}
        self._of_thread.held = _Held(x, dtype, others)
        return ys[index]
