"""Loads models in Hugging Face's format: text encoders, decoders, vision models, and CLIP-like pairs of towers.

They are named by a hub id or a local folder. Weights are read from safetensors alone, and a repository's own
code is run only if the run file says so (`model.trust_remote_code`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedms.errors import ModelError
from fedms.foreign import parse_json, read_regular

from .base import FoundationModel, import_transformers, quiet_transformers
from .pretrained import explained, source_of
from .text_model import TextModel
from .vision_model import TWO_TOWERS, TwoTowerModel, VisionModel


def load(table) -> FoundationModel:
    """Load the model that `id` of the [model] table names: a hub id or a folder.

    Args:
        table: The [model] table, for `id`, `pooling`, `blocks` and `trust_remote_code`.

    Raises:
        ModelError: If there is no such folder or id, the weights are damaged or not in safetensors, the tokenizer or image
            processor is missing, or the architecture is of another kind.
    """
    transformers = import_transformers()
    source = source_of(table.id)
    options = {"trust_remote_code": table.trust_remote_code}
    with explained(table.id), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(source, **options)
        module = _from_pretrained(transformers, source, config, options)
        processors = _processors(transformers, source, table.id, module, options)
        pooling = _pooling(source, table.pooling)
    return wrap(module, processors, name=table.id, pooling=pooling, blocks=table.blocks)


def wrap(module: nn.Module, processors: Sequence[Any], *, name: str, pooling: str = "auto",
         blocks: str | None = None) -> FoundationModel:
    """Return a foundation model for a module of transformers that is loaded already.

    Args:
        module: The module.
        processors: The tokenizer or the image processor; both, tokenizer first, for a pair of towers.
        name: Name of the model.
        pooling: See `TextModel` and `VisionModel`.
        blocks: Dotted name of the list of transformer blocks; None to find it.
    """
    if cast(Any, module.config).model_type in TWO_TOWERS:
        if pooling != "auto":
            raise ModelError(f"model.pooling: got {pooling!r}, but {name} pools its image tower itself; accepted: \"auto\"")
        return TwoTowerModel(name, module, *processors, blocks=blocks)
    kind = VisionModel if module.main_input_name == "pixel_values" else TextModel
    return kind(name, module, *processors, pooling=pooling, blocks=blocks)


def _from_pretrained(transformers, source: str, config, options: dict) -> nn.Module:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model.id: a {config.model_type} is an encoder and a decoder; accepted: an encoder, a decoder, a "
                         f"vision model, or a pair of towers ({', '.join(TWO_TOWERS)})")
    if config.model_type in TWO_TOWERS:
        auto = getattr(transformers, TWO_TOWERS[config.model_type][0])
    else:
        # An image tower saved alone is of a class that AutoModel does not choose.
        towers = [tower for _, tower in TWO_TOWERS.values()]
        named = next((name for name in config.architectures or () if name in towers), None)
        auto = getattr(transformers, named) if named else transformers.AutoModel
    kind = auto if auto is not transformers.AutoModel else transformers.AutoModel._model_mapping.get(type(config), None)
    # No pooler of its own is trained into our features, so its weights would lie idle.
    takes = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return auto.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **options,
                                **({"add_pooling_layer": False} if takes else {}))


def _processors(transformers, source: str, model_id: str, module: nn.Module, options: dict) -> list[Any]:
    pair = cast(Any, module.config).model_type in TWO_TOWERS
    images = pair or module.main_input_name == "pixel_values"
    found = []
    try:
        with quiet_transformers():
            if pair or not images:
                found.append(transformers.AutoTokenizer.from_pretrained(source, **options))
            if images:
                # PIL's filters are the reference; torchvision's differ in the last bit, and between versions.
                found.append(transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options))
    except Exception as error:  # missing and damaged files show themselves in many types
        what = "image processor" if images and len(found) == pair else "tokenizer"
        raise ModelError(
            f"model.id: {model_id!r} comes without a usable {what} ({str(error).strip().split(chr(10))[0]}); save it into "
            f"the model's folder with {what.replace(' ', '_')}.save_pretrained()"
        ) from error
    return found


def _pooling(source: str, wanted: str) -> str:
    """Return the wanted pooling. For "auto" it is the one that a sentence encoder names in a file, if it names one."""
    if wanted != "auto":
        return wanted
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
        modes = parse_json(read_regular(Path(path))) if path else {}
    except (OSError, ValueError):
        return wanted
    if not isinstance(modes, dict):
        return wanted
    names = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    chosen = [name for name, mode in names.items() if modes.get(f"pooling_mode_{mode}")]
    return chosen[0] if len(chosen) == 1 else wanted
