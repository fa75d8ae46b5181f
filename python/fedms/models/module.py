"""Any `nn.Module` with a declared list of blocks, given as an object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedms.data.inputs import TextInputs
from fedms.errors import ModelError

from .base import FoundationModel


class ModuleModel(FoundationModel):
    """A user's own module.

    Args:
        module: The module. It calls its blocks one after the other, each with the hidden state (B, T, width) as first argument.
        blocks: Dotted name of its `nn.ModuleList` or `nn.Sequential` of blocks.
        features: `features(module, inputs)` returns the features (B, D) float32. For images `inputs` holds "pixel_values"
            (B, C, H, W), for text what `tokenize` returned.
        prepare: For a module that reads images: takes PIL images, returns (n, C, H, W) float32.
        tokenize: For a module that reads text: takes texts and the largest number of tokens, returns `TextInputs`.
        name: Name of the model.

    Raises:
        ModelError: If not exactly one of `prepare` and `tokenize` is given, or there is no list of blocks with that name.
    """

    def __init__(self, module: nn.Module, *, blocks: str, features: Callable[[nn.Module, dict[str, Tensor]], Tensor],
                 prepare: Callable[[Sequence[Any]], Tensor] | None = None,
                 tokenize: Callable[[list[str], int], TextInputs] | None = None, name: str = "module") -> None:
        if (prepare is None) == (tokenize is None):
            raise ModelError(f"{name}: give one of prepare= (it reads images) and tokenize= (it reads text)")
        self.module, self._features, self._prepare, self._tokenize = module.eval(), features, prepare, tokenize
        self.reads = "text" if prepare is None else "images"
        self.zero_shot_temperature = 0.05 if prepare is None else None
        seen: list[torch.Size] = []
        try:
            first = cast(nn.ModuleList, module.get_submodule(blocks))[0]
            handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        except (AttributeError, TypeError, IndexError):
            raise ModelError(f"{name}: the module has no list of blocks at {blocks!r}") from None
        try:
            with torch.no_grad():
                probe = self.features(self._probe())
        finally:
            handle.remove()
        if probe.dim() != 2 or probe.dtype != torch.float32 or len(seen) != 1 or len(seen[0]) != 3:
            raise ModelError(f"{name}: features are {probe.dtype} of shape {tuple(probe.shape)} and the first block gets "
                             f"{[tuple(shape) for shape in seen]}; expected float32 (B, D), and one (B, T, width)")
        super().__init__(name, module, probe.shape[1], blocks)
        self.image_tokens = seen[0][1] if self.reads == "images" else None

    def _probe(self) -> dict[str, Tensor]:
        if self.reads == "text":
            return self.tokenize(["text"], 8).batch(torch.tensor([0]))
        from PIL import Image

        pixels = self.prepare([Image.new("RGB", (32, 32))])
        self.pixel_shape = tuple(pixels.shape[1:])
        return {"pixel_values": pixels}

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._features(self.module, inputs)

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        return super().tokenize(texts, max_tokens) if self._tokenize is None else self._tokenize(texts, max_tokens)

    def prepare(self, images: Sequence[Any]) -> Tensor:
        return super().prepare(images) if self._prepare is None else self._prepare(images)
