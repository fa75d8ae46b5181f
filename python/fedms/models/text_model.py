"""Text encoders in Hugging Face's format, and decoders that are read as such."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedms.data.inputs import TextInputs
from fedms.errors import DataError, ModelError

from .base import FoundationModel
from .pretrained import first_lines, save_pretrained


class TextModel(FoundationModel):
    """A text encoder, or a decoder that is used as one.

    Features are L2-normalized, as those of sentence encoders are, so that class prompts can be compared with them.

    Args:
        name: Name of the model.
        module: A text model of transformers.
        tokenizer: Its tokenizer.
        pooling: "mean" over real tokens, "cls" (the first token) or "last" (the last real token); "auto" is "last" for a
            decoder and "mean" otherwise.
        blocks: Dotted name of the list of its blocks; None to find it.
    """

    reads = "text"
    # The cosine scale of 20 with which sentence encoders are trained (multiple-negatives ranking loss).
    zero_shot_temperature = 0.05

    def __init__(self, name: str, module: nn.Module, tokenizer: Any, *, pooling: str = "auto",
                 blocks: str | None = None) -> None:
        config: Any = module.config
        super().__init__(name, module, config.hidden_size, blocks)
        config.use_cache = False  # a decoder would keep keys and values for tokens that never come
        self.tokenizer = tokenizer
        self.pooling = pooling if pooling != "auto" else "last" if _is_decoder(module.config) else "mean"
        self.max_tokens = most_tokens(module, tokenizer)
        self.accepted = set(inspect.signature(module.forward).parameters)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the pooled features (B, D) float32, L2-normalized."""
        hidden, mask = self.module(**inputs).last_hidden_state, inputs["attention_mask"]
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            # No sequence is empty, so the sum of the mask is never zero.
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            position = 0 if self.pooling == "cls" else mask.sum(dim=1) - 1
            pooled = hidden[torch.arange(len(hidden)), position]
        return nn.functional.normalize(pooled, dim=-1)

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        if not 3 <= max_tokens <= self.max_tokens:
            raise DataError(
                f"data.max_tokens: expected 3 to {self.max_tokens} for {self.name}, got {max_tokens}"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"sample {i}: expected a text, got {text!r}")

        encoded = self.tokenizer(
            texts, padding=False, truncation=True, max_length=max_tokens, return_attention_mask=False
        )
        lengths = torch.tensor([len(row) for row in encoded["input_ids"]], dtype=torch.int64)
        offsets = torch.zeros(len(texts) + 1, dtype=torch.int64)
        torch.cumsum(lengths, dim=0, out=offsets[1:])
        fields = {
            name: torch.tensor([token for row in rows for token in row], dtype=torch.int64)
            for name, rows in encoded.items()
            if name in self.accepted
        }
        pad = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        return embeddable(TextInputs(fields, offsets, {name: pad[name] for name in fields}), self.name, self.module, self.tokenizer)

    def save(self, folder: Path) -> None:
        save_pretrained(folder, self.module, self.tokenizer)

    def recipe(self, base: str, max_tokens: int, adapted: str | None) -> list[str]:
        pooled = {"mean": "(hidden * mask).sum(1) / mask.sum(1)", "cls": "hidden[:, 0]",
                  "last": "hidden[torch.arange(len(hidden)), mask.sum(1)[:, 0] - 1]"}[self.pooling]
        return first_lines(self.module, base, adapted) + [
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({base})",
            f"inputs = tokenizer(texts, padding=True, padding_side=\"right\", truncation=True, max_length={max_tokens}, "
            'return_tensors="pt")',
            f"inputs = {{name: inputs[name] for name in {sorted({*self.accepted} & {*self.tokenizer.model_input_names})}}}",
            'hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)',
            f"features = torch.nn.functional.normalize({pooled}, dim=-1)"]


def embeddable(inputs: TextInputs, name: str, module: Any, tokenizer: Any) -> TextInputs:
    """Return tokenized texts whose tokens all have an embedding in the model, their padding too.

    Padding is masked, so any token will do where the tokenizer's own was never added to the model.

    Args:
        inputs: The texts.
        name: Name of the model.
        module: The model of transformers that reads them.
        tokenizer: The tokenizer that made them.

    Raises:
        ModelError: If a token has no embedding, as where tokens were added to the tokenizer alone.
    """
    known, tokens = module.get_input_embeddings().weight.shape[0], inputs.fields["input_ids"]
    if len(tokens) and (last := int(tokens.max())) >= known:
        raise ModelError(f"model.id: the tokenizer of {name} writes {tokenizer.convert_ids_to_tokens(last)!r} as token {last}, and the "
                         f"model has embeddings of the tokens 0 to {known - 1} alone; call model.resize_token_embeddings(len(tokenizer)), "
                         "and save both again, or use the model's own tokenizer")
    pad = inputs.pad_values["input_ids"]
    return replace(inputs, pad_values={**inputs.pad_values, "input_ids": pad if pad < known else 0})


def _is_decoder(config) -> bool:
    """Return whether a model reads from left to right: it is made for causal, and not for masked, language modeling."""
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    return (kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def most_tokens(module: nn.Module, tokenizer: Any) -> int:
    """Return the length, in tokens, of the longest text that a model and its tokenizer can read."""
    most = getattr(module.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, child in module.named_modules():
        # RoBERTa's positions begin after the padding index.
        if name.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            most -= child.padding_idx + 1
    return min(most, tokenizer.model_max_length)
