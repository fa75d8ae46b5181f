"""A federation's server: its folder, whom it has accepted, and the run.

    DIR/                     only its owner can enter it
      run.toml               the run file, everything filled in
      invite.toml            what is sent to those who may take part
      certificates/          of the server and of its own authority (`fedms.engines.flower.certificates`)
      clients.json           who was accepted: number, name, public key
      privacy.key            with privacy.mode = "central": the secret key of the noise
      run/                   the run folder, with records and checkpoints
      status.json            where a server that runs stands
"""
from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from fedms.config import ConfigError, RunConfig, config_from_dict, dump_toml, load_config, registry
from fedms.deployment import NAME, DeploymentError, roster
from fedms.deployment.invitation import Invitation, read_invitation
from fedms.engines.flower.transport import tables_of
from fedms.errors import Interrupted
from fedms.foreign import conform, parse_json, read_regular
from fedms.privacy.key_file import create_key, read_key
from fedms.progress import Progress
from fedms.storage.durable import FolderLock, private_folder, write_durably

RUN_FILE, INVITATION, CLIENTS, RUN, STATUS, CERTIFICATES, KEY = (
    "run.toml", "invite.toml", "clients.json", "run", "status.json", "certificates", "privacy.key")
SEATS = 100             # clients.count where a run file leaves it open: the most that may be accepted
NOTES = 20              # last lines of what happened that a status keeps


@dataclass(frozen=True)
class Member:
    """A client that was accepted. Its `number` never changes, `key` is its public key in OpenSSH's format, and `removed` says that
    it no longer takes part. `identity` and `proof` are for secure sums, see `fedms.deployment.roster.Listed`."""

    number: Annotated[int, Field(ge=0)]
    name: str
    key: str
    removed: bool = False
    identity: str = ""
    proof: str = ""


_MEMBERS = TypeAdapter(list[Member])


# Beginning

def init(folder: Path, config: RunConfig, host: str, port: int, progress: Progress) -> Invitation:
    """Write a server's folder.

    Args:
        host: Name or address by which clients reach the server.

    Raises:
        ConfigError, ModelError: If the run file does not suit a federation, or its model cannot be loaded.
        DeploymentError: If the folder is not empty.
    """
    from fedms import data, models
    from fedms.engines.flower import certificates

    if folder.exists() and any(folder.iterdir()):
        raise DeploymentError(f"{folder}: exists and is not empty; choose another folder")
    config, key = federated(config), own_key(config)
    progress.phase(f"loading model {config.model.id}")
    foundation = models.load(config.model, config.task.kind)
    private_folder(folder)
    certificates.make(folder / CERTIFICATES, [host])
    authority = (folder / CERTIFICATES / "ca.crt").read_text()
    invitation = Invitation(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", authority, config,
                            foundation.fingerprint, data.preprocessing_fingerprint(config.data, foundation))
    if config.privacy.mode == "central":
        create_key(folder / KEY, key)
    write_durably(folder / RUN_FILE, dump_toml(config).encode())
    _write_members(folder, [])
    invitation.write(folder / INVITATION)       # last: its presence says that the rest is there
    return invitation


def own_key(config: RunConfig) -> bytes | None:
    """Return the key in the file `privacy.key` if the server adds the noise and the file exists, otherwise None.

    Raises:
        KeyFileError: If the file does not hold a key, or other users can read it.
    """
    path = Path(config.privacy.key)
    return read_key(path) if config.privacy.mode == "central" and path.exists() else None


def federated(config: RunConfig) -> RunConfig:
    """Return the run file, changed for clients that bring their own data.

    Raises:
        ConfigError: If keys are missing, or have no meaning for such clients; the message names all of them.
    """
    problems = []
    if config.data.classes is None and config.task.kind == "classification":
        problems.append('data.classes: an invitation names the classes, in order; set for example data.classes=["cat", "dog"]')
    for key, value in (("clients.budgets", config.clients.budgets), ("clients.unseen", config.clients.unseen),
                       ("sal.visit_flops", config.sal.visit_flops), ("sal.visit_seconds", config.sal.visit_seconds),
                       ("data.client", config.data.client), ("data.max_samples", config.data.max_samples),
                       ("lora.start", config.lora.start), ("model.trust_remote_code", config.model.trust_remote_code)):
        if value:
            problems.append(f"{key}: {value!r} has no meaning where each client brings its own data and machine; remove it")
    if config.privacy.mode != "off" and config.clients.count is None:
        problems.append(f"clients.count: unset; with privacy.mode = {config.privacy.mode!r} sums are divided by the number of clients, "
                        "which must be known before the run")
    if problems:
        raise ConfigError(problems)
    tables = tables_of(config)
    if config.model.id not in registry.models() and (model := Path(config.model.id).expanduser()).is_dir():
        tables["model"]["id"] = str(model.absolute())       # the server may be started from another folder, as by a service
    tables["data"] |= {"name": "clients", "partition": "own", "global_test": 0.0}
    tables["run"]["engine"] = "flower"
    tables["clients"]["count"] = config.clients.count or SEATS
    return config_from_dict(tables)


def read_config(folder: Path) -> RunConfig:
    """Return the run file of a server, or raise DeploymentError if the folder does not belong to one."""
    if not (folder / INVITATION).is_file():
        raise DeploymentError(f"{folder}: no server's folder; `fedms server init {folder} RUNFILE --host NAME` makes one")
    config = load_config(str(folder / RUN_FILE))
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"key": str((folder / KEY).absolute())})})


# Who takes part

def members(folder: Path) -> list[Member]:
    """Return all clients that were accepted, by number. Raise DeploymentError if the list cannot be read."""
    path = folder / CLIENTS
    try:
        listed = parse_json(read_regular(path))
        found = conform(_MEMBERS, [Member(**each) for each in listed])
        if [member.number for member in found] != list(range(len(found))):
            raise ValueError("the clients are not numbered from 0")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise DeploymentError(f"{path}: cannot be read: {error}") from None


def accept(folder: Path, line: str) -> Member:
    """Accept the client whose owner sent this line. A client that was accepted before keeps its number.

    Raises:
        DeploymentError: If the line is not valid, another client has its name or key, or all seats are taken.
    """
    from fedms.engines.flower.link import pem_of

    config = read_config(folder)
    seats, words, masks = config.clients.count, line.split(), config.privacy.masks
    if len(words) != 3 + masks or re.fullmatch(NAME, words[2], re.ASCII) is None:
        raise DeploymentError(f"{line[:60]!r}: expected the line that `fedms client join` printed: ecdsa-sha2-nistp384 KEY NAME"
                              + " IDENTITY.PROOF" * masks)
    key, name = " ".join(words[:2]), words[2]
    identity, _, proof = words[3].partition(".") if masks else ("", "", "")
    try:
        pem_of(key)
    except ValueError as error:
        raise DeploymentError(f"{name}: {error}") from None
    if masks:
        roster.read({"name": name, "key": key, "identity": identity, "proof": proof})
    with _changing(folder) as listed:
        for member in listed:
            if (member.name, member.key) == (name, key) and not member.removed:
                return member
            if member.key == key:
                raise DeploymentError(f"{name}: this key is client {member.name}'s{', who was removed' * member.removed}; join "
                                      "anew with another key")
            if member.name == name and not member.removed:
                raise DeploymentError(f"{name}: another client has this name; ask its owner for another --name")
        if len(listed) >= seats:
            raise DeploymentError(f"{name}: all {seats} seats are taken (clients.count of {folder / RUN_FILE})")
        member = Member(len(listed), name, key, False, identity, proof)
        listed.append(member)
    if masks and len(listed) == seats:
        clients = tuple(roster.read({field: getattr(each, field) for field in roster.FIELDS}) for each in listed)
        replace(read_invitation(folder / INVITATION), clients=clients).write(folder / INVITATION)
    return member


def remove(folder: Path, name: str) -> Member:
    """Exclude a client from the next round on. Raise DeploymentError if no client has this name."""
    with _changing(folder) as listed:
        for member in listed:
            if member.name == name and not member.removed:
                listed[member.number] = replace(member, removed=True)
                return listed[member.number]
    raise DeploymentError(f"{name}: no client of this name; there are "
                          + (", ".join(m.name for m in listed if not m.removed) or "none"))


@contextmanager
def _changing(folder: Path) -> Iterator[list[Member]]:
    """Yield the list of members, for one process at a time to change, and write it at the end."""
    lock = _lock(private_folder(folder / ".changing"), "its list of clients is being changed by process")
    try:
        listed = members(folder)
        yield listed
        _write_members(folder, listed)
    finally:
        lock.release()


def _write_members(folder: Path, listed: Sequence[Member]) -> None:
    write_durably(folder / CLIENTS, json.dumps([asdict(member) for member in listed], indent=1).encode(), private=True)


def _lock(folder: Path, words: str) -> FolderLock:
    try:
        return FolderLock(folder)
    except BlockingIOError as error:
        raise DeploymentError(f"{folder}: {words}: {error}") from None


# Running

class Door:
    """Registers the members, and only them, at a SuperLink. It follows changes of the list while a run is under way."""

    def __init__(self, folder: Path, link: Any) -> None:
        self.folder, self.link = folder, link
        self._inside: dict[int, Member] = {}
        self._seen: tuple[int, int] | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Door:
        self.members()
        threading.Thread(target=self._watch, name="door", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def members(self) -> list[int]:
        """Return the numbers of the clients that take part now. Raise DeploymentError if the list cannot be read."""
        at = os.stat(self.folder / CLIENTS)
        with self._lock:
            if (at.st_mtime_ns, at.st_ino) != self._seen:
                for member in members(self.folder):
                    if member.removed and self._inside.pop(member.number, None):
                        self.link.unregister(f"client-{member.number}")
                    elif not member.removed and member.number not in self._inside:
                        self.link.register(member.key, f"client-{member.number}")
                        self._inside[member.number] = member
                self._seen = (at.st_mtime_ns, at.st_ino)
            return sorted(self._inside)

    def _watch(self) -> None:
        while not self._ended.wait(1):
            with suppress(OSError, DeploymentError):        # the engine's next round says it
                self.members()

    @property
    def names(self) -> dict[int, str]:
        return {number: member.name for number, member in sorted(self._inside.items())}

    def connected(self) -> set[int]:
        return {int(node.name.removeprefix("client-")) for node in self.link.get_nodes()}


def start(folder: Path, bind: str, progress: Progress, stop: Callable[[], bool], *, port: int | None = None,
          wait_for: int | None = None) -> dict[str, Any]:
    """Serve clients, carry out the run or continue it where it stopped, and return its summary.

    Args:
        bind: Address on which to listen.
        port: Port on which to listen, or None for the invitation's.
        wait_for: Number of clients to wait for before the first round, or None for all accepted ones, at least one.

    Raises:
        DeploymentError: If the folder does not belong to a server or is in use, or a certificate has expired.
        FedMSError: See `fedms.runs.run.run`.
    """
    from fedms import data, models
    from fedms.engines.flower.link import SuperLink
    from fedms.progress import Listeners
    from fedms.runs.run import run

    config = read_config(folder)
    if config.privacy.mode != "off" and (seats := config.clients.count) != (there := len(members(folder))):
        raise DeploymentError(f"{folder}: {there} of {seats} clients are accepted; with privacy.mode = {config.privacy.mode!r} all must be "
                              "before the first round (fedms server accept), or a new folder must have a smaller clients.count")
    lock = _lock(folder, "is served already")
    try:
        for line in check_certificates(folder):
            progress.note(line)
        link, address = SuperLink(), _address(folder)
        with Door(folder, link) as door, link.serve(bind, address[1] if port is None else port, folder / CERTIFICATES) as port:
            status = Status(folder, door, f"{bind}:{port}")
            told = Listeners(progress, status)
            told.note(f"listening on {bind}:{port}; clients call {address[0]}:{address[1]}")
            _wait(door, wait_for, told, stop)
            shard = data.without_samples(config.data, models.load(config.model, config.task.kind))
            return run(config, folder / RUN, resume=True, progress=told, stop=stop, grid=link, shard=shard,
                       members=door.members)
    finally:
        lock.release()


def _wait(door: Door, wait_for: int | None, progress: Progress, stop: Callable[[], bool]) -> None:
    said = None
    while True:
        accepted, there = door.members(), door.connected()
        needed = max(1, len(accepted)) if wait_for is None else wait_for
        if len(there & set(accepted)) >= needed:
            return
        missing = ", ".join(name for number, name in door.names.items() if number not in there)
        if (line := f"{len(there)} of {needed} clients are connected" + (f"; not there: {missing}" if missing else "")) != said:
            progress.note(line)
            said = line
        if stop():
            raise Interrupted("no round has begun")
        time.sleep(0.2)


def _address(folder: Path) -> tuple[str, int]:
    host, _, port = read_invitation(folder / INVITATION).address.rpartition(":")
    return host, int(port)


def renew(folder: Path) -> list[str]:
    """Renew certificates that expire within a month, with the same keys, and the invitation if the authority's is among them.
    Return the names of the renewed files. Raise DeploymentError if a file cannot be read or written."""
    from fedms.engines.flower import certificates

    keys = folder / CERTIFICATES
    try:
        renewed = certificates.make(keys, certificates.hosts_of(keys))
        if "ca.crt" in renewed:
            replace(read_invitation(folder / INVITATION), authority=(keys / "ca.crt").read_text()).write(folder / INVITATION)
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{keys}: {error}") from None
    return renewed


def check_certificates(folder: Path) -> list[str]:
    """Return a line for each certificate that expires within a month. Raise DeploymentError if one has expired or is unreadable."""
    from datetime import datetime, timezone

    from fedms.engines.flower import certificates

    keys = folder / CERTIFICATES
    try:
        lines, first = certificates.warnings(keys), min(certificates.ends(keys).values())
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{keys}: {error}") from None
    if lines and first <= datetime.now(timezone.utc):
        raise DeploymentError("\n".join(lines))
    return lines


class Status(Progress):
    """Writes the state of a running server into its folder, for `fedms server status` and the page."""

    def __init__(self, folder: Path, door: Door, address: str) -> None:
        self.folder, self.door = folder, door
        self.told: dict[str, Any] = {"process": os.getpid(), "address": address, "phase": "", "stage": None, "round": None}
        self.visits: dict[int, dict[str, Any]] = {}
        self.notes: list[str] = []

    def visit(self, stage: str, round: int, client: int, **metrics: Any) -> None:
        self.told |= {"stage": stage, "round": round}
        self.visits[client] = {"stage": stage, "round": round, **{name: metrics.get(name) for name in (
            "status", "reason", "seconds", "bytes_up", "bytes_down", "validation_accuracy")}}
        self._write()

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        self._write()

    def note(self, text: str) -> None:
        self.notes = [*self.notes, f"{time.strftime('%H:%M:%S')} {text}"][-NOTES:]
        self._write()

    def phase(self, text: str) -> None:
        self.told["phase"] = text
        self._write()

    def close(self) -> None:
        self.told["phase"] = "ended"
        self._write()

    def _write(self) -> None:
        connected = self.door.connected()
        clients = [{"number": number, "name": name, "connected": number in connected, "last": self.visits.get(number)}
                   for number, name in self.door.names.items()]
        write_durably(self.folder / STATUS, json.dumps({**self.told, "at": time.time(), "clients": clients,
                                                        "notes": self.notes}).encode(), private=True, sync_name=False)
