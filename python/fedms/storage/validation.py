"""`validation.json`: what each client answers in the end about its validation samples. A run that is tried out ends with it, and
reads no test label."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedms.errors import RunFolderError
from fedms.foreign import parse_json, read_regular
from fedms.storage.durable import write_durably

VALIDATION = "validation.json"


class _Client(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    id: int = Field(ge=0)
    n_validation: int = Field(ge=0)
    accuracy: float | None
    loss: float | None


_CLIENTS = TypeAdapter(list[_Client])


def write_validation(folder: Path, clients: Sequence[Mapping[str, Any]]) -> None:
    """Write the file of a run folder at once.

    Args:
        folder: The run folder.
        clients: What `validate_client` says of each.

    Raises:
        RunFolderError: If it cannot be written.
    """
    try:
        write_durably(folder / VALIDATION, (json.dumps(list(clients), sort_keys=True, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise RunFolderError(f"{folder / VALIDATION}: cannot be written: {error.strerror}") from error


def read_validation(folder: Path) -> tuple[float | None, float | None]:
    """Return accuracy and loss on the validation samples of all clients, each sample counting the same; None on no samples.

    Raises:
        RunFolderError: If the run has not ended, or the file is damaged.
    """
    try:
        clients = _CLIENTS.validate_python(parse_json(read_regular(folder / VALIDATION)))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / VALIDATION}: cannot be read: {error}; run the trial again") from None
    known = [(client.n_validation, client.accuracy, client.loss) for client in clients
             if client.accuracy is not None and client.loss is not None]
    total = sum(count for count, _, _ in known)
    if not total:
        return None, None
    return sum(n * accuracy for n, accuracy, _ in known) / total, sum(n * loss for n, _, loss in known) / total
