"""What all models in Hugging Face's format share: finding, explaining errors, saving, and code that loads them elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fedms.data.hub_access import advice, hub
from fedms.errors import ModelError

from .base import quiet_transformers


def source_of(model_id: str) -> str:
    """Return where transformers loads a model from: a folder that holds safetensors, or the hub id as it is.

    Raises:
        ModelError: If the folder does not exist, or holds no model in Hugging Face's format with safetensors.
    """
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        if folder.exists() or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
            raise ModelError(f"model.id: {model_id!r} is no folder; accepted: a built-in name, a folder with a model in "
                             "Hugging Face's format, or a hub id such as \"org/name\"")
        return model_id
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.id: {folder} holds no config.json, so it is no model in Hugging Face's format; write "
                         "one with save_pretrained()")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"model.id: {folder} holds no *.safetensors. " + _convert(folder))
    return str(folder)


def _convert(where: str | Path) -> str:
    return ("Other formats are refused, because a pickle (pytorch_model.bin) can run any code when it is read. If you "
            "trust its author, convert it once:\n  python -c \"from transformers import AutoModel; "
            f"AutoModel.from_pretrained('{where}', use_safetensors=False).save_pretrained('DIR')\"\n"
            "save its tokenizer or image processor there too, and set model.id to DIR")


@contextmanager
def explained(model_id: str) -> Iterator[None]:
    """Turn any error of transformers, within the context, into a ModelError that says what to do."""
    here = Path(model_id).expanduser().exists()
    with nullcontext("") if here else hub() as unreachable:
        try:
            yield
        except ModelError:
            raise
        except Exception as error:  # a damaged file shows itself in many types
            if unreachable and "trust_remote_code" not in str(error):
                raise ModelError(f"model.id: {model_id!r} is neither built in nor a folder in {Path.cwd()}; as a hub id it cannot be "
                                 f"loaded: {unreachable}, {advice(model_id, 'model.id', 'model')}") from error
            raise _explanation(model_id, error) from error


def _explanation(model_id: str, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0]
    if "trust_remote_code" in str(error):
        remedy = ("it brings code of its own, which is not run unless you have read it and set "
                  "model.trust_remote_code = true")
    elif "safetensors" in str(error) and isinstance(error, OSError):
        remedy = _convert(model_id)
    elif Path(model_id).expanduser().is_dir():
        remedy = "save it again with save_pretrained(), or copy it again"
    else:
        remedy = (f"{Path.cwd()} has no folder of this name; if it is a hub id, check the id, the network and, for a private model, "
                  "the login of `hf auth login`. Built-in models: see docs/reference/configuration.md")
    return ModelError(f"model.id: {model_id!r} cannot be loaded ({type(error).__name__}: {reason}); {remedy}")


def save_pretrained(folder: Path, *parts: Any) -> None:
    """Save parts of a model, such as the module and its tokenizer, into one folder in Hugging Face's format."""
    with quiet_transformers():
        for part in parts:
            part.save_pretrained(folder)


def first_lines(module: nn.Module, base: str, adapted: str | None) -> list[str]:
    """Return the lines that load the model in a script that computes features without this package.

    Args:
        module: The model.
        base: Code of the path of the saved model.
        adapted: Code that makes the adapted model of the variable `base`; None if the model is used as it was saved.
    """
    kind = type(module)
    bare = ", add_pooling_layer=False" if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else ""
    loaded = f"transformers.{kind.__name__}.from_pretrained({base}{bare}).float()"
    return [f"base = {loaded}", f"model = {adapted}.eval()"] if adapted else [f"model = {loaded}.eval()"]
