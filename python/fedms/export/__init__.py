"""`fedms export`: what a run ended with, in formats that others read; one folder, whole or not there.

    peft     one folder an expert (global, client-ID), as PEFT's `PeftModel.from_pretrained` reads it, and its head
    merged   one expert added into the model's weights, as `AutoModel.from_pretrained` reads it, and its head
    onnx     the same, from inputs to logits, as one model.onnx
    mixture  everything, with the foundation model, for `fedms predict` and `fedms.load`

Each holds fedms.json: the classes, the settings of the run, and size and SHA-256 of every other file. Files have the
modes that the umask gives, but for those with a client's own expert, which only their owner can read.
"""
from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedms import models
from fedms.config import ConfigError
from fedms.export.manifest import CLIENTS, MANIFEST, read_manifest, write_manifest
from fedms.export.trained_run import Task, bind, task_of, trained_run_of
from fedms.foreign import printable
from fedms.models import peft_format
from fedms.models import FoundationModel, ModelError
from fedms.models.heads import TextHead
from fedms.models.huggingface import TextModel, VisionModel
from fedms.progress import Progress
from fedms.storage.durable import open_new, sync_folder
from fedms.storage.records import RunFolderError
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel
from fedms_ext import detach, merge

FORMATS = ("peft", "merged", "onnx", "mixture")

__all__ = ["FORMATS", "export", "read_manifest"]

_Transformers = TextModel | VisionModel


def export(run: Path, out: Path, form: str = "mixture", *, client: str | None = None, states: Path | None = None,
           overwrite: bool = False, foundation: FoundationModel | None = None, progress: Progress | None = None,
           trust_remote_code: bool = False) -> Path:
    """Writes the outcome of the run folder `run` into the folder `out`; returns it.

    Args:
        form: one of `FORMATS`.
        client: id or group of the client whose expert is merged; None: the global expert. For merged and onnx.
        states: of a run on Flower, the folder in which a client keeps what is its own, or one with those of several.
        overwrite: replace an earlier export in `out`.
        foundation: the model, where it was given to the run as an object.
        trust_remote_code: the code of the model's repository may be run, where the run did so.

    Raises:
        ConfigError: for an unknown form or client, or a client where there is no choice.
        RunFolderError: if the run has not ended, or `out` exists or cannot be written.
        CheckpointError: if the run's checkpoints are damaged.
        ModelError: if the model cannot be loaded, or is not the one of the run.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format: got {form!r}; accepted: {', '.join(FORMATS)}")
    if client is not None and form not in ("merged", "onnx"):
        raise ConfigError(f"--client: the format {form} holds all clients; it is for merged and onnx")
    progress = progress or Progress()
    task = task_of(run)
    if task.config.model.trust_remote_code and not trust_remote_code and foundation is None:
        raise ConfigError(f"model.trust_remote_code: the run in {run} ran code of the repository of "
                          f"{task.config.model.id!r}; if you trust that code, give --trust-remote-code")
    _check_free(out, overwrite)
    progress.phase(f"loading model {task.config.model.id}")
    foundation = foundation or models.load(task.config.model, task.config.task.kind)
    check_fingerprint(foundation, task)
    with _new_folder(out, overwrite, private=client is not None) as folder:
        if form == "mixture":
            elsewhere = _mixture(run, folder, foundation, task, states)
        elif form == "peft":
            elsewhere = _peft(run, folder, foundation, task, states)
        else:
            elsewhere = _merged(run, folder, foundation, task, states, client, onnx=form == "onnx")
    if elsewhere and client is None:
        progress.note(f"what {len(elsewhere)} clients keep to themselves is not in it, as it is in folders of their own; "
                      "--states DIR names one")
    return out


def check_fingerprint(foundation: FoundationModel, task: Task) -> None:
    """ModelError if the experts were trained on another model."""
    if foundation.fingerprint != task.fingerprint:
        raise ModelError(f"model.id: {foundation.name!r} is not the model that the experts were trained on: its weights "
                         f"have the fingerprint {foundation.fingerprint[:12]}..., expected {task.fingerprint[:12]}...")


# The formats

# Each returns the clients whose private state was not at hand.

def _mixture(run: Path, folder: Path, foundation: FoundationModel, task: Task, states: Path | None) -> frozenset[int]:
    model_keys: dict[str, Any] = {}
    try:
        foundation.save(folder / "base")        # before experts are attached
        model_keys = {"id": "base", "pooling": cast(_Transformers, foundation).pooling, "blocks": foundation.blocks}
    except ModelError:
        if task.config.model.id not in models.MODELS:
            model_keys = {"id": foundation.name}    # given as an object then, and to be given again
    model = bind(foundation, task)
    outcome = trained_run_of(run, task, model, states)
    final = outcome.final
    start = {name: tensor for name, tensor in model.imported.items() if name not in final.tensors}
    parts: Tensors = {}
    for name, tensors in (("tensors", final.tensors), ("constants", {**start, **final.constants}), ("sums", final.statistics)):
        parts |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    _save(parts, folder / "shared.safetensors")
    for number, private in outcome.private.items():
        if private.tensors:
            (folder / CLIENTS).mkdir(mode=0o700, exist_ok=True)
            kept = {n: t for n, t in private.tensors.items() if not n.startswith("optimizer/")}
            _save(kept, folder / CLIENTS / f"{number}.safetensors", private=True)
    write_manifest(folder, "mixture", task, model=model_keys, elsewhere=sorted(outcome.elsewhere),
              final={"stage": final.stage, "round": final.round, "depth": final.depth,
                     "applied_depth": final.applied_depth})
    return outcome.elsewhere


def _peft(run: Path, folder: Path, foundation: FoundationModel, task: Task, states: Path | None) -> frozenset[int]:
    _needs_transformers(foundation)
    if task.config.aggregation == "exact":
        raise ConfigError("--format: exact aggregation adds to the frozen weights, which an adapter cannot hold; accepted: "
                          "merged, onnx, mixture")
    base = task.config.model.id
    if base in models.MODELS:                   # no path of its own
        foundation.save(folder / "base")
        base = "../base"
    elif Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    model = bind(foundation, task)
    lora, module = task.config.lora, foundation.module
    shape = peft_format.Shape(lora.rank, lora.alpha, lora.rslora, base)
    outcome = trained_run_of(run, task, model, states)
    for name, expert in outcome.experts(model).items():
        place = folder / name
        place.mkdir(mode=0o777 if name == "global" else 0o700)
        layers = [n.removeprefix("expert/").removesuffix(".lora_a") for n in expert if n.endswith(".lora_a")]
        (place / peft_format.CONFIG).write_text(peft_format.config_json(shape, layers, type(module).__name__,
                                                                type(module).__module__))
        _save(peft_format.peft_names(expert), place / peft_format.WEIGHTS)
        _save(linear_head(model, expert), place / peft_format.HEAD)
        (place / "README.md").write_text(_card(foundation, task, name, json.dumps(base), peft=True))
    write_manifest(folder, "peft", task)
    return outcome.elsewhere


def _merged(run: Path, folder: Path, foundation: FoundationModel, task: Task, states: Path | None, client: str | None,
            onnx: bool) -> frozenset[int]:
    if not onnx:
        _needs_transformers(foundation)
    plain = task.config.model.model_copy(update={"frozen": "fp32"})     # nothing is merged into quantized weights
    model = bind(foundation, Task(task.config.model_copy(update={"model": plain}), task.classes, task.prompts,
                                  task.groups, task.fingerprint))
    outcome = trained_run_of(run, task, model, states)
    number, experts = outcome.client(client), outcome.experts(model)
    name = "global" if number is None else f"client-{number}"
    if name not in experts:
        raise ConfigError(f"--client: the run has no expert {name!r}; it has {', '.join(experts)}")
    depth = outcome.final.applied_depth
    model.clear()
    model.load("global", experts[name], depth=0, applied_depth=depth)
    with model.stream("global"):
        pass
    head = linear_head(model, experts[name])
    merge(foundation.module, "global")
    detach(foundation.module)
    if onnx:
        _onnx(foundation, head, folder / "model.onnx", task)
    else:
        foundation.save(folder)
        _save(head, folder / peft_format.HEAD)
        (folder / "README.md").write_text(_card(foundation, task, name, '"."', peft=False))
    write_manifest(folder, "onnx" if onnx else "merged", task, expert=name)
    return outcome.elsewhere


def linear_head(model: ExpertModel, expert: Mapping[str, Tensor]) -> Tensors:
    """`weight` (C, D) and `bias` (C,) of an expert's head: logits = features W^T + b. A text head is one too, on
    features of unit length."""
    head = model.heads["global"]
    if not isinstance(head, TextHead):
        return {name: expert[f"head/{name}"].clone() for name in ("weight", "bias")}
    weight = head.class_embeddings / expert["head/log_temperature"].exp()
    return {"weight": weight, "bias": torch.zeros(len(weight))}


def _needs_transformers(foundation: FoundationModel) -> None:
    if not hasattr(foundation, "recipe"):
        raise ModelError(f"{foundation.name}: only models of transformers are exported in this format; "
                         "the mixture format takes any")


# ONNX

class _Classifier(nn.Module):
    """From a batch to logits (B, C), with arguments in the order of `names`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, foundation: FoundationModel, head: Tensors, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.foundation, self.names = foundation.module, [foundation], names
        self.register_buffer("weight", head["weight"])
        self.register_buffer("bias", head["bias"])

    def forward(self, *inputs: Tensor) -> Tensor:
        features = self.foundation[0].features(dict(zip(self.names, inputs)))
        return features @ self.weight.T + self.bias


def _onnx(foundation: FoundationModel, head: Tensors, path: Path, task: Task) -> None:
    try:
        import onnxscript  # noqa: F401  torch's exporter is made of it
    except ImportError as error:
        raise ModelError("--format onnx needs the packages onnx and onnxscript; pip install 'fedms[onnx]'") from error
    if foundation.reads == "text":
        inputs = foundation.tokenize(["a", "a a a"], task.config.data.max_tokens).batch(torch.arange(2))
    else:
        inputs = {"pixel_values": torch.zeros(2, *foundation.pixel_shape)}
    names = tuple(inputs)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    axes = {0: batch, 1: tokens} if foundation.reads == "text" else {0: batch}
    try:
        torch.onnx.export(_Classifier(foundation, head, names).eval(), tuple(inputs.values()), path, dynamo=True,
                          input_names=list(names), output_names=["logits"], verbose=False, external_data=False,
                          dynamic_shapes=((axes,) * len(names),))
    except Exception as error:  # torch's exporter raises many types
        raise ModelError(f"torch's ONNX exporter cannot export a {type(foundation.module).__name__}: "
                         f"{str(error).strip().splitlines()[0]}") from error


# Files

def _save(tensors: Mapping[str, Tensor], path: Path, private: bool = False) -> None:
    with open_new(path, private=private) as file:
        file.write(save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise RunFolderError(f"{out}: exists and is not empty; choose another --out, or replace it by --force")
    if not (out / MANIFEST).is_file():
        raise RunFolderError(f"{out}: not replaced, as it is no earlier export; choose another --out")


@contextmanager
def _new_folder(out: Path, overwrite: bool, private: bool) -> Iterator[Path]:
    """A folder beside `out`, which takes its place when all went well. private: only its owner can enter it."""
    scratch = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(mode=0o700 if private else 0o777)
        yield scratch
        if out.exists():
            _check_free(out, overwrite)
            old = scratch.with_name(scratch.name + "-old")
            out.rename(old)
            scratch.rename(out)
            shutil.rmtree(old)
        else:
            scratch.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise RunFolderError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _card(foundation: FoundationModel, task: Task, expert: str, base: str, peft: bool) -> str:
    lines = ["import torch", "import transformers", *(["from peft import PeftModel"] if peft else []),
             "from safetensors.torch import load_file", "",
             *cast(_Transformers, foundation).recipe(base, task.config.data.max_tokens,
                                                     "PeftModel.from_pretrained(base, \".\")" if peft else None),
             f'head = load_file("{peft_format.HEAD}")', 'logits = features @ head["weight"].T + head["bias"]']
    return "\n".join([
        f"# {expert} expert", "",
        f"Method {task.config.run.method}, model {printable(task.config.model.id)}, data {printable(task.config.data.name)}. "
        f"Classes, in the order of the logits: {', '.join(json.dumps(printable(name, 80), ensure_ascii=False) for name in task.classes)}.", "", "```python", *lines, "```", ""])
