"""PyTorch's encoders call their layers as long as these hold experts, quantized weights or weights of another dtype, and no longer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedms_ext
from fedms_ext import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*bytes of the frozen weights")


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


def switches(model: nn.TransformerEncoder) -> list[bool]:
    return [bool(layer.activation_relu_or_gelu) for layer in model.layers] + [bool(model.use_nested_tensor)]


def test_what_is_quantized_below_experts_stays_called_when_they_go():
    model = encoder()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    fedms_ext.quantize(model, "int8")
    fedms_ext.attach(model, ["linear1"], {"e": LoRA(2, 4)})
    fedms_ext.detach(model)
    assert switches(model) == [False, False, False]
    fedms_ext.dequantize(model, weights)
    assert switches(model) == [True, True, True]
    assert model.layers[0].activation_relu_or_gelu == 1 and model.use_nested_tensor is True


def test_experts_on_quantized_weights_stay_called_when_the_weights_are_restored():
    model = encoder()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    fedms_ext.attach(model, ["linear1"], {"e": LoRA(2, 4)})
    fedms_ext.quantize(model, "int8")
    fedms_ext.dequantize(model, {name.replace(".lora_", "."): p for name, p in weights.items()})
    assert switches(model) == [False, False, False]
    fedms_ext.detach(model)
    assert switches(model) == [True, True, True]


def test_no_nested_tensor_reaches_a_quantized_layer_behind_one_that_is_not():
    """PyTorch looks at the first layer alone before it makes one."""
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(3, 7, 32)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    with torch.no_grad():
        want = model(x, src_key_padding_mask=padding)
        fedms_ext.quantize(model, "int8", exclude=r"layers\.0\..*")
        assert switches(model) == [True, False, False]
        got = model(x, src_key_padding_mask=padding)
    assert (got - want)[~padding].abs().max() < 0.05 * want.abs().max()


def test_a_switch_that_was_off_stays_off():
    model = encoder()
    model.layers[0].activation_relu_or_gelu = 0
    fedms_ext.attach(model, ["linear1"], {"e": LoRA(2, 4)})
    fedms_ext.detach(model)
    assert switches(model) == [False, True, True]


def test_weights_of_16_bits_are_called():
    model = encoder()
    fedms_ext.cast_frozen(model, torch.bfloat16)
    assert switches(model) == [False, False, False]
