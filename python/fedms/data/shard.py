"""Shards: the part of a data set that one machine holds, a client's own samples or the server's, in one safetensors file.

    data.safetensors      inputs as the model reads them, labels, and the owner of each sample
      metadata "shard"    JSON: names, classes, clients, notes
      metadata "sha256"   of that JSON and of all tensors with their names, dtypes and shapes

The samples are private: only the owner of the file can read it and enter its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor

from fedms.errors import DataError
from fedms.foreign import conform, read_regular, read_tensors
from fedms.storage.durable import SHARD, ShardAbout, ShardClient, parse_about, private_folder, write_durably

from .dataset import Dataset, make_dataset
from .inputs import ImageInputs, TextInputs
from .partitioning import ClientSplit, Partition

FORMAT = 2
_PARTS = ("train", "validation", "test")
_NUMBERS = ("groups", "answers", "answer_bytes")        # of a data set, one a sample, where it has them
_PAD_VALUES, _TOKENS = TypeAdapter(dict[str, int]), TypeAdapter(int)


class ShardError(DataError):
    """A shard cannot be read or written."""


@dataclass(frozen=True)
class Shard:
    """Samples and their partition.

    Attributes:
        dataset: The samples of `partition`, in the order of the complete data set, so that batches are the same as in a run
            that holds all samples.
        fitting: Most blocks that fit the memory of each class of devices.
    """

    dataset: Dataset
    partition: Partition
    fitting: tuple[int | None, ...]

    def of(self, client: int) -> Shard:
        """Return the shard of a single client with another client id, which the client learns only after writing it."""
        if len(self.partition.clients) != 1:
            return self
        return replace(self, partition=replace(self.partition, clients=(replace(self.partition.clients[0], id=client),)))


def shard_of(dataset: Dataset, partition: Partition, fitting: Sequence[int | None]) -> Shard:
    """Return a shard with only the samples that the partition names."""
    splits = (*partition.clients, *partition.unseen)
    every = [partition.global_test, *(getattr(split, part) for split in splits for part in _PARTS)]
    kept = torch.cat(every).unique()                # sorted

    def moved(split: ClientSplit) -> ClientSplit:
        parts: dict[str, Any] = {part: torch.searchsorted(kept, getattr(split, part)) for part in _PARTS}
        return replace(split, **parts)

    numbers: dict[str, Any] = {name: values[kept] for name, values in _numbers(dataset).items()}
    small = make_dataset(dataset.name, _take(dataset.inputs, kept), dataset.labels[kept], dataset.classes,
                         prompts=dataset.prompts, group_names=dataset.group_names, **numbers)
    return Shard(small, Partition(tuple(map(moved, partition.clients)), tuple(map(moved, partition.unseen)),
                                  torch.searchsorted(kept, partition.global_test), partition.notes), tuple(fitting))


def _numbers(dataset: Dataset) -> dict[str, Tensor]:
    return {name: values for name in _NUMBERS if (values := getattr(dataset, name)) is not None}


def write_shard(folder: Path, shard: Shard) -> None:
    """Write a shard. Raise a ShardError if the folder cannot be written."""
    dataset, partition = shard.dataset, shard.partition
    tensors = {"labels": dataset.labels, "global_test": partition.global_test, **_numbers(dataset)}
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
    tensors, text = {name: tensor.contiguous() for name, tensor in tensors.items()}, json.dumps(about)
    try:
        data = save(tensors, {"shard": text, "sha256": _checksum(text, tensors)})
        write_durably(private_folder(folder) / SHARD, data, private=True)
    except OSError as error:
        raise ShardError(f"{folder / SHARD}: cannot be written: {error.strerror or error}") from None


def read_shard(folder: Path) -> Shard:
    """Read a shard. Raise a ShardError if it is missing, damaged, inconsistent, or of another format."""
    path = folder / SHARD
    try:
        tensors, metadata = read_tensors(read_regular(path))
        about = parse_about(metadata)
        if about.format != FORMAT:
            raise ShardError(f"{path}: of format {about.format}, this version reads {FORMAT}; join "
                             "again")
        if metadata.get("sha256") != _checksum(metadata["shard"], tensors):
            raise ShardError(f"{path}: damaged (wrong checksum); join again")
        return _unpacked(path, about, tensors)
    except (OSError, ValueError, KeyError, DataError) as error:
        if isinstance(error, ShardError):
            raise
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ShardError(f"{path}: no shard of a data set: {problem}; `fedms client join` writes them") from None


def _unpacked(path: Path, about: ShardAbout, tensors: Mapping[str, Tensor]) -> Shard:
    """Parse a shard. Raise a ValueError, KeyError or DataError if it is not valid."""
    inputs: TextInputs | ImageInputs
    if "offsets" in tensors:
        fields = {name.removeprefix("field/"): t for name, t in tensors.items() if name.startswith("field/")}
        _check_offsets(tensors["offsets"])
        inputs = TextInputs(fields, tensors["offsets"], conform(_PAD_VALUES, about.inputs["pad_values"]))
        if fields.keys() != inputs.pad_values.keys() or "input_ids" not in fields:
            raise ValueError(f"its fields are {sorted(fields)}, with pad values for {sorted(inputs.pad_values)}")
    else:
        transform = (tensors["scale"], tensors["shift"]) if "scale" in tensors else None
        pixels, shape = tensors["pixels"], (tensors["pixels"].shape[1:2] + (1, 1))
        if transform is not None and any(t.dtype != torch.float32 or t.shape != shape for t in transform):
            raise ValueError(f"its scale and shift are no float32 tensors of shape {tuple(shape)}")
        inputs = ImageInputs(pixels, conform(_TOKENS, about.inputs["tokens"]), str(path), transform)
    prompts = None if about.prompts is None else tuple(map(tuple, about.prompts))
    numbers: dict[str, Any] = {name: tensors.get(name) for name in _NUMBERS}
    dataset = make_dataset(about.name, inputs, tensors["labels"], tuple(about.classes), prompts=prompts,
                           group_names=tuple(about.group_names), **numbers)

    def split(client: ShardClient) -> ClientSplit:
        parts = [_indices(tensors, f"client/{client.id}/{part}", len(dataset)) for part in _PARTS]
        if len(parts[0]) != client.n_train:
            raise ValueError(f"client {client.id} has {len(parts[0])} training samples, not {client.n_train} as it says")
        return ClientSplit(client.id, client.group, *parts)

    clients, unseen = (tuple(map(split, each)) for each in (about.clients, about.unseen))
    return Shard(dataset, Partition(clients, unseen, _indices(tensors, "global_test", len(dataset)), tuple(about.notes)),
                 tuple(about.fitting))


def _check_offsets(offsets: Tensor) -> None:
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not len(offsets) or offsets[0] != 0 or bool(
            (offsets.diff() < 1).any()):
        raise ValueError("its offsets are no int64 numbers that rise from 0")


def _indices(tensors: Mapping[str, Tensor], name: str, count: int) -> Tensor:
    found = tensors[name]
    if found.dtype != torch.int64 or found.dim() != 1 or len(found) and not 0 <= int(found.min()) <= int(found.max()) < count:
        raise ValueError(f"{name} is {found.dtype} of shape {tuple(found.shape)}; expected int64 indices below {count}")
    return found


def _checksum(about: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of the plain data and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(about.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _about(split: ClientSplit) -> dict[str, Any]:
    return {"id": split.id, "group": split.group, "n_train": len(split.train)}


def _take(inputs: TextInputs | ImageInputs, kept: Tensor) -> TextInputs | ImageInputs:
    if isinstance(inputs, ImageInputs):
        return replace(inputs, pixels=inputs.pixels[kept])
    lengths = inputs.lengths[kept]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.repeat_interleave(inputs.offsets[:-1][kept] - offsets[:-1], lengths) + torch.arange(int(offsets[-1]))
    return TextInputs({name: values[rows] for name, values in inputs.fields.items()}, offsets, inputs.pad_values)
