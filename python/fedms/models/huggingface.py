"""Models in Hugging Face's format: text encoders, decoders, vision models, and CLIP-like pairs of towers.

They are named by a hub id or a local folder. Weights are read from safetensors alone, and a repository's own
code is run only if the run file says so (`model.trust_remote_code`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedms.data.inputs import TextInputs
from fedms.errors import DataError, ModelError
from fedms.foreign import parse_json, read_regular

from .base import FoundationModel, fingerprint, import_transformers, quiet_transformers

# Pairs of an image and a text tower: the class of the pair, the class of the image tower alone.
TWO_TOWERS = {
    "clip": ("CLIPModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipModel", "SiglipVisionModel"),
}


class TextModel(FoundationModel):
    """A text encoder, or a decoder read as one.

    pooling: "mean" over real tokens, "cls" (the first token) or "last" (the last real token); "auto" is what
             a decoder needs, "last", and "mean" otherwise. Pooled features are L2-normalized, as sentence
             encoders do, so that class prompts can be compared with them.
    """

    reads = "text"
    # The cosine scale of 20 with which sentence encoders are trained (multiple-negatives ranking loss).
    zero_shot_temperature = 0.05

    def __init__(self, name: str, module: nn.Module, tokenizer: Any, *, pooling: str = "auto",
                 blocks: str | None = None) -> None:
        config: Any = module.config
        super().__init__(name, module, config.hidden_size, blocks)
        config.use_cache = False  # a decoder would keep keys and values for tokens that never come
        self.tokenizer = tokenizer
        self.pooling = pooling if pooling != "auto" else "last" if _is_decoder(module.config) else "mean"
        self.max_tokens = _most_tokens(module, tokenizer)
        self.accepted = set(inspect.signature(module.forward).parameters)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, D) float32, L2-normalized."""
        hidden, mask = self.module(**inputs).last_hidden_state, inputs["attention_mask"]
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            # No sequence is empty, so the sum of the mask is never zero.
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            position = 0 if self.pooling == "cls" else mask.sum(dim=1) - 1
            pooled = hidden[torch.arange(len(hidden)), position]
        return nn.functional.normalize(pooled, dim=-1)

    def tokenize(self, texts: list[str], max_tokens: int) -> TextInputs:
        if not 3 <= max_tokens <= self.max_tokens:
            raise DataError(
                f"data.max_tokens: expected 3 to {self.max_tokens} for {self.name}, got {max_tokens}"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"sample {i}: expected a text, got {text!r}")

        encoded = self.tokenizer(
            texts, padding=False, truncation=True, max_length=max_tokens, return_attention_mask=False
        )
        lengths = torch.tensor([len(row) for row in encoded["input_ids"]], dtype=torch.int64)
        offsets = torch.zeros(len(texts) + 1, dtype=torch.int64)
        torch.cumsum(lengths, dim=0, out=offsets[1:])
        fields = {
            name: torch.tensor([token for row in rows for token in row], dtype=torch.int64)
            for name, rows in encoded.items()
            if name in self.accepted
        }
        # Padding is masked, so a tokenizer without a padding token may pad with any.
        pad = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        return TextInputs(fields, offsets, {name: pad[name] for name in fields})

    def save(self, folder: Path) -> None:
        _save(folder, self.module, self.tokenizer)

    def recipe(self, base: str, max_tokens: int, adapted: str | None) -> list[str]:
        pooled = {"mean": "(hidden * mask).sum(1) / mask.sum(1)", "cls": "hidden[:, 0]",
                  "last": "hidden[torch.arange(len(hidden)), mask.sum(1)[:, 0] - 1]"}[self.pooling]
        return _recipe(self.module, base, adapted) + [
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({base})",
            f"inputs = tokenizer(texts, padding=True, padding_side=\"right\", truncation=True, max_length={max_tokens}, "
            'return_tensors="pt")',
            f"inputs = {{name: inputs[name] for name in {sorted({*self.accepted} & {*self.tokenizer.model_input_names})}}}",
            'hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)',
            f"features = torch.nn.functional.normalize({pooled}, dim=-1)"]


class VisionModel(FoundationModel):
    """A vision model.

    pooling: "mean" over patches, "cls" (the class token); "auto" is the model's own pooled output, else the
             class token, else the mean.
    """

    reads = "images"

    def __init__(self, name: str, module: nn.Module, processor: Any, *, pooling: str = "auto",
                 blocks: str | None = None) -> None:
        if pooling == "last":
            raise ModelError('model.pooling: "last" is for text; accepted for images: "auto", "mean", "cls"')
        self.processor, self.pooling = processor, pooling
        self.channels = getattr(module.config, "num_channels", 3)
        names = [n.rsplit(".", 1)[-1] for n, _ in module.named_parameters()]
        has_class = "cls_token" in names or "class_embedding" in names
        self.class_tokens = has_class + (getattr(module.config, "num_register_tokens", None) or 0)
        if pooling == "cls" and not has_class:
            raise ModelError(f'model.pooling: {name} has no class token; accepted: "auto", "mean"')
        self.module = module.eval()
        super().__init__(name, module, self._probe(), blocks)
        self.image_tokens = _tokens_in_blocks(self)
        self.pixel_transform = self._transform()

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, D) float32, not normalized."""
        out = self.module(**inputs)
        pooled = getattr(out, "pooler_output", None)
        if self.pooling == "auto" and pooled is not None:
            return pooled.flatten(1)
        if self.pooling == "mean" or not self.class_tokens:
            return out.last_hidden_state[:, self.class_tokens:].mean(dim=1)
        return out.last_hidden_state[:, 0]

    def prepare(self, images: Sequence[Any]) -> Tensor:
        # Rescaling and normalizing is affine, so it is left for the batch: pixels stay uint8, a quarter of the memory.
        return self._process(images, do_rescale=False, do_normalize=False)

    def _process(self, images: Sequence[Any], **steps: bool) -> Tensor:
        mode = "L" if self.channels == 1 else "RGB"
        arrays = [_array(image.convert(mode)) for image in images]
        processed = self.processor(images=arrays, input_data_format="channels_last", return_tensors="pt", **steps)
        return processed["pixel_values"]

    def _probe(self) -> int:
        """Width of the features, learned by running one gray image."""
        from PIL import Image

        pixels = self._process([Image.new("L", (32, 32), 128)])
        self.blank, self.pixel_shape = {"pixel_values": pixels.float()}, tuple(pixels.shape[1:])
        try:
            with torch.no_grad():
                return self.features(self.blank).shape[-1]
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{type(self.module).__name__}: cannot read the image that its processor makes, "
                f"{tuple(pixels.shape[1:])}: {error}"
            ) from error

    def _transform(self) -> tuple[Tensor, Tensor]:
        steps = self.processor
        channels = (self.channels, 1, 1)
        factor = steps.rescale_factor if steps.do_rescale else 1.0
        mean = torch.tensor(steps.image_mean if steps.do_normalize else 0.0).expand(self.channels)
        std = torch.tensor(steps.image_std if steps.do_normalize else 1.0).expand(self.channels)
        return (factor / std).view(channels), (-mean / std).view(channels)

    def save(self, folder: Path) -> None:
        _save(folder, self.module, self.processor)

    def recipe(self, base: str, max_tokens: int, adapted: str | None) -> list[str]:
        mode = "L" if self.channels == 1 else "RGB"
        return _recipe(self.module, base, adapted) + [
            f'processor = transformers.AutoImageProcessor.from_pretrained({base}, backend="pil")',
            f'inputs = processor([image.convert("{mode}") for image in images], return_tensors="pt")',
            f"out = model(**inputs)\nfeatures = {self._pooled}"]

    @property
    def _pooled(self) -> str:
        if self.pooling == "auto" and getattr(self.module(**self.blank), "pooler_output", None) is not None:
            return "out.pooler_output.flatten(1)"
        if self.pooling == "mean" or not self.class_tokens:
            return f"out.last_hidden_state[:, {self.class_tokens}:].mean(1)"
        return "out.last_hidden_state[:, 0]"


class TwoTowerModel(VisionModel):
    """A CLIP-like model: images are read by the image tower, which is what experts are attached to; class
    prompts are embedded by the text tower. The zero-shot temperature is the one that the model has learned."""

    def __init__(self, name: str, pair: Any, tokenizer: Any, processor: Any, *, blocks: str | None = None) -> None:
        transformers = import_transformers()
        self.pair, self.tokenizer = pair.eval().requires_grad_(False), tokenizer
        kind = getattr(transformers, TWO_TOWERS[pair.config.model_type][1])
        tower = pair.vision_model
        if not isinstance(tower, kind):  # the tower is that and a projection
            with torch.device("meta"):
                tower = kind(pair.config.vision_config)
            for child, _ in tower.named_children():
                setattr(tower, child, getattr(pair, child))
        super().__init__(name, tower, processor, blocks=blocks)
        self.fingerprint = fingerprint(pair)
        self.zero_shot_temperature = math.exp(-float(pair.logit_scale))

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, D) float32, L2-normalized, in the space that both towers share."""
        out = self.module(**inputs)
        pooled = out.image_embeds if "image_embeds" in out else out.pooler_output
        return nn.functional.normalize(pooled, dim=-1)

    def embed_texts(self, texts: list[str], max_tokens: int) -> Tensor:
        config = self.pair.config.text_config
        inputs = self.tokenizer(
            texts,
            # SigLIP was trained on texts padded to the full length, with the padding read.
            padding="max_length" if self.pair.config.model_type == "siglip" else True,
            truncation=True,
            max_length=min(config.max_position_embeddings, self.tokenizer.model_max_length),
            return_tensors="pt",
        )
        accepted = inspect.signature(self.pair.get_text_features).parameters
        if self.pair.config.model_type == "siglip":
            inputs.pop("attention_mask", None)
        out = self.pair.get_text_features(**{k: v for k, v in inputs.items() if k in accepted})
        return nn.functional.normalize(out if isinstance(out, Tensor) else out.pooler_output, dim=-1)

    def save(self, folder: Path) -> None:
        _save(folder, self.pair, self.tokenizer, self.processor)

    @property
    def _pooled(self) -> str:
        name = "image_embeds" if self.pair.config.model_type == "clip" else "pooler_output"
        return f"torch.nn.functional.normalize(out.{name}, dim=-1)"


def load(table) -> FoundationModel:
    """The model that the [model] table names by `id`, a hub id or a folder (id, pooling, blocks, trust_remote_code).

    Raises ModelError: no such folder or id, weights that are not safetensors or are damaged, a missing
    tokenizer or image processor, an architecture of another kind.
    """
    transformers = import_transformers()
    source = _source(table.id)
    options = {"trust_remote_code": table.trust_remote_code}
    with _explained(table.id), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(source, **options)
        module = _from_pretrained(transformers, source, config, options)
    return wrap(module, _processors(transformers, source, table.id, module, options), name=table.id,
                pooling=_pooling(source, table.pooling), blocks=table.blocks)


def wrap(module: nn.Module, processors: Sequence[Any], *, name: str, pooling: str = "auto",
         blocks: str | None = None) -> FoundationModel:
    """A foundation model of a transformers module that is loaded already.

    processors: the tokenizer, the image processor, or both (tokenizer first) for a pair of towers.
    pooling:    see `TextModel` and `VisionModel`. blocks: dotted name of the list of transformer blocks.
    """
    if cast(Any, module.config).model_type in TWO_TOWERS:
        if pooling != "auto":
            raise ModelError(f"model.pooling: got {pooling!r}, but {name} pools its image tower itself; accepted: \"auto\"")
        return TwoTowerModel(name, module, *processors, blocks=blocks)
    kind = VisionModel if module.main_input_name == "pixel_values" else TextModel
    return kind(name, module, *processors, pooling=pooling, blocks=blocks)


def _source(model_id: str) -> str:
    """A folder with safetensors in it, or a hub id."""
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        if folder.exists() or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
            raise ModelError(f"model.id: {model_id!r} is no folder; accepted: a built-in name, a folder with a model in "
                             "Hugging Face's format, or a hub id such as \"org/name\"")
        return model_id
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.id: {folder} holds no config.json, so it is no model in Hugging Face's format; write "
                         "one with save_pretrained()")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"model.id: {folder} holds no *.safetensors. " + _convert(folder))
    return str(folder)


def _convert(where: str | Path) -> str:
    return ("Other formats are refused, because a pickle (pytorch_model.bin) can run any code when it is read. If you "
            "trust its author, convert it once:\n  python -c \"from transformers import AutoModel; "
            f"AutoModel.from_pretrained('{where}', use_safetensors=False).save_pretrained('DIR')\"\n"
            "save its tokenizer or image processor there too, and set model.id to DIR")


@contextmanager
def _explained(model_id: str) -> Iterator[None]:
    """What transformers raises for a model that cannot be had, as a ModelError in our words."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a damaged file shows itself in many types
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            advice = ("it brings code of its own, which is not run unless you have read it and set "
                      "model.trust_remote_code = true")
        elif "safetensors" in str(error) and isinstance(error, OSError):
            advice = _convert(model_id)
        elif Path(model_id).expanduser().is_dir():
            advice = "save it again with save_pretrained(), or copy it again"
        else:
            advice = ("check the id, the network and, for a private model, the login of `hf auth login`; a local folder "
                      "works too. Built-in models: see docs/reference/configuration.md")
        raise ModelError(f"model.id: {model_id!r} cannot be loaded ({type(error).__name__}: {reason}); "
                         f"{advice}") from error


def _from_pretrained(transformers, source: str, config, options: dict) -> nn.Module:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model.id: a {config.model_type} is an encoder and a decoder; accepted: an encoder, a decoder, a "
                         f"vision model, or a pair of towers ({', '.join(TWO_TOWERS)})")
    if config.model_type in TWO_TOWERS:
        auto = getattr(transformers, TWO_TOWERS[config.model_type][0])
    else:
        # An image tower saved alone is of a class that AutoModel does not choose.
        towers = [tower for _, tower in TWO_TOWERS.values()]
        named = next((name for name in config.architectures or () if name in towers), None)
        auto = getattr(transformers, named) if named else transformers.AutoModel
    kind = auto if auto is not transformers.AutoModel else transformers.AutoModel._model_mapping.get(type(config), None)
    # No pooler of its own is trained into our features, so its weights would lie idle.
    takes = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return auto.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **options,
                                **({"add_pooling_layer": False} if takes else {}))


def _processors(transformers, source: str, model_id: str, module: nn.Module, options: dict) -> list[Any]:
    pair = cast(Any, module.config).model_type in TWO_TOWERS
    images = pair or module.main_input_name == "pixel_values"
    found = []
    try:
        with quiet_transformers():
            if pair or not images:
                found.append(transformers.AutoTokenizer.from_pretrained(source, **options))
            if images:
                # PIL's filters are the reference; torchvision's differ in the last bit, and between versions.
                found.append(transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options))
    except Exception as error:  # missing and damaged files show themselves in many types
        what = "image processor" if images and len(found) == pair else "tokenizer"
        raise ModelError(
            f"model.id: {model_id!r} comes without a usable {what} ({str(error).strip().split(chr(10))[0]}); save it into "
            f"the model's folder with {what.replace(' ', '_')}.save_pretrained()"
        ) from error
    return found


def _pooling(source: str, wanted: str) -> str:
    """A sentence encoder says in a file of its own how its tokens are pooled."""
    if wanted != "auto":
        return wanted
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
        modes = parse_json(read_regular(Path(path))) if path else {}
    except (OSError, ValueError):
        return wanted
    if not isinstance(modes, dict):
        return wanted
    names = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    chosen = [name for name, mode in names.items() if modes.get(f"pooling_mode_{mode}")]
    return chosen[0] if len(chosen) == 1 else wanted


def _is_decoder(config) -> bool:
    """Whether a model reads from left to right: it is made for causal language modeling and for nothing masked."""
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    return (kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def _most_tokens(module: nn.Module, tokenizer: Any) -> int:
    most = getattr(module.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, child in module.named_modules():
        # RoBERTa's positions begin after the padding index.
        if name.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            most -= child.padding_idx + 1
    return min(most, tokenizer.model_max_length)


def _array(image: Any):
    import numpy as np

    array = np.array(image)
    return array if array.ndim == 3 else array[..., None]


def _tokens_in_blocks(model: VisionModel) -> int:
    """Length of the sequence that enters the first block, for one image."""
    seen = []
    block = cast(nn.ModuleList, model.module.get_submodule(model.blocks))[0]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape) if args else None)
    try:
        with torch.no_grad():
            model.features(model.blank)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0]) != 3:
        raise ModelError(
            f"{type(model.module).__name__}: its blocks {model.blocks!r} get "
            f"{'no hidden state' if not seen else f'one of shape {tuple(seen[0])}'}; expected (batch, tokens, width), as in "
            "a plain Vision Transformer. model.blocks names another list"
        )
    return seen[0][1]


def _save(folder: Path, *parts: Any) -> None:
    with quiet_transformers():
        for part in parts:
            part.save_pretrained(folder)


def _recipe(module: nn.Module, base: str, adapted: str | None) -> list[str]:
    """First lines of code that, without this package, makes `features` of `texts` or `images`: the model."""
    kind = type(module)
    bare = ", add_pooling_layer=False" if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else ""
    loaded = f"transformers.{kind.__name__}.from_pretrained({base}{bare}).float()"
    return [f"base = {loaded}", f"model = {adapted}.eval()"] if adapted else [f"model = {loaded}.eval()"]
