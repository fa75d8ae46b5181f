"""Layers of other classes, and models whose blocks return more than the hidden state, from transformers and PEFT."""

from __future__ import annotations

import copy

import pytest
import torch

import fedms_ext
from fedms_ext import ConstantPrefix, LoRA, activate, attach, dequantize, detach, expert_layers, merge, quantize

transformers = pytest.importorskip("transformers")
IDS = torch.arange(8)[None]


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)).eval()


def falcon():
    return transformers.FalconForCausalLM(transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)).eval()


def fill(model) -> None:
    with torch.no_grad():
        for layer in expert_layers(model).values():
            layer.lora_b["g"].normal_(0, 0.1)


def close(a, b, tolerance) -> bool:
    return ((a - b).norm() / b.norm()).item() < tolerance


@pytest.mark.parametrize("make", [gpt2, falcon])
def test_conv1d_and_linear_subclasses(make):
    torch.manual_seed(0)
    model = make()
    kinds, weights = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(IDS).logits
        assert len(attach(model, "all-linear", {"g": LoRA(4, 8)})) >= 8
        assert torch.allclose(model(IDS).logits, plain, atol=1e-5)
        fill(model)
        want = model(IDS).logits
        assert not close(want, plain, 1e-3)
        quantize(model, "fp16")
        assert close(model(IDS).logits, want, 5e-3)
        dequantize(model, weights)
        assert close(model(IDS).logits, want, 1e-5)
        merge(model, "g")
        assert close(model(IDS).logits, want, 1e-4)
        detach(model)
        assert close(model(IDS).logits, want, 1e-4) and [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(weights)


def test_gpt2s_experts_train():
    model = gpt2()
    attach(model, ["c_attn"], {"g": LoRA(4, 8)})
    fill(model)
    activate(model, "g", depth=2)
    model(IDS).logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_an_output_layer_of_its_own_is_not_quantized_unasked():
    model = falcon()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.requires_grad_(False)
    assert "lm_head" not in quantize(model)
    assert quantize(model, exclude=()) == ["lm_head"]


def test_t5s_position_biases_are_replayed():
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=50)).eval()
    attach(model, ["q", "v", "wi"], {"g": LoRA(4, 8)})
    fill(model)
    for depth in (1, 3, 4):
        prefix = ConstantPrefix(model, depth)
        with torch.no_grad():
            want = model(input_ids=IDS).last_hidden_state
            hidden = prefix.capture(lambda: model(input_ids=IDS))
            with prefix.replay(hidden):
                assert torch.allclose(model(input_ids=IDS).last_hidden_state, want, atol=1e-5)
            assert torch.equal(model(input_ids=IDS).last_hidden_state, want)


def test_blocks_with_values_of_their_own_are_refused_in_replay():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x), x.sum()

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Own() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x, _ = layer(x)
            return x

    model, x = Stack(), torch.randn(2, 8)
    attach(model, "all-linear", {"g": LoRA(4, 8)})
    prefix = ConstantPrefix(model, 2)
    hidden = prefix.capture(lambda: model(x))
    with pytest.raises(RuntimeError, match="Own returns values of its own"), prefix.replay(hidden):
        model(x)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
@pytest.mark.parametrize("early", [True, False])
def test_hooks_on_parts_of_a_peft_layer_run(part, early):
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)).eval()

    def hook(model):
        model.get_submodule(f"base_model.model.0.{part}").register_forward_hook(lambda m, args, out: 2 * out)

    x, plain, fast = torch.randn(3, 8), make(), make()
    hook(plain)
    if early:
        hook(fast)
    assert len(fedms_ext.accelerate(fast).layers) == (1 if early else 2)
    if not early:
        hook(fast)
    assert torch.allclose(fast(x), plain(x), atol=1e-5)


def test_settings_that_are_not_known_are_left_to_peft():
    peft = pytest.importorskip("peft")
    from dataclasses import dataclass

    @dataclass
    class Later(peft.LoraConfig):
        use_something_new: bool = False

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), peft.LoraConfig(r=4, target_modules=["0"]))
    config = Later(r=4, target_modules=["0"], use_something_new=True)
    model.base_model.peft_config["default"] = config
    done = fedms_ext.accelerate(model)
    assert done.layers == () and "use_something_new" in str(done)


def test_two_towers_train_at_once():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(**sizes, vocab_size=50, max_position_embeddings=16, eos_token_id=1, bos_token_id=0),
        vision_config=dict(**sizes, image_size=16, patch_size=8), projection_dim=16)).requires_grad_(False)
    with pytest.raises(ValueError, match="several lists of 2 blocks.*attach to each tower separately"):
        attach(model, "all-linear", {"g": LoRA(4, 8)})
    towers = (model.text_model, model.vision_model)
    for tower in towers:
        attach(tower, "all-linear", {"g": LoRA(4, 8)})
    for tower, depth in zip(towers, (1, 2)):
        assert activate(tower, "g", depth=depth) == [2, 1][:depth][::-1]
    model(input_ids=IDS, pixel_values=torch.randn(1, 3, 16, 16)).logits_per_image.sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"text_model", "vision_model"} and all("lora" in n for n, p in model.named_parameters() if p.grad is not None)
    assert [len({layer.block for layer in expert_layers(tower).values() if "trained" in map(str.lower, (
        state.value for state in layer.states.values()))}) for tower in towers] == [1, 2]
    quantize(model.vision_model, "fp16")
    assert len(expert_layers(model)) == 24
