"""Small Vision Transformers (arXiv 2010.11929) for small gray images, whose weights `fedms pretrain` makes.

A recipe says all that the weights depend on: the shape of the network, the data and the training. Its weights are kept in
`cache_dir()` under a name that holds a hash of the recipe, so weights of another recipe are never taken for them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedms.config import ModelTable
from fedms.data.cache import cache_dir
from fedms.errors import ModelError

from .base import import_transformers, quiet_transformers
from .vision_model import VisionModel


@dataclass(frozen=True)
class Recipe:
    """A network and how it is pretrained.

    Attributes:
        data: The data set on whose public half it is pretrained.
        side, patch: Width of an image and of a patch, in pixels.
        width, blocks, heads: Width, number of blocks and number of attention heads of the transformer.
        pool: Features are the means over the patches of each cell of a pool x pool grid, so they depend on where something is in
            an image.
        mean, std: Mean and standard deviation of the pixels, by which the model normalizes them.
        task: "views" or "mae", see `fedms.models.pretrain`.
        keep: Share of the patches that the encoder sees in training.
        flips: Whether an image may be mirrored.
        epochs, batch, lr, seed: Passes over the data, images in a batch, largest learning rate and seed of the pretraining.
    """

    data: str
    side: int
    patch: int
    width: int
    blocks: int
    heads: int
    pool: int
    mean: float
    std: float
    task: str
    keep: float
    flips: bool
    epochs: int
    batch: int
    lr: float
    seed: int = 0

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return (self.side // self.patch) ** 2

    def weights(self, name: str) -> Path:
        """Return the path of the weights in the cache folder. It depends on the name and on the whole recipe."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "pretrained" / f"{name}-{digest}.safetensors"


RECIPES = {
    "vit-fashion": Recipe("fashion-mnist", side=28, patch=7, width=96, blocks=4, heads=4, pool=2, mean=0.286, std=0.353,
                          task="mae", keep=0.5, flips=True, epochs=6, batch=256, lr=1.5e-3),
    "vit-digits-pretrained": Recipe("digits", side=8, patch=2, width=64, blocks=4, heads=4, pool=2, mean=0.305, std=0.376,
                                    task="mae", keep=0.5, flips=False, epochs=60, batch=64, lr=1.5e-3),
}


def build(recipe: Recipe):
    """Return the network (transformers.ViTModel), with random weights drawn by the recipe's seed."""
    transformers = import_transformers()
    config = transformers.ViTConfig(
        image_size=recipe.side,
        patch_size=recipe.patch,
        num_channels=1,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return transformers.ViTModel(config, add_pooling_layer=False)


class PretrainedViT(VisionModel):
    """A vision transformer that `fedms pretrain` has pretrained.

    Args:
        name: A key of `RECIPES`.

    Raises:
        ModelError: If its weights do not exist yet, or are damaged.
    """

    def __init__(self, name: str) -> None:
        self.origin = RECIPES[name]
        self.pretrained_on = self.origin.data
        module = build(self.origin)
        _load(module, self.origin.weights(name), name)
        with quiet_transformers():
            size = {"height": self.origin.side, "width": self.origin.side}
            processor = import_transformers().ViTImageProcessor(size=size, do_normalize=False)
        super().__init__(name, module, processor)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features (B, pool^2 * width) float32: the means of the patch tokens of each cell after the final LayerNorm.

        The pixels are in [0, 1].
        """
        pixels = (inputs["pixel_values"] - self.origin.mean) / self.origin.std
        tokens = self.module(pixels).last_hidden_state[:, 1:]
        side = self.origin.side // self.origin.patch
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return nn.functional.avg_pool2d(grid, side // self.origin.pool).flatten(1)

    def save(self, folder: Path) -> None:
        raise ModelError(f"{self.name} pools its patches as no model of transformers does; export it in the format mixture, "
                         "which names it, or onnx")


def load(table: ModelTable) -> PretrainedViT:
    """Load the model."""
    return PretrainedViT(table.id)


def status_of_digits() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports on vit-digits-pretrained."""
    return _status("vit-digits-pretrained")


def status_of_fashion() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports on vit-fashion."""
    return _status("vit-fashion")


def _status(name: str) -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports on a model's weights."""
    file = RECIPES[name].weights(name)
    return ("ok", str(file)) if file.exists() else ("note", f"not pretrained yet: fedms pretrain {name}")


def _load(module, path: Path, name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise ModelError(f"model.id: {name} is not pretrained yet; run `fedms pretrain {name}` once") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path}: damaged weights ({error}); delete the file and run `fedms pretrain {name}`") from error
