"""Causal language models of many architectures: heads, files, and generation with one and two experts."""
from __future__ import annotations

import pytest
import tiny_language_models as tiny
import torch
import transformers
from torch import nn

import fedms_ext
from fedms.config import ModelTable
from fedms.models import smollm2
from fedms.models.base import ModelError
from fedms.models.causal_lm import CausalModel, load
from fedms.models.generation import Decoder, Sampling, Token, choose, generate, text_pieces
from fedms_ext import LoRA

PROMPT = [1, 80, 90, 100, 110, 2]


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_the_head_gives_the_models_own_logits(kind):
    ids = torch.randint(3, tiny.TOKENS, (2, 9))
    expected = tiny.whole(kind)(input_ids=ids).logits
    model = tiny.model(kind)
    torch.testing.assert_close(model.head(model.hidden({"input_ids": ids})), expected)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "phi"])
def test_saved_models_give_the_same_logits(kind, tmp_path):
    model, ids = tiny.model(kind), torch.randint(3, tiny.TOKENS, (2, 9))
    model.save(tmp_path)
    again = load(ModelTable(id=str(tmp_path)))
    assert again.fingerprint == model.fingerprint and again.stop_tokens == model.stop_tokens == (0,)
    torch.testing.assert_close(again.head(again.hidden({"input_ids": ids})), model.head(model.hidden({"input_ids": ids})))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids).logits, tiny.whole(kind)(input_ids=ids).logits)


def test_padding_on_the_right_changes_nothing():
    model, ids = tiny.model("gpt2"), torch.randint(3, tiny.TOKENS, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(model.hidden({"input_ids": padded})[:, :5], model.hidden({"input_ids": ids}))


def test_a_head_that_does_more_to_its_logits_is_refused():
    whole = tiny.whole()
    forward = whole.lm_head.forward
    whole.lm_head.forward = lambda x: forward(x).square()
    with pytest.raises(ModelError, match="does more to its logits"):
        CausalModel("odd", whole, tiny.tokenizer())


def test_a_head_that_is_no_linear_layer_is_refused():
    whole = tiny.whole()
    whole.lm_head = nn.Sequential(whole.lm_head)
    with pytest.raises(ModelError, match="is a Sequential, expected a Linear layer"):
        CausalModel("odd", whole, tiny.tokenizer())


def test_a_missing_gguf_file_is_named():
    with pytest.raises(ModelError, match="nowhere.gguf: no such file"):
        load(ModelTable(id="/tmp/nowhere.gguf"))


# Generation

def with_experts(kind: str, depth: int) -> tuple[CausalModel, list]:
    """A model with two experts that differ in the top `depth` blocks."""
    model = tiny.model(kind)
    fedms_ext.attach(model.module, "all-linear", {e: LoRA(4, 16) for e in ("global", "local")}, blocks=model.blocks)
    layers = fedms_ext.expert_layers(model.module)
    for expert in ("global", "local"):
        for layer in layers.values():
            nn.init.normal_(layer.lora_b[expert], std=0.3)
        fedms_ext.activate(model.module, expert, depth=0, applied_depth=depth)
    return model, [layer for layer in layers.values() if layer.block > tiny.BLOCKS - depth]


def only(model: CausalModel, expert: str, depth: int) -> None:
    for name in ("global", "local"):
        fedms_ext.deactivate(model.module, name)
    fedms_ext.activate(model.module, expert, depth=0, applied_depth=depth)


def half_and_half(model: CausalModel):
    return lambda hidden: torch.logsumexp(model.head(hidden).log_softmax(-1) + torch.tensor([[0.6], [0.4]]).log(), 0)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_two_experts_on_one_cache_equal_two_models_without_one(kind):
    depth, count = 2, 6
    model, layers = with_experts(kind, depth)
    decoder = Decoder(model, layers, tiny.BLOCKS - depth, experts=2)
    found = list(generate(decoder, PROMPT, half_and_half(model), (), Sampling(count)))
    mixture, ids = half_and_half(model), torch.tensor([PROMPT])
    for token in found:
        streams = []
        for expert in ("global", "local"):
            only(model, expert, depth)
            with torch.no_grad():
                streams.append(model.hidden({"input_ids": ids})[:, -1])
        log_p = mixture(torch.cat(streams))
        assert token.id == int(log_p.argmax())
        assert token.log_p == pytest.approx(float(log_p.max()), abs=5e-5)
        ids = torch.cat([ids, torch.tensor([[token.id]])], 1)
    assert len(found) == count and len({token.id for token in found}) > 1


@pytest.mark.parametrize("mixing", ["outputs", "layers"])
def test_a_step_with_two_experts_is_one_graph(mixing):
    model, layers = with_experts("llama", 2)
    gate, found = torch.ones(1, 2), []
    hooks = [m for m in model.module.modules() if m._forward_pre_hooks or m._forward_hooks]

    def see(hidden):
        gate.copy_(hidden[-1:, -1, :2].softmax(-1))

    for compiled in (False, True):
        if mixing == "outputs":
            decoder = Decoder(model, layers, tiny.BLOCKS - 2, experts=2)
        else:
            decoder = Decoder(model)
            decoder.watch(tiny.BLOCKS - 2, see)
        torch._dynamo.reset()
        step = torch.compile(decoder.step, fullgraph=True, backend="eager") if compiled else decoder.step
        with fedms_ext.gated(layers if mixing == "layers" else [], gate):
            decoder.step(torch.tensor(PROMPT))
            found.append((step(torch.tensor([5])), gate.clone()))
    (wanted, gate_wanted), (got, gate_got) = found
    assert got.shape == (2 if mixing == "outputs" else 1, tiny.WIDTH)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate_got, gate_wanted)
    assert (gate_wanted[0, 0] != 1) == (mixing == "layers")
    assert hooks == [m for m in model.module.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_one_expert_equals_generation_of_transformers():
    model, whole = tiny.model(), tiny.whole()
    ours = list(generate(Decoder(model), PROMPT, lambda h: model.head(h)[0].log_softmax(-1), (), Sampling(12)))
    theirs = whole.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=-1)[0, len(PROMPT):]
    assert [token.id for token in ours] == theirs.tolist()


def test_generation_ends_with_a_stop_token_and_with_the_longest_sequence():
    model = tiny.model()
    mixture = lambda h: model.head(h)[0].log_softmax(-1)   # noqa: E731
    first = next(generate(Decoder(model), PROMPT, mixture, (), Sampling(1)))
    stopped = list(generate(Decoder(model), PROMPT, mixture, (first.id,), Sampling(5)))
    assert [token.id for token in stopped] == [first.id]
    long = [5] * (tiny.LONGEST - 2)
    assert len(list(generate(Decoder(model), long, mixture, (), Sampling(50)))) == 2
    with pytest.raises(ValueError, match=f"has {tiny.LONGEST} tokens, expected 1 to {tiny.LONGEST - 1}"):
        next(generate(Decoder(model), long + [5, 5], mixture, (), Sampling(1)))


def test_sampling():
    log_p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings) -> torch.Tensor:
        tokens = torch.stack([choose(log_p, Sampling(**settings), generator) for _ in range(2000)])
        return torch.bincount(tokens, minlength=4) / 2000

    torch.testing.assert_close(drawn(temperature=1.0), log_p.exp(), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn(temperature=0.5), log_p.exp().square() / log_p.exp().square().sum(), atol=0.04, rtol=0)
    assert drawn(temperature=1.0, top_p=0.7)[2:].sum() == 0 and drawn(temperature=0.0)[0] == 1
    for wrong in (dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_p=0.0)):
        with pytest.raises(ValueError, match="expected"):
            Sampling(**wrong)


def test_text_comes_in_whole_characters():
    made, text = tiny.tokenizer(), "né 🙂 שלום"
    ids = [*made(text)["input_ids"], 0]
    pieces = list(text_pieces(made, (Token(i, 0.0) for i in ids), (0,)))
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces) and len(pieces) == len(text)


def test_a_damaged_wheel_of_the_built_in_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    (tmp_path / smollm2.WHEEL).write_bytes(b"no wheel")
    with pytest.raises(ModelError, match="damaged file: expected sha256 bcc8.*; delete .* and run again"):
        smollm2.converted()
    assert {path.name for path in tmp_path.iterdir()} == {smollm2.WHEEL}
