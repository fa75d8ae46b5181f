"""Vision models in Hugging Face's format, alone or beside a text tower."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedms.errors import ModelError

from .base import FoundationModel, fingerprint, import_transformers
from .pretrained import first_lines, save_pretrained

# Pairs of an image and a text tower: the class of the pair, the class of the image tower alone.
TWO_TOWERS = {
    "clip": ("CLIPModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipModel", "SiglipVisionModel"),
}


class VisionModel(FoundationModel):
    """A vision model.

    Args:
        name: Name of the model.
        module: A vision model of transformers.
        processor: Its image processor.
        pooling: "mean" over patches, or "cls" (the class token); "auto" is the model's own pooled output if it has one,
            otherwise the class token, otherwise the mean.
        blocks: Dotted name of the list of its blocks; None to find it.

    Raises:
        ModelError: If the model does not suit the pooling, or cannot read the images that its processor makes.
    """

    reads = "images"

    def __init__(self, name: str, module: nn.Module, processor: Any, *, pooling: str = "auto",
                 blocks: str | None = None) -> None:
        if pooling == "last":
            raise ModelError('model.pooling: "last" is for text; accepted for images: "auto", "mean", "cls"')
        self.processor, self.pooling = processor, pooling
        self.channels = getattr(module.config, "num_channels", 3)
        names = [n.rsplit(".", 1)[-1] for n, _ in module.named_parameters()]
        has_class = "cls_token" in names or "class_embedding" in names
        self.class_tokens = has_class + (getattr(module.config, "num_register_tokens", None) or 0)
        if pooling == "cls" and not has_class:
            raise ModelError(f'model.pooling: {name} has no class token; accepted: "auto", "mean"')
        self.module = module.eval()
        super().__init__(name, module, self._probe(), blocks)
        self.image_tokens = _tokens_in_blocks(self)
        self.pixel_transform = self._transform()

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the pooled features (B, D) float32, not normalized."""
        out = self.module(**inputs)
        pooled = getattr(out, "pooler_output", None)
        if self.pooling == "auto" and pooled is not None:
            return pooled.flatten(1)
        if self.pooling == "mean" or not self.class_tokens:
            return out.last_hidden_state[:, self.class_tokens:].mean(dim=1)
        return out.last_hidden_state[:, 0]

    def prepare(self, images: Sequence[Any]) -> Tensor:
        # Rescaling and normalizing is affine, so it is left for the batch: pixels stay uint8, a quarter of the memory.
        return self._process(images, do_rescale=False, do_normalize=False)

    def _process(self, images: Sequence[Any], **steps: bool) -> Tensor:
        mode = "L" if self.channels == 1 else "RGB"
        arrays = [_array(image.convert(mode)) for image in images]
        processed = self.processor(images=arrays, input_data_format="channels_last", return_tensors="pt", **steps)
        return processed["pixel_values"]

    def _probe(self) -> int:
        """Return the width of the features, found by running a gray image."""
        from PIL import Image

        pixels = self._process([Image.new("L", (32, 32), 128)])
        self.blank, self.pixel_shape = {"pixel_values": pixels.float()}, tuple(pixels.shape[1:])
        try:
            with torch.no_grad():
                return self.features(self.blank).shape[-1]
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{type(self.module).__name__}: cannot read the image that its processor makes, "
                f"{tuple(pixels.shape[1:])}: {error}"
            ) from error

    def _transform(self) -> tuple[Tensor, Tensor]:
        steps = self.processor
        channels = (self.channels, 1, 1)
        factor = steps.rescale_factor if steps.do_rescale else 1.0
        mean = torch.tensor(steps.image_mean if steps.do_normalize else 0.0).expand(self.channels)
        std = torch.tensor(steps.image_std if steps.do_normalize else 1.0).expand(self.channels)
        return (factor / std).view(channels), (-mean / std).view(channels)

    def save(self, folder: Path) -> None:
        save_pretrained(folder, self.module, self.processor)

    def recipe(self, base: str, max_tokens: int, adapted: str | None) -> list[str]:
        mode = "L" if self.channels == 1 else "RGB"
        return first_lines(self.module, base, adapted) + [
            f'processor = transformers.AutoImageProcessor.from_pretrained({base}, backend="pil")',
            f'inputs = processor([image.convert("{mode}") for image in images], return_tensors="pt")',
            f"out = model(**inputs)\nfeatures = {self._pooled}"]

    @property
    def _pooled(self) -> str:
        if self.pooling == "auto" and getattr(self.module(**self.blank), "pooler_output", None) is not None:
            return "out.pooler_output.flatten(1)"
        if self.pooling == "mean" or not self.class_tokens:
            return f"out.last_hidden_state[:, {self.class_tokens}:].mean(1)"
        return "out.last_hidden_state[:, 0]"


class TwoTowerModel(VisionModel):
    """A model like CLIP. Its image tower reads images, and experts are attached to it; its text tower embeds class prompts.

    The zero-shot temperature is the one that the model has learned.
    """

    def __init__(self, name: str, pair: Any, tokenizer: Any, processor: Any, *, blocks: str | None = None) -> None:
        transformers = import_transformers()
        self.pair, self.tokenizer = pair.eval().requires_grad_(False), tokenizer
        kind = getattr(transformers, TWO_TOWERS[pair.config.model_type][1])
        tower = pair.vision_model
        if not isinstance(tower, kind):  # the tower is that and a projection
            with torch.device("meta"):
                tower = kind(pair.config.vision_config)
            for child, _ in tower.named_children():
                setattr(tower, child, getattr(pair, child))
        super().__init__(name, tower, processor, blocks=blocks)
        self.fingerprint = fingerprint(pair)
        self.zero_shot_temperature = math.exp(-float(pair.logit_scale))

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features (B, D) float32, L2-normalized, in the space that both towers share."""
        out = self.module(**inputs)
        pooled = out.image_embeds if "image_embeds" in out else out.pooler_output
        return nn.functional.normalize(pooled, dim=-1)

    def embed_texts(self, texts: list[str], max_tokens: int) -> Tensor:
        config = self.pair.config.text_config
        inputs = self.tokenizer(
            texts,
            # SigLIP was trained on texts padded to the full length, with the padding read.
            padding="max_length" if self.pair.config.model_type == "siglip" else True,
            truncation=True,
            max_length=min(config.max_position_embeddings, self.tokenizer.model_max_length),
            return_tensors="pt",
        )
        accepted = inspect.signature(self.pair.get_text_features).parameters
        if self.pair.config.model_type == "siglip":
            inputs.pop("attention_mask", None)
        out = self.pair.get_text_features(**{k: v for k, v in inputs.items() if k in accepted})
        return nn.functional.normalize(out if isinstance(out, Tensor) else out.pooler_output, dim=-1)

    def save(self, folder: Path) -> None:
        save_pretrained(folder, self.pair, self.tokenizer, self.processor)

    @property
    def _pooled(self) -> str:
        name = "image_embeds" if self.pair.config.model_type == "clip" else "pooler_output"
        return f"torch.nn.functional.normalize(out.{name}, dim=-1)"


def _array(image: Any):
    import numpy as np

    array = np.array(image)
    return array if array.ndim == 3 else array[..., None]


def _tokens_in_blocks(model: VisionModel) -> int:
    """Return the length of the sequence that enters the first block for one image."""
    seen = []
    block = cast(nn.ModuleList, model.module.get_submodule(model.blocks))[0]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape) if args else None)
    try:
        with torch.no_grad():
            model.features(model.blank)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0]) != 3:
        raise ModelError(
            f"{type(model.module).__name__}: its blocks {model.blocks!r} get "
            f"{'no hidden state' if not seen else f'one of shape {tuple(seen[0])}'}; expected (batch, tokens, width), as in "
            "a plain Vision Transformer. model.blocks names another list"
        )
    return seen[0][1]
