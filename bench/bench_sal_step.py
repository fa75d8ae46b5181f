"""What Sparsely Activated LoRA saves: a MiniLM training step with one of its six blocks trained, beside PEFT.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/bench_sal_step.py

A step is forward, backward and AdamW on 32 sequences of 64 tokens, in fp32 on the CPU, with rank 8 on the same Linear
layers of the trained blocks everywhere. The weights of the model do not matter for the time; where the package with
the real ones is not installed, they are random. Figures are times over that of our step with one block trained and
no cache, turn by turn: the median and, in brackets, the 20th and 80th percentile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from timing import interleaved, ratio, summarise
from torch import Tensor, nn

import fedms_ext
from fedms_ext import ConstantPrefix, LoRA, Ragged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SAMPLES, TOKENS, RANK = 32, 64, 8
TARGETS = ["query", "key", "value", "dense"]
BASE = "ours, last block"


def minilm() -> nn.Module:
    try:
        from fedms.models.minilm import MiniLM, ModelError
    except ImportError:
        return random_minilm()
    try:
        return MiniLM().module
    except ModelError:
        return random_minilm()


def random_minilm() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def ours(depth: int) -> nn.Module:
    model = minilm()
    fedms_ext.attach(model, TARGETS, {"e": LoRA(RANK, 16)}, blocks="encoder.layer")
    fedms_ext.activate(model, "e", depth=depth)
    return model


def theirs(blocks: list[int] | None) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS, layers_to_transform=blocks)
    return peft.get_peft_model(minilm(), config)


class Step:
    """One training step of a model with a linear head; a call runs it."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> None:
        self.model, self.batch, self.labels = model, batch, labels
        self.head = nn.Linear(384, 2)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.lora_parameters = sum(p.numel() for p in trained)
        self.optimiser = torch.optim.AdamW([*trained, *self.head.parameters()], lr=1e-4)

    def hidden(self) -> Tensor:
        return self.model(**self.batch).last_hidden_state

    def __call__(self) -> None:
        loss = nn.functional.cross_entropy(self.head(self.hidden().mean(1)), self.labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


class CachedStep(Step):
    """The same, with the outputs of the constant prefix taken from where a cache keeps them."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> None:
        super().__init__(model, batch, labels)
        self.prefix = ConstantPrefix(model)
        self.stored = Ragged(list(self.prefix.capture(super().hidden)))
        self.rows = torch.arange(len(labels))

    def hidden(self) -> Tensor:
        with self.prefix.replay(self.stored.pad(self.rows)):
            return super().hidden()


def kept_bytes(step: Callable[[], object]) -> int:
    """Bytes of the tensors that a step keeps for its backward pass, each storage counted once. Parameters are not
    among them: they are there anyway."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storages.values())


def test_step(benchmark):
    batch = {
        "input_ids": torch.randint(1000, 20000, (SAMPLES, TOKENS)),
        "attention_mask": torch.ones(SAMPLES, TOKENS, dtype=torch.int64),
    }
    labels = torch.randint(0, 2, (SAMPLES,))
    steps: dict[str, Step] = {
        BASE: Step(ours(1), batch, labels),
        "ours, last block, cached prefix": CachedStep(ours(1), batch, labels),
        "ours, all six blocks": Step(ours(6), batch, labels),
        "PEFT, all six blocks": Step(theirs(None), batch, labels),
        "PEFT, last block": Step(theirs([5]), batch, labels),
        "PEFT compiled, last block": Step(torch.compile(theirs([5])), batch, labels),
    }
    one, six = "last block", "all six blocks"
    assert steps[f"ours, {one}"].lora_parameters == steps[f"PEFT, {one}"].lora_parameters
    assert steps[f"ours, {six}"].lora_parameters == steps[f"PEFT, {six}"].lora_parameters

    seconds = interleaved(steps, seconds=40.0)
    print(f"\n\n{SAMPLES} x {TOKENS} tokens, rank {RANK}, {fedms_ext.build_info()['isa_used']}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {len(seconds[BASE])} turns")
    print(f"{'':34}{'ms':>8}   {'over ours, last block':24}{'LoRA parameters':>16}{'MiB kept':>10}")
    for name, step in steps.items():
        over_base = ratio(seconds[name], seconds[BASE])
        benchmark.extra_info[name] = {"seconds": asdict(summarise(seconds[name])), "over_base": asdict(over_base)}
        milliseconds = 1e3 * summarise(seconds[name]).median
        kept = kept_bytes(step) / 2**20
        print(f"{name:34}{milliseconds:8.1f}   {over_base!s:24}{step.lora_parameters:16}{kept:10.1f}")
    benchmark.pedantic(steps[BASE], rounds=3)
