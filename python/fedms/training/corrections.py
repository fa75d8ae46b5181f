"""The corrections that exact aggregation adds to frozen weights."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedms.tensors import Tensors
from fedms_ext import ExpertLinear


class Corrections:
    """Tensors `correction/<layer>` (N, K) that are added to frozen weights while the stream of an expert runs."""

    def __init__(self, layers: Mapping[str, ExpertLinear]) -> None:
        self.layers = layers
        self.tensors: Tensors = {}
        self.originals: Tensors = {}    # the weights of those layers without it
        self._shown = False

    def replace(self, tensors: Tensors) -> None:
        """Replace the corrections, without adding them to the weights yet.

        Raises:
            ValueError: If the weight of a layer is quantized, so that nothing can be added to it.
        """
        if tensors.keys() == self.tensors.keys() and all(t is self.tensors[n] for n, t in tensors.items()):
            return
        for name in tensors:
            if self._layer(name).frozen is not None:
                raise ValueError(f"{name} cannot be added to a quantized weight, whose values are made anew at every read; use "
                                 "model.frozen = fp32, or another aggregate.rule than exact")
        self.show(False)
        self.tensors = tensors
        self.originals = {name: self._weight(name).detach().clone() for name in tensors}

    @torch.no_grad()
    def show(self, shown: bool) -> None:
        """Set the weights of the layers with or without their corrections."""
        if shown == self._shown:
            return
        self._shown = shown
        for name, original in self.originals.items():
            self._weight(name).copy_(original + self.tensors[name].to(original.device) if shown else original)

    def below(self, depth: int) -> list[Tensor]:
        """Return the corrections of layers in the first `depth` blocks."""
        return [tensor for name, tensor in self.tensors.items() if self._layer(name).block <= depth]

    def _layer(self, name: str) -> ExpertLinear:
        return self.layers[name.removeprefix("correction/")]

    def _weight(self, name: str) -> Tensor:
        return self._layer(name).weight
