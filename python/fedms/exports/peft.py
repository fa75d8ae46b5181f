"""Write experts, or blends of a client's two experts, as adapters of PEFT: one folder for each, and its head beside it."""
from __future__ import annotations

import json
from pathlib import Path

from fedms import models
from fedms.config import registry
from fedms.errors import ConfigError
from fedms.exports.blend import blends, check_blend
from fedms.exports.manifest import save_tensors, write_manifest
from fedms.exports.merged import linear_head, model_card, need_transformers
from fedms.exports.predict import bind
from fedms.exports.trained_run import TrainedRun
from fedms.models import FoundationModel, peft_format
from fedms.models.causal_lm import CausalModel


def write(folder: Path, trained: TrainedRun, foundation: FoundationModel, blend: bool = False) -> None:
    """Write every expert of a run, or every client's blend of two experts, into an empty folder.

    Args:
        folder: The folder.
        trained: What the run trained.
        foundation: Its foundation model; experts are attached to it.
        blend: Whether a client's local expert is blended with the global one, see :mod:`fedms.exports.blend`.

    Raises:
        ConfigError: If the run added to the frozen weights, which an adapter cannot hold, or its experts cannot be blended.
        RunFolderError: If there is nothing to blend.
        ModelError: If the model is none of transformers.
    """
    need_transformers(foundation)
    task, form = trained.task, "blend" if blend else "peft"
    if blend:
        check_blend(task.config)
    if task.config.aggregation == "exact":
        raise ConfigError(f'--format: got {form}, but with aggregate.rule = "exact" the run changed the frozen weights too, '
                          "which an adapter cannot hold; accepted: merged, onnx, mixture")
    base = task.config.model.id
    if base in registry.models():                   # no path of its own
        foundation.save(folder / "base")
        base = "../base"
    elif Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    model = bind(foundation, task)
    lora = task.config.lora
    module, kind = ((foundation.whole_class, "CAUSAL_LM") if isinstance(foundation, CausalModel) else
                    (type(foundation.module), None))
    if blend:       # applied with the scale 1
        adapters, shape = blends(trained, model), peft_format.Shape(2 * lora.rank, 2 * lora.rank, False, base)
    else:
        adapters, shape = trained.experts(model), peft_format.Shape(lora.rank, lora.alpha, lora.rslora, base)
    for name, expert in adapters.items():
        place = folder / name
        place.mkdir(mode=0o777 if name == "global" else 0o700)
        layers = [foundation.prefix + n.removeprefix("expert/").removesuffix(".lora_a") for n in expert if n.endswith(".lora_a")]
        (place / peft_format.CONFIG).write_text(
            peft_format.config_json(shape, layers, module.__name__, module.__module__, kind, foundation.transposed))
        save_tensors(peft_format.peft_names(expert, foundation.prefix), place / peft_format.WEIGHTS)
        if isinstance(foundation, CausalModel):
            foundation.tokenizer.save_pretrained(place)     # with its chat template
        else:
            save_tensors(linear_head(model, expert), place / peft_format.HEAD)
        (place / "README.md").write_text(model_card(foundation, task, f"{name} blended" if blend else name, json.dumps(base), peft=True))
    write_manifest(folder, form, task)
