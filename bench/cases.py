"""The two models of the benchmarks of Sparsely Activated LoRA, and a training step of each, ours and PEFT's.

MiniLM: 32 sequences of 64 tokens, one of six blocks trained. A ViT of ViT-B's size: four images of 197 tokens, two of
twelve blocks. Rank 8 on all Linear layers of the trained blocks, fused AdamW, ours and PEFT's alike. The weights are random:
their values do not matter for time or memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fedms_ext
from fedms_ext import ConstantPrefix, LoRA, Ragged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK, CLASSES = 8, 2


@dataclass(frozen=True)
class Case:
    name: str
    blocks: int
    trained: int
    samples: int
    tokens: int
    width: int

    def module(self) -> nn.Module:
        if self.name == "MiniLM":
            config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                             intermediate_size=1536)
            return transformers.BertModel(config, add_pooling_layer=False).eval()
        return transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False).eval()

    def batch(self) -> dict[str, Tensor]:
        if self.name == "MiniLM":
            return {"input_ids": torch.randint(1000, 20000, (self.samples, self.tokens)),
                    "attention_mask": torch.ones(self.samples, self.tokens, dtype=torch.int64)}
        return {"pixel_values": torch.randn(self.samples, 3, 224, 224)}

    def ours(self, depth: int, frozen: str = "fp32") -> nn.Module:
        model = self.module()
        fedms_ext.use_attention(model)
        fedms_ext.attach(model, "all-linear", {"e": LoRA(RANK, 16)})
        fedms_ext.activate(model, "e", depth=depth)
        if frozen != "fp32":
            fedms_ext.quantize(model, frozen)
        return model

    def theirs(self, depth: int) -> nn.Module:
        model = self.module()
        names = [name for name, layer in model.named_modules()
                 if isinstance(layer, nn.Linear) and self._block(name) >= self.blocks - depth]
        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=names))

    @staticmethod
    def _block(name: str) -> int:
        """Number of the block, from 0, that a layer lies in; -1 for none."""
        return next((int(part) for part in name.split(".") if part.isdigit()), -1)


MINILM = Case("MiniLM", blocks=6, trained=1, samples=32, tokens=64, width=384)
VIT_B = Case("ViT-B", blocks=12, trained=2, samples=4, tokens=197, width=768)


class Step:
    """One training step of a model with a linear head; a call runs it."""

    def __init__(self, case: Case, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.labels = torch.randint(0, CLASSES, (case.samples,))
        self.head = nn.Linear(case.width, CLASSES)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.lora_parameters = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW([*trained, *self.head.parameters()], lr=1e-4, fused=True)

    def hidden(self) -> Tensor:
        return self.model(**self.batch).last_hidden_state

    def __call__(self) -> None:
        loss = nn.functional.cross_entropy(self.head(self.hidden().mean(1)), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class CachedStep(Step):
    """The same, with the outputs of the constant prefix taken from where a cache keeps them."""

    def __init__(self, case: Case, model: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__(case, model, batch)
        self.prefix = ConstantPrefix(model)
        self.stored = Ragged(list(self.prefix.capture(super().hidden)))
        self.rows = torch.arange(case.samples)

    def hidden(self) -> Tensor:
        with self.prefix.replay(self.stored.pad(self.rows)):
            return super().hidden()
