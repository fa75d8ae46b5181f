"""Small models with random weights: each a module in eval mode and a function that runs it on random input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedms_ext import LoRA, attach, expert_layers

WIDTH, BLOCKS = 24, 4


class Model(nn.Module):
    """One of the models below: `run()` returns its last hidden state (B, T, D), always for the same input."""

    def __init__(self, inner: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.inputs = inputs

    def run(self) -> Tensor:
        out = self.inner(**self.inputs)
        return out if isinstance(out, Tensor) else out.last_hidden_state


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(1, vocabulary, (3, 7))


def _mask() -> Tensor:
    return (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()


def bert() -> Model:
    """The shape of MiniLM, and narrower: masked attention over padded sequences."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=16,
    )  # fmt: skip
    inputs = {"input_ids": _tokens(50), "attention_mask": _mask()}
    return Model(transformers.BertModel(config, add_pooling_layer=False), inputs).eval()


def vit() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=WIDTH, num_hidden_layers=BLOCKS,
        num_attention_heads=2, intermediate_size=2 * WIDTH,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(3, 1, 8, 8)}
    return Model(transformers.ViTModel(config, add_pooling_layer=False), inputs).eval()


def clip() -> Model:
    """CLIP's vision tower; a whole CLIP has two towers, and its blocks must be named."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=WIDTH, num_hidden_layers=BLOCKS,
        num_attention_heads=2, intermediate_size=2 * WIDTH,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(3, 1, 8, 8)}
    return Model(transformers.CLIPVisionModel(config), inputs).eval()


def llama() -> Model:
    """A decoder: causal attention with rotary positions, fewer heads of keys than of queries, no biases."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=16,
    )  # fmt: skip
    return Model(transformers.LlamaModel(config), {"input_ids": _tokens(50), "attention_mask": _mask()}).eval()


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class TupleBlock(Block):
    """Returns its hidden state in a tuple, as blocks of older models do."""

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (super().forward(hidden),)


class Stack(nn.Module):
    """Blocks in an `nn.ModuleList`, between a layer below and a head above."""

    def __init__(self, kind: type[Block] = Block, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.layers:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden)


def stack() -> Model:
    return Model(Stack(), {"x": torch.randn(3, 7, 5)}).eval()


def tuple_stack() -> Model:
    return Model(Stack(TupleBlock), {"x": torch.randn(3, 7, 5)}).eval()


class Chain(nn.Module):
    """Blocks in an `nn.Sequential`, as in many vision models."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def chain() -> Model:
    return Model(Chain(), {"x": torch.randn(3, 7, WIDTH)}).eval()


MODELS = {"bert": bert, "vit": vit, "clip": clip, "llama": llama, "stack": stack, "tuple stack": tuple_stack, "chain": chain}


def with_experts(model: nn.Module, *names: str, targets="all-linear") -> nn.Module:
    """A model with experts of rank 3 that change what it computes."""
    attach(model, targets, {name: LoRA(3, 6) for name in names})
    for layer in expert_layers(model).values():
        for b in layer.lora_b.values():
            nn.init.normal_(b, std=0.1)
    return model
