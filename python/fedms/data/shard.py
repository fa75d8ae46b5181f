"""What one machine has of a data set: a client's own samples, or the server's. One safetensors file, so that each client
of a distributed run can be given its own and nothing else.

    data.safetensors      inputs as the model reads them, labels, and who has which of these samples
      metadata "shard"    JSON: names, classes, clients, notes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedms.files import SHARD, shard_about, write_durably

from .dataset import Dataset, make_dataset
from .inputs import DataError, ImageInputs, TextInputs
from .partitioning import ClientSplit, Partition

FORMAT = 1
_PARTS = ("train", "validation", "test")


class ShardError(DataError):
    """A shard that cannot be read or written."""


@dataclass(frozen=True)
class Shard:
    """dataset: the samples of `partition`, in the order of the whole set, so that every client sees the same batches
    as where all of it is at hand. fitting: see `fedms.devices.device_of`."""

    dataset: Dataset
    partition: Partition
    fitting: tuple[int | None, ...]


def shard_of(dataset: Dataset, partition: Partition, fitting: Sequence[int | None]) -> Shard:
    """The samples that this partition names, alone."""
    splits = (*partition.clients, *partition.unseen)
    every = [partition.global_test, *(getattr(split, part) for split in splits for part in _PARTS)]
    kept = torch.cat(every).unique()                # sorted

    def moved(split: ClientSplit) -> ClientSplit:
        parts: dict[str, Any] = {part: torch.searchsorted(kept, getattr(split, part)) for part in _PARTS}
        return replace(split, **parts)

    groups = None if dataset.groups is None else dataset.groups[kept]
    small = make_dataset(dataset.name, _take(dataset.inputs, kept), dataset.labels[kept], dataset.classes,
                         prompts=dataset.prompts, groups=groups, group_names=dataset.group_names)
    return Shard(small, Partition(tuple(map(moved, partition.clients)), tuple(map(moved, partition.unseen)),
                                  torch.searchsorted(kept, partition.global_test), partition.notes), tuple(fitting))


def write_shard(folder: Path, shard: Shard) -> None:
    """Raises ShardError if the folder cannot be written."""
    dataset, partition = shard.dataset, shard.partition
    tensors = {"labels": dataset.labels, "global_test": partition.global_test}
    if dataset.groups is not None:
        tensors["groups"] = dataset.groups
    inputs: dict[str, Any]
    if isinstance(dataset.inputs, TextInputs):
        tensors |= {f"field/{name}": values for name, values in dataset.inputs.fields.items()}
        tensors["offsets"] = dataset.inputs.offsets
        inputs = {"pad_values": dataset.inputs.pad_values}
    else:
        tensors |= {"pixels": dataset.inputs.pixels,
                    **dict(zip(("scale", "shift"), dataset.inputs.transform or ()))}
        inputs = {"tokens": dataset.inputs.tokens}
    for split in (*partition.clients, *partition.unseen):
        tensors |= {f"client/{split.id}/{part}": getattr(split, part) for part in _PARTS}
    about = {"format": FORMAT, "name": dataset.name, "classes": dataset.classes, "prompts": dataset.prompts,
             "group_names": dataset.group_names, "inputs": inputs, "fitting": shard.fitting, "notes": partition.notes,
             "clients": [_about(split) for split in partition.clients],
             "unseen": [_about(split) for split in partition.unseen]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / SHARD, save({name: tensor.contiguous() for name, tensor in tensors.items()},
                                          {"shard": json.dumps(about)}))
    except OSError as error:
        raise ShardError(f"{folder / SHARD}: cannot be written: {error.strerror or error}") from None


def read_shard(folder: Path) -> Shard:
    """Raises ShardError if it is missing, damaged or of a newer format."""
    path = folder / SHARD
    try:
        about = shard_about(folder)
    except ValueError as error:
        raise ShardError(str(error)) from None
    if about["format"] != FORMAT:
        raise ShardError(f"{path}: of format {about['format']}, this version reads {FORMAT}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ShardError(f"{path}: {error}") from None
    inputs: TextInputs | ImageInputs
    if "offsets" in tensors:
        fields = {name.removeprefix("field/"): t for name, t in tensors.items() if name.startswith("field/")}
        inputs = TextInputs(fields, tensors["offsets"], about["inputs"]["pad_values"])
    else:
        transform = (tensors["scale"], tensors["shift"]) if "scale" in tensors else None
        inputs = ImageInputs(tensors["pixels"], about["inputs"]["tokens"], str(path), transform)
    prompts = None if about["prompts"] is None else tuple(map(tuple, about["prompts"]))
    dataset = make_dataset(about["name"], inputs, tensors["labels"], tuple(about["classes"]), prompts=prompts,
                           groups=tensors.get("groups"), group_names=tuple(about["group_names"]))
    clients, unseen = (tuple(ClientSplit(each["id"], each["group"], *(
        tensors[f"client/{each['id']}/{part}"] for part in _PARTS)) for each in about[kind])
        for kind in ("clients", "unseen"))
    return Shard(dataset, Partition(clients, unseen, tensors["global_test"], tuple(about["notes"])),
                 tuple(about["fitting"]))


def _about(split: ClientSplit) -> dict[str, Any]:
    return {"id": split.id, "group": split.group, "n_train": len(split.train)}


def _take(inputs: TextInputs | ImageInputs, kept: Tensor) -> TextInputs | ImageInputs:
    if isinstance(inputs, ImageInputs):
        return replace(inputs, pixels=inputs.pixels[kept])
    lengths = inputs.lengths[kept]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.repeat_interleave(inputs.offsets[:-1][kept] - offsets[:-1], lengths) + torch.arange(int(offsets[-1]))
    return TextInputs({name: values[rows] for name, values in inputs.fields.items()}, offsets, inputs.pad_values)
