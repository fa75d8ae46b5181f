"""A client's own folder: its private expert between visits. It never leaves the client.

    ROOT/RUN/owner.json          which run and client it belongs to, and the hash of the run file
    ROOT/RUN/state/              checkpoints (`fedms.storage.checkpoint`), one a visit, the last few
    ROOT/RUN/HASH.constants      the stage's constants, as they arrived
    ROOT/RUN/sum.safetensors     what the client holds while a secure sum is under way
    ROOT/RUN/final/              what every client has in the end (`fedms.storage.final`)
    ROOT/RUN/ended.json          that the run has ended here, and the hash of the private state that goes with it
    ROOT/promises.json           what it has agreed to in secure sums, of all runs
    ROOT/privacy.jsonl           the noised sums that it has helped to reveal, of all runs (`fedms.privacy.ledger`)

The server says which visit was the last to count, by the hash of what was saved then. So a visit whose reply was lost,
late or refused leaves no trace, and a server that goes on from an older checkpoint finds clients as they were then.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays

from fedms.errors import CheckpointError, FedMSError, RunFolderError
from fedms.foreign import parse_json, read_regular
from fedms.storage.checkpoint import CheckpointFolder, Snapshot
from fedms.storage.durable import FolderLock, write_durably
from fedms.storage.final import SharedTensors, read_final, write_final
from fedms.tensors import Tensors

KEPT = 3
OWNER = "owner.json"
HELD, PROMISES, ENDED = "sum.safetensors", "promises.json", "ended.json"


class FolderError(FedMSError):
    """A client's folder belongs to another client or run, lacks what was asked for, or cannot be read or written."""


@dataclass(frozen=True)
class State:
    """What a client keeps to itself between two visits.

    Attributes:
        tensors: Its own tensors, by name.
        paid_constants: Constants whose computation has been counted among its operations already, see `FlopMeter.paid`.
        salt: Makes the state's hash, which the server is told, say nothing about the state; empty where it may.
    """

    tensors: Tensors
    paid_constants: frozenset[str]
    salt: str = ""


class ClientFolder:
    """One client's folder for one run, for this process alone until it is closed.

    Args:
        root: The client's own folder.
        run: Id of the run.
        client: Id of the client.
        config: The run file's tables. The first message of a run fixes them: a server that changed in the middle of a run
            what the private state is used for could have it sent.

    Raises:
        FolderError: If it belongs to another run, client or run file, is in use, or cannot be written.
    """

    def __init__(self, root: Path, run: str, client: int, config: Mapping[str, Any] | None = None) -> None:
        if re.fullmatch("[A-Za-z0-9-]{1,64}", run) is None:
            raise FolderError(f"{run!r} is no id of a run: letters, digits and -")
        self.path, self.client = root / run, client
        owner: dict[str, object] = {"run": run, "client": client}
        if config is not None:
            owner["config"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.lock = FolderLock(self.path)
        except BlockingIOError as error:
            raise FolderError(f"{self.path}: {error}, another visit of this client") from None
        except OSError as error:
            raise FolderError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        try:
            self._claim(owner)
        except BaseException:
            self.lock.release()
            raise
        self.states = CheckpointFolder(self.path / "state", KEPT)

    def __enter__(self) -> ClientFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def load(self, digest: str | None) -> State:
        """Return what :meth:`save` saved under this hash.

        Args:
            digest: The hash; None for a client of which no visit has counted yet.

        Raises:
            FolderError: If it is not there, or damaged.
        """
        if digest is None:
            return State({}, frozenset())
        try:
            snapshot, notes = self.states.load(digest)
        except CheckpointError as error:
            raise FolderError(str(error)) from None
        if snapshot is None:
            raise FolderError(f"{self.path}: the private state {digest[:12]} that the server asks for is not there"
                              + "".join(f"; {note}" for note in notes))
        return State(snapshot.private.get(self.client, {}), frozenset(snapshot.state["charged"]))

    def save(self, state: State, stage: str, round: int) -> str:
        """Keep the state after a visit.

        Returns:
            Its hash, the same for the same state.

        Raises:
            FolderError: If it cannot be written. What was there before is then untouched.
        """
        plain = {"stage": stage, "round": round, "charged": sorted(state.paid_constants)}
        try:
            return self.states.save(Snapshot(plain, {}, {self.client: state.tensors}))
        except CheckpointError as error:
            raise FolderError(str(error)) from None

    def end(self, final: SharedTensors, digest: str | None) -> None:
        """Keep what every client has in the end, so that this one can predict without the server.

        Args:
            final: What the server sent last.
            digest: Hash of the private state that goes with it; None where no visit of this client counted.

        Raises:
            FolderError: If it cannot be written.
        """
        try:
            write_final(self.path, final, private=True)
            write_durably(self.path / ENDED, json.dumps({"kept": digest}).encode(), private=True)
        except (OSError, RunFolderError) as error:
            raise FolderError(f"{self.path / ENDED}: cannot be written: {error}") from None

    # A secure sum under way. What the client has promised holds for all runs with its key.

    def hold(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray], promises: Mapping[str, str]) -> None:
        """Save what the client holds in a secure sum (`fedms.privacy.secure_round.write_held`), and what it has promised.

        No answer that depends on it may be sent before this returns.

        Raises:
            FolderError: If it cannot be written.
        """
        try:
            write_durably(self.path.parent / PROMISES, json.dumps(promises).encode(), private=True)
            write_durably(self.path / HELD, save_arrays(dict(arrays), {"held": json.dumps(plain)}), private=True)
        except OSError as error:
            raise FolderError(f"{self.path / HELD}: cannot be written: {error.strerror}") from None

    def held(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what `hold` saved, without the promises.

        Raises:
            FolderError: If it is missing or damaged.
        """
        try:
            with safe_open(self.path / HELD, "numpy") as file:
                return json.loads(file.metadata()["held"]), {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FolderError(f"{self.path / HELD}: {error}") from None

    def promises(self) -> dict[str, str]:
        """Return what the client has promised.

        Raises:
            FolderError: If the promises are damaged: without them the client could promise the contrary.
        """
        path = self.path.parent / PROMISES
        try:
            return json.loads(path.read_bytes()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise FolderError(f"{path}: {error}") from None

    def keep_constants(self, data: bytes) -> None:
        """Keep the constants of a stage as they arrived, in the place of those of the stage before."""
        name = f"{hashlib.sha256(data).hexdigest()}.constants"
        try:
            write_durably(self.path / name, data, private=True)
        except OSError as error:
            raise FolderError(f"{self.path / name}: cannot be written: {error.strerror}") from None
        for other in self.path.glob("*.constants"):
            if other.name != name:
                other.unlink()

    def constants(self, digest: str) -> bytes:
        """Return the constants with this SHA-256. FolderError if they are not there, or damaged."""
        path = self.path / f"{digest}.constants"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FolderError(f"{path}: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise FolderError(f"{path}: wrong checksum")
        return data

    def _claim(self, owner: dict[str, object]) -> None:
        path = self.path / OWNER
        try:
            if not path.exists():
                write_durably(path, json.dumps(owner).encode(), private=True)
            found = parse_json(read_regular(path))
        except (OSError, ValueError) as error:
            raise FolderError(f"{path}: {error}") from None
        if not isinstance(found, dict):
            raise FolderError(f"{path}: is damaged")
        if "config" in owner and found.get("config", owner["config"]) != owner["config"]:
            raise FolderError(f"{path}: the server has changed the run file since this run began; it must start another run")
        if any(found.get(name) != owner[name] for name in ("run", "client")):
            raise FolderError(f"{path}: belongs to {found}, not to {owner}; give this client a folder of its own")


def find_private(root: Path, run: str, client: int, digest: str) -> Tensors | None:
    """Return the tensors that a client kept under a hash, or None if it has no folder there.

    Args:
        root: The client's own folder, or one with those of several clients, as a deployment on one machine and a simulation
            have them.
        run: Id of the run.
        client: Id of the client.
        digest: The hash.

    Raises:
        FolderError: If the client has a folder there, but not with that state, or a damaged one.
    """
    for place in (root / f"client-{client}", root / str(client), root):
        try:
            owner = parse_json(read_regular(place / run / OWNER))
        except (OSError, ValueError):
            continue
        if isinstance(owner, dict) and (owner.get("run"), owner.get("client")) == (run, client):
            with ClientFolder(place, run, client) as folder:
                return folder.load(digest).tensors
    return None


def read_ended(root: Path, client: int) -> tuple[SharedTensors, Tensors] | None:
    """Return what a client has of the run that ended last here: the shared tensors and its own; None if no run has.

    Args:
        root: The client's own folder.
        client: Id of the client.

    Raises:
        FolderError: If it is another client's, or a file is damaged.
    """
    ended = max(root.glob(f"*/{ENDED}"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if ended is None:
        return None
    try:
        digest = parse_json(read_regular(ended))["kept"]
        final = read_final(ended.parent)
    except (OSError, ValueError, KeyError, TypeError, RunFolderError) as error:
        raise FolderError(f"{ended.parent}: cannot be read: {error}") from None
    with ClientFolder(root, ended.parent.name, client) as folder:
        return final, folder.load(digest).tensors
