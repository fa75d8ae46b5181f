"""What can be known of a model before it is loaded, from its name and the small files of its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedms.config import registry
from fedms.errors import ModelError
from fedms.foreign import parse_json, read_regular

from .pretrained import source_of

_CAUSAL = ("ForCausalLM", "LMHeadModel")        # how the classes of transformers with such a head are called
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class Look:
    """What the files of a model say.

    Attributes:
        reads: "text", "images" or "conversations"; None if the files do not say. A causal language model reads conversations, and
            can be trained to classify texts, too, unless it is built in.
        has_chat_template: Whether its tokenizer has a chat template, as far as can be seen.
        max_tokens: Length of the longest sequence, in tokens, or None if it is not known.
    """

    reads: registry.Content | None = None
    has_chat_template: bool = False
    max_tokens: int | None = None


def look(model_id: str) -> Look:
    """Look at a model that `model.id` names. Nothing is known of one on the hub.

    Raises:
        ModelError: If it is a folder that holds no model in Hugging Face's format, or one that is not there.
    """
    row = registry.models().get(model_id)
    if row is not None:
        return Look(row.reads, has_chat_template=row.reads == "conversations")
    if model_id.lower().endswith(".gguf"):
        return Look("conversations")
    folder = Path(source_of(model_id))
    if not folder.is_dir():
        return Look()
    config, tokenizer = _fields(folder / "config.json"), _fields(folder / "tokenizer_config.json")
    inner = config.get("text_config")
    sizes = [*(found.get(key) for found in (config, inner if isinstance(inner, dict) else {}) for key in _LENGTHS),
             tokenizer.get("model_max_length")]
    causal = any(str(name).endswith(_CAUSAL) for name in config.get("architectures") or ())
    return Look("conversations" if causal and not config.get("is_encoder_decoder") else None,
                bool(tokenizer.get("chat_template")) or any(folder.glob("chat_template.*")),
                min((size for size in sizes if isinstance(size, int)), default=None))


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file, none if it is not there."""
    if not path.exists():
        return {}
    try:
        found = parse_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.id: {path} cannot be read: {error}; copy the model again") from error
    return found if isinstance(found, dict) else {}
