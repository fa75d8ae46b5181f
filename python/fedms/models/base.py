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
from fedms_ext import budget, find_blocks
from fedms_ext.sparse.surgery import block_list


class FoundationModel:
    """A frozen pretrained encoder.

    name:                  as in the run file's model.id.
    module:                any module: eval mode, no parameter requires grad.
    blocks:                dotted name, inside `module`, of the list of transformer blocks.
    width:                 width of the hidden state that enters a block.
    feature_dim:           D, width of the pooled features.
    reads:                 "text" or "images".
    image_tokens:          tokens per image that the blocks see; None for text.
    pixel_shape:           (C, H, W) of an image as the model reads it; None for text.
    zero_shot_temperature: temperature of the cosine logits of a zero-shot text head; None where class prompts
                           cannot be embedded.
    pretrained_on:         the data set whose public half it was pretrained on, which its clients therefore do not have.
    fingerprint:           sha256 (hex) of the weights: names, dtypes, shapes, bytes.
    """

    reads: str
    prefix: str = ""        # dotted name of `module` inside the model that transformers saves, with a dot at its end
    transposed = False      # whether that model keeps the weights of its Linear layers transposed
    image_tokens: int | None = None
    pixel_shape: tuple[int, ...] | None = None
    zero_shot_temperature: float | None = None
    pretrained_on: str | None = None

    def __init__(self, name: str, module: nn.Module, feature_dim: int, blocks: str | None = None) -> None:
        """blocks: None finds the list by inspection. Raises ModelError if there is none."""
        self.name = name
        self.module = module.eval().requires_grad_(False)
        self.blocks = blocks or _block_list(module)
        self.width = _width(module, self.blocks)
        self.feature_dim = feature_dim
        self.fingerprint = fingerprint(module)

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the model, its own head included where it has one."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored, the attached experts and the model's own head included."""
        return budget.weight_bytes(self.module)

    def to(self, device: torch.device) -> None:
        """Moves the weights to a device."""
        self.module.to(device)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Pooled features (B, D) float32 of a batch made by `Dataset.inputs.batch`. Gradients flow through:
        what is trained inside `module`, and the caller's autograd mode, decide."""
        raise NotImplementedError

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        """Tokenize texts, at most `max_tokens` each, special tokens included. Text models only."""
        raise ModelError(f"model.id: {self.name} reads {self.reads}, not text")

    def prepare(self, images: Sequence[Any]) -> Tensor:
        """Bring PIL images to the size and channels that the model sees: (n, C, H, W), uint8 where
        `pixel_transform` does the rest, else float32. Image models only."""
        raise ModelError(f"model.id: {self.name} reads {self.reads}, not images")

    # (scale, shift), each (C, 1, 1): what the model sees of uint8 pixels is pixels * scale + shift.
    pixel_transform: tuple[Tensor, Tensor] | None = None

    def class_embeddings(self, prompts: tuple[tuple[str, ...], ...], max_tokens: int = 64) -> Tensor:
        """Unit vectors (C, D): per class the mean of its prompts' features, normalized (prompt ensembling as
        in CLIP, arXiv 2103.00020, section 3.1.4). Zero-shot logits are features @ class_embeddings.T /
        temperature.
        """
        with torch.no_grad():
            rows = [self.embed_texts(list(texts), max_tokens).mean(dim=0) for texts in prompts]
            return nn.functional.normalize(torch.stack(rows), dim=-1)

    def embed_texts(self, texts: list[str], max_tokens: int) -> Tensor:
        """(n, D) features of texts in the space of `features`."""
        inputs = self.tokenize(texts, max_tokens)
        return self.features(inputs.batch(torch.arange(len(inputs))))

    def save(self, folder: Path) -> None:
        """Write the model, before experts are attached, into a folder that `load` reads. ModelError where the
        module cannot be told from its weights."""
        raise ModelError(
            f"{self.name}: a {type(self.module).__name__} given as an object cannot be made again from files"
        )


def _block_list(module: nn.Module) -> str:
    """Its name differs between versions of transformers ("encoder.layer", "layers"), its length does not."""
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
    """sha256 (hex) of a module's weights and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def import_transformers():
    """transformers, or a ModelError that names the extra. Imported late: it takes seconds."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("transformers is missing; pip install 'fedms[train]'") from error
    return transformers


@contextmanager
def quiet_transformers():
    """No load report and no progress bar: weights that we leave out on purpose are no news."""
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
