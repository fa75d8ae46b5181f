"""`accelerate`: PEFT models on our operator, beside the same models as PEFT computes them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fedms_ext
from fedms_ext import accelerate, expert_linear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = {"input_ids": torch.arange(21).reshape(3, 7), "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()}


def bert(**lora) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "SEQ_CLS"}
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), peft.LoraConfig(**settings | lora))


def outputs(model: nn.Module) -> list[Tensor]:
    """Logits, and the gradient of every trained parameter."""
    model.zero_grad(set_to_none=True)
    loss = (logits := model(**TOKENS).logits).square().sum()
    loss.backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert (g - w).norm() <= tolerance * w.norm()


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"target_modules": ["query", "value"]}, {"modules_to_save": []}])
def test_outputs_gradients_and_state_dict_are_those_of_peft(lora):
    model = bert(**lora)
    before, state = outputs(model), {name: t.clone() for name, t in model.state_dict().items()}
    done = accelerate(model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(done.layers) == len(layers) == len({id(m) for m in layers})
    assert_same(outputs(model), before)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)


def test_the_layers_call_our_operator_and_not_peft(monkeypatch):
    from fedms_ext.nn import peft_linear

    model = bert()
    done = accelerate(model)
    calls = []
    monkeypatch.setattr(peft_linear, "expert_linear", lambda *args, **kw: calls.append(1) or expert_linear(*args, **kw))
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda *args, **kw: pytest.fail("PEFT's forward was called"))
    model(**TOKENS)
    assert len(calls) == len(done.layers)


def test_a_call_looks_for_the_active_adapters_once(monkeypatch):
    layer, asked = layers_of(bert(), group=False)[0], []
    kind, x = type(layer), torch.randn(2, layer.in_features)
    found = kind._adapters
    monkeypatch.setattr(kind, "_adapters", lambda self: asked.append(1) or found(self))
    layer(x)
    assert len(asked) == 1
    assert layer.as_sibling(x) is not None and len(asked) == 2


def test_siblings_are_grouped_and_a_layer_that_is_left_to_peft_leaves_them():
    model = bert()
    assert all(layer.siblings is None for layer in layers_of(copy.deepcopy(model), group=False))
    layers, before = layers_of(model), outputs(model)
    grouped = [layer for layer in layers if layer.siblings is not None]
    assert len(grouped) == 2 * 3 and len({layer.siblings for layer in grouped}) == 2     # of two blocks query, key and value
    twin = pickle.loads(pickle.dumps(model))
    assert_same(outputs(twin), before, 0)
    grouped[0].get_base_layer().weight.requires_grad_()
    assert "trained" in " ".join(accelerate(model).skipped.values())
    assert grouped[0].siblings is None and grouped[1].siblings.layers == grouped[2].siblings.layers == tuple(grouped[1:3])
    fedms_ext.group(grouped[1:3])       # on a CPU, too: there float weights are computed one by one
    grouped[0].get_base_layer().weight.requires_grad_(False)
    assert_same(outputs(model), before)


def layers_of(model: nn.Module, **settings) -> list[nn.Module]:
    named = dict(model.named_modules())
    return [named[name] for name in accelerate(model, **settings).layers]


def test_twice_is_once():
    model = bert()
    assert accelerate(model) == accelerate(model)


def test_adapters_are_switched_disabled_and_merged_as_before():
    model = bert(task_type=None)  # a classifier that is trained as a whole allows one adapter only
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query"], init_lora_weights=False))
    theirs = copy.deepcopy(model)
    accelerate(model)
    for name in ("other", "default"):
        for each in (model, theirs):
            each.set_adapter(name)
        assert_same(outputs(model), outputs(theirs))
    for each in (model, theirs):
        each.base_model.set_adapter(["default", "other"])
    assert_same(outputs(model), outputs(theirs))
    with torch.no_grad():
        with model.disable_adapter(), theirs.disable_adapter():
            assert torch.equal(model(**TOKENS).logits, theirs(**TOKENS).logits)
        want = model(**TOKENS).logits
        model.merge_adapter()
        assert_same([model(**TOKENS).logits], [want])
        model.unmerge_adapter()
        assert_same([model(**TOKENS).logits], [want])


def test_an_adapter_that_is_added_later_is_accelerated_too():
    model = bert()
    accelerate(model)
    model.add_adapter("later", peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("later")
    theirs = copy.deepcopy(model)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.__class__ = peft.tuners.lora.Linear
    assert_same(outputs(model), outputs(theirs))


def test_saved_and_loaded(tmp_path):
    model = bert()
    accelerate(model)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    assert_same([peft.PeftModel.from_pretrained(base, tmp_path)(**TOKENS).logits], [model(**TOKENS).logits])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**TOKENS).logits, model(**TOKENS).logits)


def test_dropout_is_that_of_a_share_of_the_inputs():
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(512, 1, bias=False)), peft.LoraConfig(
        r=1, lora_alpha=1, lora_dropout=0.25, target_modules=["0"]))
    accelerate(layer)
    inner = layer.base_model.model[0]
    with torch.no_grad():
        inner.base_layer.weight.zero_()
        inner.lora_A["default"].weight.fill_(1.0)
        inner.lora_B["default"].weight.fill_(1.0)
    y = layer(torch.ones(400, 512))                     # the number of inputs that were kept, over 0.75
    assert abs(y.mean().item() - 512) < 2 and abs(y.std().item() / (512 / 3) ** 0.5 - 1) < 0.15
    assert not torch.equal(y, layer(torch.ones(400, 512)))
    torch.manual_seed(0)
    first = layer(torch.ones(4, 512))
    torch.manual_seed(0)
    assert torch.equal(first, layer(torch.ones(4, 512)))
    layer.eval()
    assert torch.equal(layer(torch.ones(4, 512)), torch.full((4, 1), 512.0))


@pytest.mark.parametrize("lora, reason", [
    ({"use_dora": True}, "is a variant of LoRA"),
    ({"lora_bias": True}, "has a bias"),
])  # fmt: skip
def test_what_is_no_plain_lora_is_named_and_left_to_peft(lora, reason):
    model = bert(**lora)
    before = outputs(model)
    done = accelerate(model)
    assert not done.layers and done.skipped
    assert all(reason in why for name, why in done.skipped.items() if "classifier" not in name)
    assert reason in str(done)
    assert_same(outputs(model), before, tolerance=0)


def test_conv1d_and_modules_to_save_are_named():
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2, num_labels=3,
                                     pad_token_id=0)
    model = peft.get_peft_model(transformers.GPT2ForSequenceClassification(config), peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS", init_lora_weights=False, fan_in_fan_out=True)).eval()
    before = outputs(model)
    done = accelerate(model)
    assert not done.layers
    assert sum("Conv1D" in why for why in done.skipped.values()) == 6  # c_attn, and the two c_proj, of two blocks
    assert sum("modules_to_save" in why for why in done.skipped.values()) == 1
    assert_same(outputs(model), before, tolerance=0)


def test_a_layer_whose_base_is_trained_afterwards_is_left_to_peft():
    model = bert()
    accelerate(model)
    model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.requires_grad_(True)
    outputs(model)
    assert model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.grad is not None


def test_bfloat16_base_with_float32_adapters():
    model = bert().to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    before = outputs(model)
    accelerate(model)
    assert_same(outputs(model), before, tolerance=0.05)


def test_autocast():
    model = bert()
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(model)
        accelerate(model)
        assert_same(outputs(model), before, tolerance=0.1)


def test_the_hugging_face_trainer_learns_the_same(tmp_path):
    model = bert(lora_dropout=0.0)
    theirs = copy.deepcopy(model)
    accelerate(model)
    data = [{"input_ids": torch.randint(0, 50, (7,)), "labels": torch.tensor(i % 3)} for i in range(12)]
    losses = []
    for each in (model, theirs):
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0)
        losses.append(transformers.Trainer(each, arguments, train_dataset=data).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    trained = [dict(each.named_parameters()) for each in (model, theirs)]
    for name, p in trained[0].items():
        if "lora_" in name:
            assert (p - trained[1][name]).norm() <= 1e-3 * p.norm()


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="Sequential holds no LoRA layer; make one with peft.get_peft_model"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
