"""The shared tensors that a run ended with, as every client has them: what `fedms export` reads.

    final/shared.safetensors    tensors/NAME, constants/NAME and sums/NAME; the metadata say stage, round and depths

What a client keeps to itself is not here: see :mod:`fedms.storage.checkpoint` and :mod:`fedms.storage.private_state`.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors.torch import save

from fedms.errors import RunFolderError
from fedms.foreign import conform, parse_json, read_regular, read_tensors
from fedms.storage.durable import write_durably
from fedms.tensors import Tensors, prefixed, under

FINAL, SHARED = "final", "shared.safetensors"
_GROUPS = {"tensors": "tensors", "constants": "constants", "sums": "statistics"}     # in the file, and here


@dataclass(frozen=True)
class SharedTensors:
    """What every client of a run has in the end.

    Attributes:
        stage: Stage after the last round: "done".
        round: Number of the round that would come next.
        depth: Number of blocks, in the order of activation, that were trained last.
        applied_depth: Number of blocks, in that order, whose experts are applied.
        tensors: What the server sends with every message, by name.
        constants: What it sends once in a stage, by name.
        statistics: What it has added up over clients, by name.
    """

    stage: str
    round: int
    depth: int
    applied_depth: int
    tensors: Tensors
    constants: Tensors
    statistics: Tensors

    def groups(self) -> Tensors:
        """Return all tensors by the names that they have in a file."""
        return {name: tensor for group, field in _GROUPS.items()
                for name, tensor in prefixed(f"{group}/", getattr(self, field)).items()}

    @classmethod
    def of(cls, groups: Tensors, stage: str, round: int, depth: int, applied_depth: int) -> SharedTensors:
        """Return the tensors of a file by group; the counterpart of :meth:`groups`."""
        return cls(stage, round, depth, applied_depth, **{
            field: under(f"{group}/", groups) for group, field in _GROUPS.items()})


_Count = Annotated[int, Field(ge=0)]


class _Head(BaseModel):
    """The metadata of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: str
    round: _Count
    depth: _Count
    applied_depth: _Count


_HEAD = TypeAdapter(_Head)


def has_final(run: Path) -> bool:
    """Tell whether a run folder holds the tensors that the run ended with."""
    return (run / FINAL / SHARED).is_file()


def write_final(run: Path, shared: SharedTensors, *, private: bool = False) -> None:
    """Write the tensors into a run folder, whole or not at all.

    Args:
        run: The run folder.
        shared: The tensors.
        private: Whether only its owner may read the file; otherwise the umask decides.

    Raises:
        RunFolderError: If they cannot be written.
    """
    head = {name: getattr(shared, name) for name in _Head.model_fields}
    data = save({name: tensor.detach().contiguous() for name, tensor in shared.groups().items()}, {"final": json.dumps(head)})
    try:
        (run / FINAL).mkdir(exist_ok=True)
        write_durably(run / FINAL / SHARED, data, private=private)
    except OSError as error:
        raise RunFolderError(f"{run / FINAL}: cannot be written: {error.strerror or error}") from error


def read_final(run: Path) -> SharedTensors:
    """Read the tensors that a run ended with.

    Raises:
        RunFolderError: If they are damaged, or an older version did not keep them.
    """
    path = run / FINAL / SHARED
    try:
        groups, metadata = read_tensors(read_regular(path))
        head = conform(_HEAD, parse_json(metadata.get("final", "")))
    except FileNotFoundError:
        raise RunFolderError(f"{run}: holds no {FINAL}/{SHARED}, as an older version made the run; `fedms run "
                             f"{run}/config.toml --out {run} --resume` adds it without training") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}; run it again") from None
    return SharedTensors.of(groups, head.stage, head.round, head.depth, head.applied_depth)
