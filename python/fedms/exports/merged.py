"""Write one expert added into the model's weights, and the model card that says how it is read."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fedms.config.paths import with_bare_names
from fedms.errors import ConfigError, ModelError
from fedms.exports.manifest import save_tensors, write_manifest
from fedms.exports.predict import bind
from fedms.exports.trained_run import Task, TrainedRun
from fedms.foreign import printable
from fedms.models import FoundationModel, peft_format
from fedms.models.causal_lm import CausalModel
from fedms.models.heads import TextHead
from fedms.models.text_model import TextModel
from fedms.models.vision_model import VisionModel
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel
from fedms_ext import detach, merge


def write(folder: Path, trained: TrainedRun, foundation: FoundationModel, client: str | None) -> None:
    """Write one expert, merged into the weights of its foundation model, into an empty folder.

    Args:
        folder: The folder.
        trained: What the run trained.
        foundation: Its foundation model, whose weights are changed.
        client: Id or group of the client whose expert is written, or None for the global expert.

    Raises:
        ConfigError: If there is no such client or expert.
        ModelError: If the model is none of transformers.
    """
    need_transformers(foundation)
    name, head = merge_expert(trained, foundation, client)
    foundation.save(folder)
    if head is not None:
        save_tensors(head, folder / peft_format.HEAD)
    (folder / "README.md").write_text(model_card(foundation, trained.task, name, '"."', peft=False))
    write_manifest(folder, "merged", trained.task, expert=name)


def merge_expert(trained: TrainedRun, foundation: FoundationModel, client: str | None) -> tuple[str, Tensors | None]:
    """Add an expert into the weights of its foundation model.

    Args:
        trained: What the run trained.
        foundation: Its foundation model, whose weights are changed.
        client: Id or group of the client whose expert is added, or None for the global expert.

    Returns:
        The name of the expert ("global" or "client-ID"), and its head as :func:`linear_head` has it; None for the head of a
        language model, which is the model's own.

    Raises:
        ConfigError: If there is no such client or expert.
    """
    task, config = trained.task, trained.task.config
    # Into the model's own weights: nothing is merged into quantized ones, and in 16 bits the sum would be rounded twice.
    plain = {"model": config.model.model_copy(update={"frozen": "fp32"}), "run": config.run.model_copy(update={"dtype": "fp32"})}
    model = bind(foundation, replace(task, config=config.model_copy(update=plain)))
    number, experts = trained.client(client), trained.experts(model)
    name = "global" if number is None else f"client-{number}"
    if name not in experts:
        raise ConfigError(f"--client: the run has no expert {name!r}; it has {', '.join(experts)}")
    model.clear()
    model.load("global", experts[name], depth=0, applied_depth=trained.final.applied_depth)
    with model.stream("global"):
        pass            # the pairs are now those of the stream
    head = linear_head(model, experts[name]) if model.task.trains_head else None
    merge(foundation.module, "global")
    detach(foundation.module)
    return name, head


def linear_head(model: ExpertModel, expert: Mapping[str, Tensor]) -> Tensors:
    """Return the head of an expert as a linear layer on features: logits = features W^T + b.

    A text head is one too, on features of unit length.

    Args:
        model: The model that the expert belongs to.
        expert: Tensors of the expert by name.

    Returns:
        `weight` (C, D) and `bias` (C,) for C classes and D features.
    """
    head = model.heads["global"]
    if not isinstance(head, TextHead):
        return {name: expert[f"head/{name}"].clone() for name in ("weight", "bias")}
    weight = head.class_embeddings / expert["head/log_temperature"].exp()
    return {"weight": weight, "bias": torch.zeros(len(weight))}


def need_transformers(foundation: FoundationModel) -> None:
    """Raise ModelError if a model cannot be saved as one of transformers."""
    if not hasattr(foundation, "recipe"):
        raise ModelError(f"{foundation.name}: only models of transformers are exported in this format; "
                         "the mixture format takes any")


def model_card(foundation: FoundationModel, task: Task, expert: str, base: str, peft: bool) -> str:
    """Return the README.md of an exported expert: what it is, and the code that uses it.

    Args:
        foundation: Its foundation model.
        task: What it was trained for.
        expert: Its name.
        base: Python expression for where the model is.
        peft: Whether it is an adapter, and not merged.
    """
    recipe = cast(TextModel | VisionModel, foundation).recipe(
        base, task.config.data.max_tokens, "PeftModel.from_pretrained(base, \".\")" if peft else None)
    config = with_bare_names(task.config)
    about = f"Method {config.run.method}, model {printable(config.model.id)}, data {printable(config.data.name)}."
    first = ["```python", "import torch", "import transformers", *(["from peft import PeftModel"] if peft else [])]
    if isinstance(foundation, CausalModel):
        return "\n".join([f"# {expert} expert", "", about, "", *first, "", *recipe, "```", ""])
    classes = ", ".join(json.dumps(printable(name, 80), ensure_ascii=False) for name in task.classes)
    return "\n".join([
        f"# {expert} expert", "",
        f"{about} Classes, in the order of the logits: {classes}.", "", *first,
        "from safetensors.torch import load_file", "", *recipe,
        f'head = load_file("{peft_format.HEAD}")', 'logits = features @ head["weight"].T + head["bias"]', "```", ""])
