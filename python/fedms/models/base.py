"""The resident foundation model (FM): one frozen module per process, shared by all clients."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedms.data.inputs import TextInputs
from fedms.errors import ModelError
from fedms_ext import budget, find_blocks, use_attention
from fedms_ext.sparse.surgery import block_list


class FoundationModel:
    """A frozen pretrained model, and what is known of it.

    Attributes:
        name: Its name, as in `model.id` of the run file.
        module: The module, in evaluation mode; no parameter requires a gradient.
        blocks: Dotted name, inside `module`, of the list of transformer blocks.
        width: Width of the hidden state that enters a block.
        feature_dim: Width D of the pooled features.
        reads: "text", "images" or "conversations".
        image_tokens: Number of tokens for each image in the blocks; None for text.
        pixel_shape: Shape (C, H, W) of an image as the model reads it; None for text.
        zero_shot_temperature: Temperature of the cosine logits of a zero-shot text head; None if the model cannot embed class
            prompts.
        pretrained_on: The data set on whose public half the model was pretrained; clients do not get that half.
        fingerprint: SHA-256, in hexadecimal, of the names, dtypes, shapes and bytes of the weights.
    """

    reads: str
    prefix: str = ""        # dotted name of `module` inside the model that transformers saves, with a dot at its end
    transposed = False      # whether that model keeps the weights of its Linear layers transposed
    image_tokens: int | None = None
    pixel_shape: tuple[int, ...] | None = None
    zero_shot_temperature: float | None = None
    pretrained_on: str | None = None

    def __init__(self, name: str, module: nn.Module, feature_dim: int, blocks: str | None = None) -> None:
        """Wrap a module.

        Args:
            name: Its name, as in `model.id` of the run file.
            module: The module, which is set to evaluation mode and frozen.
            feature_dim: Width D of the pooled features.
            blocks: Dotted name of the list of transformer blocks, or None to find it by inspection.

        Raises:
            ModelError: If there is no list of blocks.
        """
        self.name = name
        self.module = module.eval().requires_grad_(False)
        use_attention(module)
        self.blocks = blocks or _block_list(module)
        self.width = _width(module, self.blocks)
        self.feature_dim = feature_dim
        self.fingerprint = fingerprint(module)

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the model, including those of its own head."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weights, including those of attached experts and of the model's own head."""
        return budget.weight_bytes(self.module)

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        self.module.to(device)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the pooled features (B, D) float32 of a batch that `Dataset.inputs.batch` made.

        They are differentiable by the trained parameters inside `module`, unless the caller turned gradients off.
        """
        raise NotImplementedError

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        """Tokenize texts, at most `max_tokens` each, special tokens included. Text models only."""
        raise ModelError(f"model.id: {self.name} reads {self.reads}, not text")

    def prepare(self, images: Sequence[Any]) -> Tensor:
        """Bring PIL images to the size and number of channels that the model reads. Image models only.

        Returns:
            (n, C, H, W), uint8 if `pixel_transform` does the rest, otherwise float32.
        """
        raise ModelError(f"model.id: {self.name} reads {self.reads}, not images")

    # (scale, shift), each (C, 1, 1): what the model sees of uint8 pixels is pixels * scale + shift.
    pixel_transform: tuple[Tensor, Tensor] | None = None

    def class_embeddings(self, prompts: tuple[tuple[str, ...], ...], max_tokens: int = 64) -> Tensor:
        """Return a unit vector for each class, (C, D): the normalized mean of the features of its prompts.

        This is the prompt ensembling of CLIP (arXiv 2103.00020, section 3.1.4). Zero-shot logits are
        features @ class_embeddings.T / temperature.
        """
        with torch.no_grad():
            rows = [self.embed_texts(list(texts), max_tokens).mean(dim=0) for texts in prompts]
            return nn.functional.normalize(torch.stack(rows), dim=-1)

    def embed_texts(self, texts: list[str], max_tokens: int) -> Tensor:
        """Return the features (n, D) of texts, in the space of `features`."""
        inputs = self.tokenize(texts, max_tokens)
        return self.features(inputs.batch(torch.arange(len(inputs))))

    def save(self, folder: Path) -> None:
        """Write the model, before experts are attached, into a folder that `load` reads.

        Raises:
            ModelError: If the weights alone do not define the module.
        """
        raise ModelError(
            f"{self.name}: a {type(self.module).__name__} given as an object cannot be made again from files"
        )


def _block_list(module: nn.Module) -> str:
    """Return the dotted name of the list of blocks: one as long as the model has layers, otherwise one found by inspection.

    Its name differs between versions of transformers ("encoder.layer", "layers").
    """
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name
    try:
        return find_blocks(module)
    except ValueError as error:
        raise ModelError(f"model.blocks: {error}") from None


def _width(module: nn.Module, blocks: str) -> int:
    try:
        first = next(iter(block_list(module, blocks)))
        return next(m for m in first.modules() if isinstance(m, nn.Linear)).in_features
    except ValueError as error:
        raise ModelError(f"model.blocks: {error}") from None
    except StopIteration:
        raise ModelError(f"model.blocks: {blocks!r} in {type(module).__name__} holds no Linear layer") from None


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256, in hexadecimal, of the weights and persistent buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def import_transformers():
    """Import transformers, which takes seconds. Raise a ModelError that names the extra if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("transformers is missing; pip install 'fedms[train]'") from error
    return transformers


@contextmanager
def quiet_transformers():
    """Show no load report and no progress bar of transformers within the context."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
