"""Self-supervised pretraining of a small Vision Transformer, once: labels are never read.

Two tasks, both on images of which the encoder sees some patches only, drawn at random:

- "mae", masked auto-encoding (He et al., arXiv 2111.06377): a one-block decoder fills in the pixels of the patches that
  were hidden, each patch normalized.
- "views", contrastive learning: two views of an image, cropped, mirrored, shaded and masked differently, must find each
  other among those of the whole batch (SimCLR: Chen et al., arXiv 2002.05709; masked views: Assran et al., 2204.07141).

Weights are written whole or not at all, as safetensors, under a name with a hash of all settings.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedms.config import registry
from fedms.data.cache import filling_cache, made_cache_dir
from fedms.models.vit import RECIPES, Recipe, build
from fedms.storage.durable import write_durably

WARM_UP = 0.1               # share of the steps over which the rate rises
VIEW_TEMPERATURE = 0.2      # of the contrastive loss
PROJECTION = 64             # width in which views are compared
DECODER_WIDTH = 64

Report = Callable[[int, int, float], None]      # (step, steps, loss)


def ensure(name: str, path: str | None = None, *, force: bool = False, report: Report | None = None) -> tuple[Path, bool]:
    """Pretrain the model `name` unless its weights exist. Return their file, and whether it was made now.

    Args:
        name: A key of `RECIPES`.
        path: Path of the model's data, as `data.path` of a run file.
        force: Whether to pretrain even if the weights exist.
        report: Called after each step with the step, the number of steps and the loss.

    Raises:
        DataError: If the data are missing.
        CacheError: If the file cannot be written.
    """
    recipe = RECIPES[name]
    file = recipe.weights(name)
    if file.exists() and not force:
        return file, False
    public_half = registry.load_object(registry.data_sets()[recipe.data].public_half)
    weights = pretrain(recipe, public_half(path), report)
    from safetensors.torch import save

    with filling_cache():
        made_cache_dir()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, save({key: tensor.contiguous() for key, tensor in weights.items()}))
    return file, True


def pretrain(recipe: Recipe, images: Tensor, report: Report | None = None) -> dict[str, Tensor]:
    """Return the weights of the network after `recipe.epochs` passes over images (n, 1, H, W) with pixels in [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = _Encoder(recipe)
        task = {"mae": _Mae, "views": _Views}[recipe.task](encoder)
        task.train()
        images = (images - recipe.mean) / recipe.std
        steps = recipe.epochs * max(1, len(images) // recipe.batch)
        optimizer = torch.optim.AdamW(task.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.05)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
        for step in range(steps):
            position = step % max(1, len(images) // recipe.batch)
            if position == 0:
                order = torch.randperm(len(images)).split(recipe.batch)
            loss = task(images[order[position]])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            rates.step()
            if report is not None:
                report(step + 1, steps, float(loss.detach()))
    return {name: tensor.detach().clone() for name, tensor in encoder.module.state_dict().items()}


def _rate(done: float) -> float:
    """Return the learning rate, as a share of the largest, after a share of the steps: a linear rise, then half a cosine."""
    if done < WARM_UP:
        return done / WARM_UP + 1e-3
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


class _Encoder(nn.Module):
    """The transformer on a random share of the patches."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.module = recipe, build(recipe)
        self.blocks = next(c for c in self.module.modules() if isinstance(c, nn.ModuleList) and len(c) == recipe.blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, k, width) of the visible patches of images (B, 1, H, W), and their places (B, k)."""
        visible = max(1, round(self.recipe.keep * self.recipe.patches))
        places = torch.rand(len(images), self.recipe.patches).argsort(1)[:, :visible]
        hidden = self.module.embeddings(images)
        hidden = torch.cat([hidden[:, :1], _take(hidden[:, 1:], places)], 1)
        for block in self.blocks:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden     # before transformers 5
        return self.module.layernorm(hidden)[:, 1:], places


class _Mae(nn.Module):
    def __init__(self, encoder: _Encoder) -> None:
        super().__init__()
        recipe, width = encoder.recipe, DECODER_WIDTH
        self.encoder, self.patch = encoder, recipe.patch
        self.enter, self.leave = nn.Linear(recipe.width, width), nn.Linear(width, recipe.patch**2)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(0.02 * torch.randn(recipe.patches, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        patches = patches.reshape(len(images), len(self.place), -1)
        target = F.layer_norm(patches, patches.shape[-1:], eps=1e-2)
        tokens, places = self.encoder(images)
        index = places.unsqueeze(-1)
        full = self.hidden.expand(len(images), *self.place.shape).scatter(
            1, index.expand(-1, -1, len(self.hidden)), self.enter(tokens))
        error = (self.leave(self.block(full + self.place)) - target).square().mean(-1)
        was_hidden = torch.ones_like(error).scatter(1, places, 0.0)
        return (error * was_hidden).sum() / was_hidden.sum()


class _Views(nn.Module):
    def __init__(self, encoder: _Encoder) -> None:
        super().__init__()
        width = encoder.recipe.width
        self.encoder = encoder
        self.project = nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, PROJECTION))

    def forward(self, images: Tensor) -> Tensor:
        views = torch.cat([self._view(images), self._view(images)])
        vectors = F.normalize(self.project(self.encoder(views)[0].mean(1)), dim=1)
        likeness = vectors @ vectors.T / VIEW_TEMPERATURE
        likeness = likeness.masked_fill(torch.eye(len(views), dtype=torch.bool), float("-inf"))
        return F.cross_entropy(likeness, torch.arange(len(views)).roll(len(images)))

    def _view(self, images: Tensor) -> Tensor:
        """Return each image cropped to 55 to 100 % of its side, sheared, perhaps mirrored, with changed contrast and brightness."""
        n, black = len(images), -self.encoder.recipe.mean / self.encoder.recipe.std

        def between(low: float, high: float) -> Tensor:
            return torch.empty(n).uniform_(low, high)

        size, aspect = between(0.55, 1.0), between(-0.2, 0.2).exp()
        mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if self.encoder.recipe.flips else torch.ones(n)
        shear = size * between(-0.15, 0.15)
        map_ = torch.stack([torch.stack([size * aspect * mirror, shear, (1 - size) * between(-1, 1)], 1),
                            torch.stack([-shear, size / aspect, (1 - size) * between(-1, 1)], 1)], 1)
        grid = F.affine_grid(map_, list(images.shape), align_corners=False)
        views = F.grid_sample(images - black, grid, align_corners=False) + black        # outside an image is black
        return views * between(0.6, 1.4).view(-1, 1, 1, 1) + between(-0.3, 0.3).view(-1, 1, 1, 1)


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    """Return the tokens (B, k, D) at places (B, k) of tokens (B, N, D)."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
