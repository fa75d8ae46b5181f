"""Small models of many architectures, with random weights, saved as Hugging Face saves them: no hub is asked."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fedms.models import ModuleModel

WIDTH, BLOCKS, IMAGE = 16, 3, 16
WORDS = "a photo of cat dog the film was good bad and not very plain great ear tail".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
COMMON = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
          "intermediate_size": 2 * WIDTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = {**COMMON, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 80}
PIXELS = {"image_size": IMAGE, "patch_size": 8, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
          "num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
TOWER_TEXT = {**COMMON, "max_position_embeddings": 12}

TEXT = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**COMMON, max_position_embeddings=80)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**COMMON, max_position_embeddings=80)),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(
        vocab_size=40, dim=WIDTH, n_layers=BLOCKS, n_heads=2, hidden_dim=2 * WIDTH, max_position_embeddings=80)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**ROTARY)),
    "qwen": lambda: transformers.Qwen2Model(transformers.Qwen2Config(**ROTARY)),
    "gemma": lambda: transformers.GemmaModel(transformers.GemmaConfig(**ROTARY)),
}
IMAGES = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**PIXELS)),
    "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(
        text_config=TOWER_TEXT, vision_config={**PIXELS, "projection_dim": 12}, projection_dim=12)),
    "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(
        text_config={**TOWER_TEXT, "projection_size": WIDTH}, vision_config=PIXELS)),
}
PROCESSORS = {"vit": transformers.ViTImageProcessorPil, "clip": transformers.CLIPImageProcessorPil,
              "siglip": transformers.SiglipImageProcessorPil}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def processor(kind: str):
    if kind == "clip":
        return PROCESSORS[kind](size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    return PROCESSORS[kind](size={"height": IMAGE, "width": IMAGE})


def save(kind: str, folder: Path) -> Path:
    """Writes a random model of a kind, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        (TEXT | IMAGES)[kind]().save_pretrained(folder)
    if kind != "vit":
        tokenizer().save_pretrained(folder)
    if kind in IMAGES:
        processor(kind).save_pretrained(folder)
    return folder


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 2 * WIDTH), "fc2": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmViT(nn.Module):
    """The names and the shape of timm's VisionTransformer: blocks in an nn.Sequential, a class token, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(TimmBlock() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1000)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


def pixels(images: list[Image.Image]) -> Tensor:
    """Pixels of images in [0, 1], float32 of shape (images, 3, IMAGE, IMAGE)."""
    resized = [np.asarray(image.resize((IMAGE, IMAGE)), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def given_as_object() -> ModuleModel:
    """A module that is no model of transformers, with random weights, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module = TimmViT()
    return ModuleModel(module, blocks="blocks", prepare=pixels, name="timm",
                       features=lambda m, inputs: m.forward_features(inputs["pixel_values"])[:, 0])
