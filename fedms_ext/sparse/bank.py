"""`ExpertBank`: many versions of one expert side by side, each for its own samples of a batch."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.lora import Experts
from fedms_ext.nn.pairs import Pairs
from fedms_ext.sparse.activation import segmented

Pair = tuple[nn.Parameter, nn.Parameter]


@dataclass(frozen=True)
class _Own:
    """What the bank exchanges in a layer; the names are those of the layer's attributes."""

    experts: Experts
    off: set[str]
    lora_a: Pairs
    lora_b: Pairs


class ExpertBank:
    """Versions of one expert, such as those of many users, that a model uses in the place of its own experts.

    A batch holds the samples of the first version, then those of the second one, and so on. Each layer computes one frozen
    product of all rows, and the small product of each pair for the rows of its own version (Punica and S-LoRA serve many
    adapters in this way: Chen et al., arXiv 2310.18547; Sheng et al., arXiv 2311.03285).

    Args:
        layers: The model's layers, as `expert_layers` returns them.
        expert: Name of the expert, which says rank and scale of all versions.
        versions: For each version the pair (A, B) of each layer that it is applied in, by the layer's name; the same layers in
            all versions. In other layers no expert is applied. The parameters are used, not copied: gradients arrive there.

    Raises:
        KeyError: If a layer has no such expert.
        ValueError: If the versions do not have pairs in the same layers, or a pair is not of the expert's shape.
    """

    def __init__(self, layers: Mapping[str, ExpertLinear], expert: str, versions: Sequence[Mapping[str, Pair]]) -> None:
        self.layers, self._names = list(layers.values()), [f"version_{number}" for number in range(len(versions))]
        for version in versions:
            if version.keys() != versions[0].keys():
                raise ValueError(f"the versions of {expert!r} have pairs in different layers: "
                                 f"{sorted(version.keys() ^ versions[0].keys())}")
        self._bank = [self._of(name, layer, expert, versions) for name, layer in layers.items()]

    def _of(self, layer_name: str, layer: ExpertLinear, expert: str, versions: Sequence[Mapping[str, Pair]]) -> _Own:
        lora, own = layer.experts[expert], _Own(Experts(), set(), Pairs(), Pairs())
        wanted = layer.lora_a[expert].shape, layer.lora_b[expert].shape
        for name, version in zip(self._names, versions):
            own.experts[name] = lora
            if layer_name not in version:
                own.off.add(name)
            a, b = version.get(layer_name, (layer.lora_a[expert], layer.lora_b[expert]))
            if (a.shape, b.shape) != wanted:
                raise ValueError(f"{name} of {layer_name}: A is {tuple(a.shape)} and B {tuple(b.shape)}, expected "
                                 f"{tuple(wanted[0])} and {tuple(wanted[1])}")
            own.lora_a[name], own.lora_b[name] = a, b
        return own

    @contextmanager
    def used(self, samples: Sequence[int]) -> Iterator[None]:
        """Let the layers use the versions in the place of their own experts, within the context.

        It changes the layers themselves, for all threads.

        Args:
            samples: The number of samples of each version in a batch. One without samples gets no gradient.
        """
        absent = {name for name, count in zip(self._names, samples) if count == 0}
        before = [_Own(layer.experts, layer.off, layer.lora_a, layer.lora_b) for layer in self.layers]
        self._exchange([replace(own, off=own.off | absent) for own in self._bank])
        try:
            with segmented(self.layers, samples):
                yield
        finally:
            self._exchange(before)

    def _exchange(self, owns: Sequence[_Own]) -> None:
        for layer, own in zip(self.layers, owns):
            layer.experts, layer.off, layer.lora_a, layer.lora_b = own.experts, own.off, own.lora_a, own.lora_b
