"""A client's folder: its key, what its owner agreed to, its data as the model reads them, and its private expert.

    STATE/                   only its owner can enter it
      client.json            name, number (once the server has told it), whether it has left
      invitation.toml        what was agreed to
      offered.json           a changed run file that the server has asked for, until the owner accepts it
      policy.toml            the owner's limits (`fedms.deployment.policy`)
      journal.json           what was done today
      key                    private key, elliptic curve P-384; it never leaves this folder
      privacy.key            for secure sums: 32 secret bytes
      identities.json        for secure sums: the list of clients that was agreed to (`fedms.privacy.member_file`)
      data.safetensors       the samples, divided into training, validation and test (`fedms.data.shard`)
      private/RUN/           the private expert (`fedms.storage.private_state`)
      .lock                  the process that serves this client
"""
from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, TypeAdapter

from fedms.deployment import DeploymentError, roster
from fedms.config import ConfigError, config_from_dict
from fedms.deployment.invitation import Invitation, changes, read_invitation
from fedms.deployment.policy import Journal
from fedms.engines.flower.transport import tables_of
from fedms.foreign import conform, parse_json, read_regular
from fedms.privacy import member_file
from fedms.privacy.key_file import create_key, read_key
from fedms.privacy.secure_sum import identity_of
from fedms.storage.durable import open_new, owner, private_folder, write_durably

CLIENT, INVITATION, OFFERED, POLICY, JOURNAL, KEY, PRIVATE = (
    "client.json", "invitation.toml", "offered.json", "policy.toml", "journal.json", "key", "private")
BOUND = ("model", "data", "lora", "privacy")        # tables of a run file that what is in the folder was made for


@dataclass(frozen=True)
class About:
    """What a client's folder says about the client.

    Attributes:
        name: The name that its owner chose.
        model: Folder of the model on this machine, or None to load the run file's `model.id`.
        number: The number that the server gave it, or None before the first connection.
        left: Whether it has left the federation.
    """

    name: str
    model: str | None = None
    number: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    left: bool = False


_ABOUT = TypeAdapter(About)


class ClientState:
    """The folder of a client that has joined.

    Raises:
        DeploymentError: If the folder does not belong to a client.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / CLIENT
        try:
            self.about = conform(_ABOUT, About(**parse_json(read_regular(path))))
        except FileNotFoundError:
            raise DeploymentError(f"{folder}: no client's folder; `fedms client join INVITATION --data PATH --name NAME "
                                  f"--state {folder}` makes one") from None
        except (OSError, ValueError, TypeError) as error:
            raise DeploymentError(f"{path}: cannot be read: {error}; `fedms client forget {folder}` removes the folder, then "
                                  "join again") from None

    @property
    def invitation(self) -> Invitation:
        """The invitation that the owner has agreed to, read from the folder each time."""
        return read_invitation(self.folder / INVITATION)

    def key(self) -> ec.EllipticCurvePrivateKey:
        """Return the private key, or raise DeploymentError if it cannot be read."""
        path = self.folder / KEY
        try:
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
        except (OSError, ValueError) as error:
            raise DeploymentError(f"{path}: no private key that can be read: {error}; join again with a new one") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise DeploymentError(f"{path}: no elliptic-curve key; join again with a new one")
        return key

    def line(self) -> str:
        """Return the line that the owner sends to the server: public key, name and, for secure sums, the signed identity."""
        key, name = self.key(), self.about.name
        if not self.invitation.config.privacy.masks:
            return f"{_openssh(key)} {name}"
        identity = identity_of(read_key(self.folder / member_file.KEY))
        return f"{_openssh(key)} {name} {identity.hex()}.{roster.sign(key, name, identity)}"

    def process(self) -> int | None:
        """Return the id of the process that serves this client now, or None."""
        return owner(self.folder)

    def change(self, **values: Any) -> None:
        """Change fields of `about`, here and in the folder."""
        self.about = replace(self.about, **values)
        write_about(self.folder, self.about)

    # A changed run file

    def offer(self, tables: dict[str, Any]) -> list[str]:
        """Keep the tables of another run file that the server asks for. Return a line for each change, see `changes`."""
        write_durably(self.folder / OFFERED, json.dumps(tables).encode(), private=True)
        return changes(tables_of(self.invitation.config), tables)

    def offered(self) -> dict[str, Any] | None:
        """Return the tables that `offer` kept, or None. Raise DeploymentError if they cannot be read."""
        path = self.folder / OFFERED
        try:
            tables = parse_json(read_regular(path))
            return tables if isinstance(tables, dict) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DeploymentError(f"{path}: cannot be read: {error}; remove it") from None

    def offer_as_invitation(self) -> Invitation | None:
        """Return the offered run file as an invitation, or None. Raise DeploymentError if it is not a valid run file."""
        if (tables := self.offered()) is None:
            return None
        try:
            return replace(self.invitation, config=config_from_dict(tables))
        except ConfigError as error:
            raise DeploymentError(f"{self.folder / OFFERED}: no run file: {error}") from None

    def lines(self) -> list[str]:
        """Return lines that show the state of this client in a terminal."""
        invitation, process = self.invitation, self.process()
        journal = Journal.read(self.folder / JOURNAL).today(datetime.datetime.now())
        number = "not yet known" if self.about.number is None else str(self.about.number)
        return [f"client    {self.about.name}, number {number}" + (", has left" if self.about.left else ""),
                f"server    {invitation.address}",
                f"run       {invitation.config.run.method} on {invitation.config.model.id}, "
                f"fingerprint {invitation.run_sha256[:16]}",
                f"served    {'no (fedms client start)' if process is None else f'by process {process}'}",
                f"today     {journal.rounds} rounds, {journal.bytes / 1e6:.2f} MB sent and received",
                *_sums(invitation),
                *(["waiting   the server asks for another run file: fedms client accept"] if self.offered() is not None else [])]

    def accept(self, invitation: Invitation) -> None:
        """Agree to an invitation in place of the earlier one.

        Raises:
            DeploymentError: If the folder's data would have to be read again for it, or its list of clients lacks this client.
        """
        before, after = (tables_of(each.config) for each in (self.invitation, invitation))
        bound = [line for line in changes(before, after) if line.split(".")[0] in BOUND]
        if bound or invitation.model_sha256 != self.invitation.model_sha256:
            raise DeploymentError("the change touches the model or how data are read (" + ("; ".join(bound) or "other weights")
                                  + "): leave, and join with the new invitation")
        if invitation.clients:
            self._agree_on(invitation)
        invitation.write(self.folder / INVITATION, private=True)
        (self.folder / OFFERED).unlink(missing_ok=True)

    def _agree_on(self, invitation: Invitation) -> None:
        """Check that the list of clients for secure sums has this client in its place, and keep the list."""
        identities = {number: bytes.fromhex(client.identity) for number, client in enumerate(invitation.clients)}
        own = (self.about.name, _openssh(self.key()), identity_of(read_key(self.folder / member_file.KEY)))
        places = [number for number, client in enumerate(invitation.clients)
                  if (client.name, client.key, identities[number]) == own]
        if not places or self.about.number not in (None, *places):
            raise DeploymentError(f"the list of clients does not have {self.about.name} with this client's keys"
                                  + (f" as number {self.about.number}" if places else "") + "; ask the server's operator")
        member_file.write_agreement(self.folder, member_file.Agreement(member_file.digest_of(invitation.config), identities))

    def forget(self) -> None:
        """Remove the folder with key, data and private expert. Raise DeploymentError while a process serves the client."""
        if (process := self.process()) is not None:
            raise DeploymentError(f"{self.folder}: process {process} serves this client; end it first (fedms client leave)")
        shutil.rmtree(self.folder)


def _sums(invitation: Invitation) -> list[str]:
    """Return the line about the clients of secure sums, if the run has such sums."""
    if not invitation.config.privacy.masks:
        return []
    return [f"sums      with {roster.told(invitation.clients)}" if invitation.clients else
            "waiting   for the list of all clients, in a second invitation: fedms client accept --invitation FILE"]


def _openssh(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def write_about(folder: Path, about: About) -> None:
    """Write what a client's folder says of itself, readable by its owner alone."""
    write_durably(folder / CLIENT, json.dumps(asdict(about)).encode(), private=True)


def make_state(folder: Path, name: str, model: str | None, invitation: Invitation) -> ClientState:
    """Make a client's folder with a new key.

    Raises:
        DeploymentError: If the folder exists and is not empty.
        OSError: If it cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DeploymentError(f"{folder}: exists and is not empty; choose another folder by --state, or remove this one by "
                              f"`fedms client forget {folder}`")
    private_folder(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    with open_new(folder / KEY, private=True) as file:
        file.write(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                     serialization.NoEncryption()))
    if invitation.config.privacy.masks:
        create_key(folder / member_file.KEY)
    invitation.write(folder / INVITATION, private=True)
    write_about(folder, About(name, model))
    return ClientState(folder)
