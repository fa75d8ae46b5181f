"""Causal language models of many architectures with random weights and few tokens, and a tokenizer of single bytes."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedms.config import RunConfig, load_config
from fedms.models.causal_lm import CausalModel

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TOKENS = len(SPECIAL) + 256
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

WIDTH, BLOCKS, LONGEST = 32, 3, 160
COMMON = {"vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
          "intermediate_size": 64, "max_position_embeddings": LONGEST, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}

ARCHITECTURES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED, final_logit_softcapping=5.0)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=TOKENS, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=LONGEST, bos_token_id=None, eos_token_id=0)),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=WIDTH,
        max_position_embeddings=LONGEST, bos_token_id=None, eos_token_id=0, pad_token_id=1)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**COMMON)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**COMMON, logit_scale=3.0)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**COMMON, logits_scaling=3.0)),
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Each byte of UTF-8 is a token, so every text has tokens and comes back as it was."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    found.chat_template = TEMPLATE
    return found


def whole(kind: str = "llama"):
    """The model of transformers, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = ARCHITECTURES[kind]().eval()
        for parameter in model.parameters():    # as wide apart as a trained model's, so that tokens differ
            if parameter.dim() > 1:
                parameter.data *= 4
    return model


def model(kind: str = "llama") -> CausalModel:
    return CausalModel(f"tiny-{kind}", whole(kind), tokenizer())


SETS = ["task.kind=causal_lm", "data.question=q", "data.answer=a", "data.client=who", "data.max_tokens=60", "clients.unseen=0",
        "stage1.rounds=1", "stage2.rounds=1", "gate.on=probabilities", "gate.features=prefix", "sal.depth=2", "sal.schedule=fixed",
        "run.threads=1"]


def write_federation(folder: Path, clients: Sequence[str], samples: int, answer: Callable[[str, int], str]) -> Path:
    """Write a model and `samples` numbered questions for each client, answered by `answer(client, number)`; return the folder."""
    model().save(folder / "model")
    lines = [{"q": f"number {i}?", "a": answer(who, i), "who": who} for who in clients for i in range(samples)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def configuration(folder: Path, *sets: str) -> RunConfig:
    """Return the configuration of a run on what `write_federation` wrote; later settings win over earlier ones."""
    return load_config("sentiment", [f"model.id={folder / 'model'}", f"data.name={folder / 'data.jsonl'}", *SETS, *sets])
