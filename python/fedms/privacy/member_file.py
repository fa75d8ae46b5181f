"""Who a client is in secure sums, on a machine of its own: its secret key, and the list of all clients that it agreed on.

    FOLDER/privacy.key          its 32 secret bytes, mode 0600
    FOLDER/identities.json      the run file's hash, and the public identity of each client

Nothing here imports torch: a node reads these files before there is anything to train.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedms.config import RunConfig
from fedms.foreign import parse_json, read_regular
from fedms.privacy.key_file import KeyFileError, read_key
from fedms.privacy.secure_sum import PUBLIC_BYTES, Member, identity_of
from fedms.storage.durable import write_durably

KEY, IDENTITIES = "privacy.key", "identities.json"


@dataclass(frozen=True)
class Agreement:
    """What a client has agreed to before a run of secure sums.

    Attributes:
        run_file: Hash of the run file, see `digest_of`.
        identities: The public identity of every client, by its number.
    """

    run_file: str
    identities: Mapping[int, bytes]


def digest_of(config: RunConfig) -> str:
    """Return a SHA-256, in hexadecimal, of all settings of a run file that decide what a client sends."""
    tables = config.model_dump(mode="json")
    tables["privacy"].pop("key")
    for name in ("engine", "threads", "workers", "device"):
        tables["run"].pop(name)
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def write_agreement(folder: Path, agreement: Agreement) -> None:
    """Write what a client has agreed to, in place of an earlier agreement.

    Raises:
        OSError: If the file cannot be written.
    """
    listed = {str(number): identity.hex() for number, identity in agreement.identities.items()}
    write_durably(folder / IDENTITIES, json.dumps({"config": agreement.run_file, "identities": listed}).encode(), private=True)


def read_agreement(folder: Path) -> Agreement:
    """Read what `write_agreement` wrote.

    Raises:
        KeyFileError: If the file is missing or damaged.
    """
    path = folder / IDENTITIES
    try:
        told = parse_json(read_regular(path))
        identities = {int(number): bytes.fromhex(identity) for number, identity in told["identities"].items()}
        run_file = told["config"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise KeyFileError(f"{path}: not a list of the clients' identities ({error})") from None
    if not isinstance(run_file, str) or any(len(identity) != PUBLIC_BYTES for identity in identities.values()):
        raise KeyFileError(f"{path}: not a list of the clients' identities")
    return Agreement(run_file, identities)


def read_member(folder: Path, client: int) -> Member:
    """Return the client with this number as a participant of secure sums.

    Raises:
        KeyFileError: If its key or the list of identities is missing, or they do not belong together.
    """
    secret, identities = read_key(folder / KEY), read_agreement(folder).identities
    if identities.get(client) != identity_of(secret):
        raise KeyFileError(f"{folder / KEY}: does not belong to the identity of client {client} in {folder / IDENTITIES}")
    return Member(client, secret, identities)
