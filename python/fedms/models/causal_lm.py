"""Causal language models of transformers: from a folder, a hub id or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedms.data.inputs import TextInputs
from fedms.errors import ModelError
from fedms_ext import budget, use_rms_norm
from fedms_ext.token_loss import FrozenHead

from .base import FoundationModel, fingerprint, import_transformers, quiet_transformers
from .pretrained import explained, source_of
from .text_model import embeddable, most_tokens

# Where configurations say that logits are scaled or capped, and what is done with the number.
_SCALES = {"logit_scale": lambda value: value, "logits_scaling": lambda value: 1 / value}
_CAP = "final_logit_softcapping"


class CausalModel(FoundationModel):
    """A decoder with a head that predicts the next token.

    `module` is the decoder without the head; experts are attached to it. Padding is on the right, where no earlier position
    attends to it, so the decoder needs no mask.

    Attributes:
        tokenizer: A tokenizer of transformers.
        head: A `FrozenHead` that shares the model's weight, with its bias, scale and cap.
        prefix: Dotted name of the decoder in the complete model ("model", "transformer").
        stop_tokens: Tokens that end an answer.
        max_tokens: Length of the longest sequence.
        dequantized: Whether the weights were read from a quantized file.
    """

    reads = "conversations"

    def __init__(self, name: str, whole: Any, tokenizer: Any, *, blocks: str | None = None,
                 dequantized: bool = False) -> None:
        """Wrap a language model.

        Args:
            name: Its name, as in `model.id` of the run file.
            whole: A model of transformers with a language modeling head.
            tokenizer: Its tokenizer.
            blocks: Dotted name of the list of blocks in the decoder, or None to find it.
            dequantized: Whether the weights were read from a quantized file.

        Raises:
            ModelError: If the head is not a Linear layer, or the model does more to the logits than scale and cap them.
        """
        config = whole.config
        whole.eval().requires_grad_(False)
        self.whole_class, self.prefix = type(whole), f"{whole.base_model_prefix}."
        decoder = getattr(whole, whole.base_model_prefix, None)
        if not isinstance(decoder, nn.Module) or whole.get_output_embeddings() is None:
            raise ModelError(f"model.id: {name} is a {type(whole).__name__} without a decoder and a head; expected a causal "
                             "language model")
        self.transposed = _linear_instead_of_conv1d(decoder)
        self.fingerprint_of_whole = fingerprint(whole)
        use_rms_norm(decoder)
        self.head = self._head_of(whole)
        self._check_head(whole)
        super().__init__(name, decoder, config.get_text_config().hidden_size, blocks)
        self.fingerprint = self.fingerprint_of_whole
        self.config, self.tokenizer, self.dequantized = config, tokenizer, dequantized
        self.max_tokens = most_tokens(decoder, tokenizer)
        self.stop_tokens = _stop_tokens(whole, tokenizer)

    def readable(self, inputs: TextInputs) -> TextInputs:
        """Return tokenized texts as `embeddable` makes them. Raise a ModelError if a token has no embedding."""
        return embeddable(inputs, self.name, self.module, self.tokenizer)

    def _head_of(self, whole: Any, dtype: str = "fp32") -> FrozenHead:
        linear, config = whole.get_output_embeddings(), whole.config.get_text_config()
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"model.id: the head of {type(whole).__name__} is a {type(linear).__name__}, expected a Linear layer")
        scale = 1.0
        for key, factor in _SCALES.items():
            if isinstance(value := getattr(config, key, None), (int, float)):
                scale *= factor(value)
        return FrozenHead(linear.weight, linear.bias, scale=scale, cap=getattr(config, _CAP, None), dtype=dtype)

    def _check_head(self, whole: Any) -> None:
        """Raise a ModelError if the model computes its logits in another way than the head."""
        tokens = torch.arange(1, 6).unsqueeze(0) % len(self.head.weight)
        with torch.no_grad():
            out = whole(input_ids=tokens, use_cache=False, output_hidden_states=False).logits
            found = self.head(whole.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
        if not torch.allclose(out.float(), found.float(), rtol=1e-3, atol=1e-3 * float(out.abs().max())):
            raise ModelError(f"model.id: {type(whole).__name__} does more to its logits than a Linear head, a scale "
                             f"({', '.join(_SCALES)}) and a soft cap ({_CAP}) do, so its loss would be another one; use "
                             "another model")

    def quantize_head(self, dtype: str) -> None:
        """Compute the logits from a copy of the head in a dtype that `FrozenHead` takes. Gradients use the original weight."""
        old = self.head
        self.head = FrozenHead(old.weight, old.bias, scale=old.scale, cap=old.cap, dtype=dtype)

    @property
    def ties_head(self) -> bool:
        """Whether the head shares its weight with the embedding, which is a part of `module`."""
        return any(self.head.weight is p for p in self.module.state_dict(keep_vars=True).values())

    @property
    def parameter_count(self) -> int:
        return super().parameter_count + (0 if self.ties_head else self.head.weight.numel())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weights of the decoder and the head, including the head's copy in int8."""
        return super().weight_bytes + budget.weight_bytes(self.head) + (0 if self.ties_head else self.head.weight.nbytes)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.head.to(device)

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the last hidden states (B, T, D) of a batch {"input_ids": (B, T)}, padded on the right."""
        return self.module(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.hidden(inputs)

    def save(self, folder: Path) -> None:
        _save_whole(folder, self)

    def recipe(self, base: str, max_tokens: int, adapted: str | None) -> list[str]:
        """Return lines of code that answer a question without this package."""
        model = f"transformers.AutoModelForCausalLM.from_pretrained({base})"
        loaded = [f"base = {model}", f"model = {adapted}.eval()"] if adapted else [f"model = {model}.eval()"]
        ask = 'tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, ' \
              'return_tensors="pt", return_dict=True)'
        return loaded + [f"tokenizer = transformers.AutoTokenizer.from_pretrained({base})",
                         f"inputs = {ask if self.tokenizer.chat_template else 'tokenizer(question, return_tensors=' + repr('pt') + ')'}",
                         f"answer = model.generate(**inputs, max_new_tokens={max_tokens})[0, inputs.input_ids.shape[1]:]",
                         "print(tokenizer.decode(answer, skip_special_tokens=True))"]


def whole_model(model: CausalModel, state: dict[str, Tensor]) -> Any:
    """Return a new model of transformers with a state of the decoder (names as in `model.module`) and the head."""
    with quiet_transformers():
        transformers = import_transformers()
        config = type(model.config).from_dict(model.config.to_dict())
        vars(config).pop("quantization_config", None)   # of the file that the weights were read from
        whole: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    decoder = whole.base_model
    conv1d = transformers.pytorch_utils.Conv1D
    with torch.no_grad():
        for name, parameter in decoder.state_dict().items():
            owner = decoder.get_submodule(name.rpartition(".")[0])
            value = state[name]
            parameter.copy_(value.T if isinstance(owner, conv1d) and name.endswith(".weight") else value)
        linear = whole.get_output_embeddings()
        if linear.weight is not whole.get_input_embeddings().weight:
            linear.weight.copy_(model.head.weight)
        if linear.bias is not None:
            linear.bias.copy_(model.head.bias)
    return whole


def _save_whole(folder: Path, model: CausalModel) -> None:
    with quiet_transformers():
        whole_model(model, model.module.state_dict()).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def _linear_instead_of_conv1d(decoder: nn.Module) -> bool:
    """Replace Conv1D layers of GPT-2 by Linear layers with the transposed weight, in place. Return whether there were any."""
    from transformers.pytorch_utils import Conv1D

    found = [(name, layer) for name, layer in decoder.named_modules() if isinstance(layer, Conv1D)]
    for name, layer in found:
        inputs, outputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = layer.bias
        decoder.set_submodule(name, linear)
    return bool(found)


def _stop_tokens(whole: Any, tokenizer: Any) -> tuple[int, ...]:
    found: list[int] = []
    for value in (tokenizer.eos_token_id, getattr(whole.generation_config, "eos_token_id", None)):
        found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))


def load(table) -> CausalModel:
    """Load the causal language model that `id` of the [model] table names.

    It is a folder in Hugging Face's format, a hub id, or a GGUF file, whose weights are dequantized.

    Raises:
        ModelError: If the model cannot be loaded.
    """
    path = Path(table.id).expanduser()
    if path.suffix == ".gguf":
        return from_gguf(table.id, path, table.blocks)
    transformers = import_transformers()
    source = source_of(table.id)
    options = {"trust_remote_code": table.trust_remote_code}
    with explained(table.id), quiet_transformers():
        whole = transformers.AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    return CausalModel(table.id, whole, tokenizer, blocks=table.blocks)


def from_gguf(name: str, path: Path, blocks: str | None = None) -> CausalModel:
    """Load a model from a GGUF file, in float32.

    Raises:
        ModelError: If the file cannot be read, or the package gguf is not installed.
    """
    if not path.is_file():
        raise ModelError(f"model.id: {path}: no such file")
    try:
        import gguf  # noqa: F401  transformers needs it
    except ImportError as error:
        raise ModelError("model.id: a GGUF file needs the package gguf; pip install 'fedms[lm]'") from error
    transformers = import_transformers()
    with explained(name), quiet_transformers():
        arguments = {"gguf_file": path.name}
        whole = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **arguments)
    return CausalModel(name, whole, tokenizer, blocks=blocks, dequantized=True)
