"""The resident foundation model (FM): one frozen module per process, shared by all clients."""

from __future__ import annotations

import hashlib
import logging
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedms.data.inputs import TextInputs


class ModelError(Exception):
    """A model that cannot be loaded. The message says what is missing and what to do."""


class FoundationModel:
    """A frozen pretrained encoder.

    name:                  as in the run file's model.id.
    module:                the Hugging Face module: eval mode, no parameter requires grad.
    blocks:                dotted name, inside `module`, of the list of transformer blocks.
    feature_dim:           D, width of the pooled features.
    reads:                 "text" or "images".
    image_tokens:          tokens per image that the blocks see; None for text.
    zero_shot_temperature: temperature of the cosine logits of a zero-shot text head; None without text.
    fingerprint:           sha256 (hex) of the weights: names, dtypes, shapes, bytes.
    """

    reads: str
    image_tokens: int | None = None
    zero_shot_temperature: float | None = None

    def __init__(self, name: str, module: nn.Module, feature_dim: int) -> None:
        self.name = name
        self.module = module.eval().requires_grad_(False)
        self.blocks = _block_list(module)
        self.feature_dim = feature_dim
        self.fingerprint = _fingerprint(module)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Pooled features (B, D) float32 of a batch made by `Dataset.inputs.batch`. Gradients flow through:
        what is trained inside `module`, and the caller's autograd mode, decide."""
        raise NotImplementedError

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        """Tokenise texts, at most `max_tokens` each, special tokens included. Text models only."""
        raise ModelError(f"model.id: {self.name} reads {self.reads}, not text")

    def class_embeddings(self, prompts: tuple[tuple[str, ...], ...], max_tokens: int = 64) -> Tensor:
        """Unit vectors (C, D): per class the mean of its prompts' features, normalised (prompt ensembling as
        in CLIP, arXiv 2103.00020, section 3.1.4). Zero-shot logits are features @ class_embeddings.T /
        temperature.
        """
        with torch.no_grad():
            rows = []
            for texts in prompts:
                inputs = self.tokenize(list(texts), max_tokens)
                rows.append(self.features(inputs.batch(torch.arange(len(inputs)))).mean(dim=0))
            return nn.functional.normalize(torch.stack(rows), dim=-1)


def _block_list(module: nn.Module) -> str:
    """Its name differs between versions of transformers ("encoder.layer", "layers"), its length does not."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == module.config.num_hidden_layers:
            return name
    raise ModelError(
        f"{type(module).__name__}: no list of {module.config.num_hidden_layers} transformer blocks in it"
    )


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
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
