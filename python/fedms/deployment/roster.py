"""Who takes part in secure sums: the list of all clients, the same on each of their machines.

Masks hide a client's update only if the keys that it agrees on with others are theirs, and not the server's. So each client
has an identity (`fedms.privacy.secure_sum`), which it signs with the key that is registered at the server. The list goes to
the clients in the invitation, once the last of them was accepted, and its owner agrees to it by `fedms client accept`. A
server could still invent clients; their names are shown then, and the list's fingerprint is the same on all machines.
"""
from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedms.config import RunConfig
from fedms.deployment import NAME, DeploymentError
from fedms.foreign import conform

_SIGNS = ec.ECDSA(hashes.SHA384())


class Listed(BaseModel):
    """A client in the list; its place is its number.

    Attributes:
        name: As its owner chose it.
        key: Public key by which the server knows it, in OpenSSH's form.
        identity: Its public identity in secure sums, 32 bytes in hexadecimal.
        proof: Its signature of name and identity, in hexadecimal.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    key: Annotated[str, Field(max_length=1000)]
    identity: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    proof: Annotated[str, Field(pattern="^[0-9a-f]{16,256}$")]


FIELDS = tuple(Listed.model_fields)
_LISTED = TypeAdapter(Listed)


def sign(key: ec.EllipticCurvePrivateKey, name: str, identity: bytes) -> str:
    """Return a client's proof that an identity is its own: `Listed.proof`."""
    return key.sign(_signed(name, identity.hex()), _SIGNS).hex()


def read(values: Mapping[str, Any]) -> Listed:
    """Read a client of the list from untrusted plain data.

    Raises:
        DeploymentError: If the data do not describe a client, or its key has not signed its identity.
    """
    try:
        listed = conform(_LISTED, dict(values))
    except ValueError as error:
        raise DeploymentError(f"a client of secure sums is not what it should be: {error}; its owner must send the line of `fedms "
                              "client join` again, as it is") from None
    try:
        key = serialization.load_ssh_public_key(listed.key.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("no elliptic-curve key")
        key.verify(bytes.fromhex(listed.proof), _signed(listed.name, listed.identity), _SIGNS)
    except (ValueError, InvalidSignature) as error:
        raise DeploymentError(f"{listed.name}: its identity for secure sums is not signed by its key ({error or 'wrong signature'}); "
                              "its owner must send the line of `fedms client join` again, as it is") from None
    return listed


def check_list(clients: Sequence[Listed], config: RunConfig) -> None:
    """Raise DeploymentError unless a list has one client for each of the run's `clients.count`, and all are different."""
    if len(clients) != config.clients.count:
        raise DeploymentError(f"the list of clients names {len(clients)}, but clients.count is {config.clients.count}")
    for field in ("name", "key", "identity"):
        if len({getattr(client, field) for client in clients}) < len(clients):
            raise DeploymentError(f"the list of clients holds the same {field} twice")


def fingerprint(clients: Sequence[Listed]) -> str:
    """Return a hash of the list, 16 hexadecimal digits, which owners can compare by telephone."""
    return hashlib.sha256(repr(plain(clients)).encode()).hexdigest()[:16]


def told(clients: Sequence[Listed]) -> str:
    """Return a line with the clients' names and the fingerprint of the list."""
    return f"{', '.join(client.name for client in clients)}; fingerprint {fingerprint(clients)}"


def plain(clients: Sequence[Listed]) -> list[dict[str, Any]]:
    """Return the list as plain data."""
    return [client.model_dump() for client in clients]


def _signed(name: str, identity: str) -> bytes:
    return repr(("FedMS secure sums", name, identity)).encode()
