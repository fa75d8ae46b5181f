"""The invitation: the one file that a server's operator sends to those who may take part. It holds nothing secret.

    invite.toml
      format, fedms        of the messages, and the release that wrote it
      address              of the server, "host:port"
      authority            certificate of the authority that signed the server's, PEM
      run_sha256           of the run file's tables, as every message repeats them
      model_sha256         of the foundation model's weights
      preprocessing_sha256 of what the model's tokenizer or image transform makes of fixed inputs
      [run_file. ...]      the run file: model, method, labels, columns, limits, privacy
      [[clients]]          for secure sums, once all are accepted: the list of `fedms.deployment.roster`
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedms.config import ConfigError, RunConfig, config_from_dict
from fedms.config.explain import keys
from fedms.deployment import DeploymentError, check_versions, roster
from fedms.deployment.roster import Listed
from fedms.engines.flower.transport import release, tables_of
from fedms.federated.schema import FORMAT
from fedms.foreign import conform, few, parse_toml, read_regular
from fedms.storage.durable import write_durably

FORMAT_OF_FILE = 1
MOST_BYTES = 2**20

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    fedms: Annotated[str, Field(max_length=40)]
    messages: int
    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]_-]{1,260}:[0-9]{1,5}$")]
    authority: Annotated[str, Field(max_length=20_000)]
    run_sha256: _Digest
    model_sha256: _Digest
    preprocessing_sha256: _Digest
    run_file: dict[str, Any]
    clients: list[dict[str, Any]] = []


_FILE = TypeAdapter(_File)


@dataclass(frozen=True)
class Invitation:
    """An invitation to a federation. The module describes the fields."""

    address: str
    authority: str
    config: RunConfig
    model_sha256: str
    preprocessing_sha256: str
    clients: tuple[Listed, ...] = ()

    @property
    def run_sha256(self) -> str:
        """The hash of the run file, see `run_digest`."""
        return run_digest(tables_of(self.config))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes. Empty for tasks without labels."""
        return self.config.data.classes or ()

    def dump(self) -> str:
        """Return the invitation as the text of a TOML file."""
        tables = {"format": FORMAT_OF_FILE, "fedms": release(), "messages": FORMAT, "address": self.address,
                  "authority": self.authority, "run_sha256": self.run_sha256, "model_sha256": self.model_sha256,
                  "preprocessing_sha256": self.preprocessing_sha256, "run_file": tables_of(self.config)}
        if self.clients:
            tables["clients"] = roster.plain(self.clients)
        return ("# An invitation to a federation. Take part by:  fedms client join THIS_FILE --data PATH --name NAME\n"
                + tomli_w.dumps(tables))

    def write(self, path: Path, *, private: bool = False) -> None:
        """Write the invitation to a file, which with `private` only its owner can read."""
        write_durably(path, self.dump().encode(), private=private)


def run_digest(tables: dict[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of the tables of a run file."""
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def read_invitation(path: Path) -> Invitation:
    """Read an invitation.

    Raises:
        DeploymentError: If the file is not a valid invitation, was changed, or comes from another release.
    """
    try:
        tables = parse_toml(read_regular(path, MOST_BYTES))
        if isinstance(tables.get("fedms"), str) and isinstance(tables.get("messages"), int):
            check_versions(tables["fedms"], tables["messages"], "the server that wrote this invitation")
        file = conform(_FILE, tables)
        config = foreign_run_file(file.run_file, f"the server that wrote this invitation runs fedms {file.fedms}")
        clients = tuple(map(roster.read, file.clients))
        if clients:
            roster.check_list(clients, config)
    except DeploymentError as error:
        raise DeploymentError(f"{path}: {error}") from None
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, ConfigError) as error:
        raise DeploymentError(f"{path}: no invitation: {error}") from None
    if file.format != FORMAT_OF_FILE:
        raise DeploymentError(f"{path}: an invitation of format {file.format}; this release reads {FORMAT_OF_FILE}")
    found = Invitation(file.address, file.authority, config, file.model_sha256, file.preprocessing_sha256, clients)
    if found.run_sha256 != file.run_sha256:
        raise DeploymentError(f"{path}: its run file is not the one that run_sha256 names: it was changed on the way, or is of "
                              "another release; ask for it again")
    if config.data.classes is None and config.task.kind == "classification":
        raise DeploymentError(f"{path}: it names no classes (run_file.data.classes)")
    return found


def foreign_run_file(tables: dict[str, Any], whose: str) -> RunConfig:
    """Validate the tables of a run file that another installation has written.

    Args:
        whose: The other side and its release, such as "the server runs fedms 0.1.0", for the message.

    Raises:
        DeploymentError: If its keys are not those of this installation: both are of one release, but of different commits.
        ConfigError: If a value is not valid.
    """
    theirs, ours = _names(tables), {f"{table}.{key}" for table, fields in keys().items() for key in fields}
    differ = [f"it has {few(unknown, 8)}, which this one does not know"] if (unknown := sorted(theirs - ours)) else []
    if not unknown:
        config = config_from_dict(tables)
        differ = [f"it lacks {few(missing, 8)}"] if (missing := sorted(_names(tables_of(config)) - theirs)) else []
    if differ:
        raise DeploymentError(f"{whose}, this machine runs fedms {release()} of another commit, or with other plugins: the run file "
                              f"has other keys there ({differ[0]}); install the same commit on both")
    return config


def _names(tables: dict[str, Any]) -> set[str]:
    return {f"{table}.{key}" for table, values in tables.items() for key in (values if isinstance(values, dict) else [""])}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each key that differs between the tables of two run files, such as "stage1.epochs: 1 -> 5"."""
    flat_before, flat_after = dict(_flat(before)), dict(_flat(after))
    return [f"{key}: {flat_before.get(key, 'unset')} -> {flat_after.get(key, 'unset')}"
            for key in sorted(flat_before.keys() | flat_after.keys()) if flat_before.get(key) != flat_after.get(key)]


def _flat(tables: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
