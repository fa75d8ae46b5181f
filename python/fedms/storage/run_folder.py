"""The writer of a run folder: create it, lock it, go on with it, append to its records.

:mod:`fedms.storage.records` names the files, and reads them back.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedms.config import RunConfig, config_from_dict, dump_toml, of_method
from fedms.config.paths import with_absolute_paths, with_real_paths
from fedms.errors import ConfigError, RunFolderError
from fedms.foreign import parse_json, read_regular
from fedms.storage.durable import LOCK, TEMPORARY, FolderLock, write_durably
from fedms.storage.final import FINAL
from fedms.storage.records import (ACCURACY_FIELDS, CLIENT_FIELDS, CLIENTS, CONFIG, DATA, OPTIONAL, OUTCOME, OUTCOME_FIELDS,
                                   PROVENANCE, PROVENANCE_FIELDS, ROUND_FIELDS, ROUNDS, SAMPLES, SUMMARY, SUMMARY_FIELDS,
                                   VISIT_FIELDS, VISITS, RunRecords)
from fedms.storage.validation import VALIDATION

_LINES = (ROUNDS, VISITS, CLIENTS)      # files that grow line by line
_OWN_NAMES = frozenset({CONFIG, DATA, SAMPLES, PROVENANCE, *_LINES, OUTCOME, SUMMARY, FINAL, VALIDATION, "report.html", "checkpoint",
                        "clients", "privacy.jsonl", "tensorboard", "wandb", LOCK})
_FRESH = ".new-"


class Beginning(NamedTuple):
    """What a run began with, as its folder says; folders of older versions do not say all.

    Attributes:
        device: Kind of the device: "cpu", "cuda" or "mps". Older folders: "cpu".
        masks: Version of the dropout masks, `fedms_ext.reference.MASK_VERSION`. Older folders: 1.
    """

    device: str
    masks: int


class RunFolder:
    """Writer of one run folder, which no other process can write to meanwhile.

    Make it with :meth:`create` or :meth:`resume`, and :meth:`close` it. Every method raises :class:`RunFolderError` if the
    folder cannot be written.
    """

    def __init__(self, path: Path, lock: FolderLock) -> None:
        self.path, self._lock = path, lock
        self._changed = set(_LINES)         # files whose last lines may not survive a power cut yet

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, overwrite: bool = False) -> RunFolder:
        """Make the folder with its `config.toml`, in which paths are absolute, all or nothing.

        Args:
            path: The folder.
            config: The resolved configuration.
            overwrite: Replace an earlier run. A folder with files that no run writes is never replaced, nor one that
                another process writes to.

        Raises:
            RunFolderError: If the folder holds anything and is not to be replaced, or cannot be written.
        """
        path = Path(path)
        try:
            if path.exists() and not path.is_dir():
                raise RunFolderError(f"{path}: exists and is no folder; choose another --out")
            existed = path.exists()
            old = sorted(set(os.listdir(path)) - {LOCK}) if existed else []
            if old and not overwrite:
                raise RunFolderError(f"{path}: exists and is not empty; choose another --out, or replace it by --force")
            if foreign := [name for name in old if not _is_own(name)]:
                raise RunFolderError(f"{path}: not replaced, as it holds {foreign[0]!r}, which is no part of a run; "
                                     "choose another --out")
            path.mkdir(parents=True, exist_ok=True)
            lock = None
            try:
                lock = _lock(path)
                _fill(path, dump_toml(with_absolute_paths(config)), old)
            except BaseException:
                if lock:
                    lock.release()
                    if not existed:
                        shutil.rmtree(path, ignore_errors=True)
                raise
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path, lock)

    @classmethod
    def resume(cls, path: str | Path, config: RunConfig) -> RunFolder:
        """Open the folder of a run that was stopped, or make it where no run has begun.

        Raises:
            ConfigError: If the run there has another configuration.
            RunFolderError: If the folder cannot be read or written.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            return cls.create(path, config, overwrite=True)
        try:
            lock = _lock(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            check_same_config(path, config)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock)

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.release()

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a run that has ended, else None."""
        return RunRecords.read(self.path).summary

    def keep_data(self, name: str, fingerprint: str, device: str = "cpu", masks: int = 1) -> Beginning:
        """Write down which data the run is of, and what it begins with.

        Args:
            name: Name of the data set, for errors.
            fingerprint: Hash of its samples, labels and groups, keyed in runs with privacy.
            device: Kind of the device that computes now: "cpu", "cuda" or "mps".
            masks: Version of the dropout masks that are drawn now.

        Returns:
            What the run began with.

        Raises:
            ConfigError: If an earlier part of the run was on other data, see :func:`check_same_data`.
        """
        check_same_data(self.path, name, fingerprint)
        if not (self.path / DATA).exists():
            self._write(DATA, json.dumps({"name": name, "fingerprint": fingerprint, "device": device, "masks": masks}))
            return Beginning(device, masks)
        kept = parse_json(read_regular(self.path / DATA))
        device, masks = kept.get("device"), kept.get("masks")
        return Beginning(device if device in ("cpu", "cuda", "mps") else "cpu", masks if type(masks) is int else 1)

    def sync(self) -> dict[str, int]:
        """Make all records so far survive a power cut.

        Returns:
            The size of each file of lines, in bytes, for :meth:`rewind`.
        """
        sizes = {}
        for name in _LINES:
            try:
                with open(self.path / name, "rb") as file:
                    if name in self._changed:
                        os.fsync(file.fileno())
                    sizes[name] = file.seek(0, os.SEEK_END)
            except OSError as error:
                raise _unwritable(self.path / name, error) from error
        self._changed = set()
        return sizes

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Drop all records that were added after :meth:`sync` returned these sizes; all of them for no sizes.

        Raises:
            RunFolderError: If records that were there then are missing.
        """
        for name in _LINES:
            size = sizes.get(name, 0)
            self._changed.add(name)
            try:
                with open(self.path / name, "r+b") as file:
                    if file.seek(0, os.SEEK_END) < size:
                        raise RunFolderError(f"{self.path / name}: is shorter than when the checkpoint was written, so records "
                                             "are missing; start the run again by --force")
                    file.truncate(size)
            except OSError as error:
                raise _unwritable(self.path / name, error) from error

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Add a line to `rounds.jsonl`: fields of `ROUND_FIELDS`, of which missing ones become null."""
        self._append(ROUNDS, _complete(record, ROUND_FIELDS))

    def append_visit(self, record: Mapping[str, Any]) -> None:
        """Add a line to `visits.jsonl`: fields of `VISIT_FIELDS`, of which missing ones become null."""
        self._append(VISITS, _complete(record, VISIT_FIELDS))

    def append_client(self, record: Mapping[str, Any]) -> None:
        """Add a line to `clients.jsonl`: fields of `CLIENT_FIELDS`, of which missing ones become null."""
        record = _complete(record, CLIENT_FIELDS)
        record["accuracy"] = _complete(record["accuracy"] or {}, ACCURACY_FIELDS)
        self._append(CLIENTS, record)

    def append_provenance(self, record: Mapping[str, Any]) -> None:
        """Add a line to `provenance.jsonl`: fields of `PROVENANCE_FIELDS`."""
        there = self.path / PROVENANCE
        before = there.read_text(encoding="utf-8") if there.is_file() else ""
        self._write(PROVENANCE, before + _line(_complete(record, PROVENANCE_FIELDS)))

    def write_outcome(self, outcome: Mapping[str, Any]) -> None:
        """Write `outcome.json` as a whole: fields of `OUTCOME_FIELDS`."""
        self._write(OUTCOME, _pretty(_plain(_complete(outcome, OUTCOME_FIELDS))))

    def write_summary(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json` as a whole: fields of `SUMMARY_FIELDS`. Returns it as plain data."""
        plain = _plain(_complete(summary, SUMMARY_FIELDS))
        self.sync()
        self._write(SUMMARY, _pretty(plain))
        return plain

    def _write(self, name: str, text: str) -> None:
        try:
            write_durably(self.path / name, text.encode())
        except OSError as error:
            raise _unwritable(self.path / name, error) from error

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self._changed.add(name)
        try:
            file = os.open(self.path / name, os.O_WRONLY | os.O_APPEND)     # a removed folder is not made anew
            try:
                end = os.fstat(file).st_size
                try:
                    _write_all(file, _line(record).encode())
                except OSError:
                    os.ftruncate(file, end)     # a full disk takes a part of the line
                    raise
            finally:
                os.close(file)
        except OSError as error:
            raise _unwritable(self.path / name, error) from error


def check_same_config(path: Path, config: RunConfig) -> None:
    """Raise ConfigError if the run in a folder has another configuration, naming the keys that differ.

    Args:
        path: The run folder.
        config: What is to be gone on with.
    """
    earlier = config_from_dict(RunRecords.read(path).config)
    if config.clients.count is None:        # the data said how many, and `check_same_data` compares them
        config = config.model_copy(update={
            "clients": config.clients.model_copy(update={"count": earlier.clients.count})})
    there, here = (_flat(of_method(c.model_dump(exclude_none=True))) for c in map(with_real_paths, (earlier, config)))
    for key in ("run.device", "run.workers", "privacy.key"):        # a run may go on elsewhere, and in other processes
        here[key] = there[key]
    if differing := sorted(key for key in {*there, *here} if there.get(key) != here.get(key)):
        raise ConfigError([f"{key}: {here.get(key, 'unset')!r}, but the run in {path} has {there.get(key, 'unset')!r}; "
                           "go on with that value, or choose another --out" for key in differing])


def check_same_data(path: Path, name: str, fingerprint: str) -> None:
    """Raise ConfigError if the run in a folder was on other data. Folders of older versions, which name none, pass.

    Args:
        path: The run folder.
        name: Name of the data set, for the error.
        fingerprint: Hash of the data that are at hand.

    Raises:
        RunFolderError: If the folder's `data.json` is damaged.
    """
    try:
        there = parse_json(read_regular(path / DATA))["fingerprint"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path / DATA}: cannot be read: {error}; run it again by --force") from error
    if there != fingerprint:
        raise ConfigError(f"data.name: {name!r} now holds other data than when {path} was begun (its samples, labels or "
                          "clients have changed), so the two cannot be compared; bring the old data back, choose another "
                          "--out, or run all again by --force")


def _fill(path: Path, config: str, old: Iterable[str]) -> None:
    """Replace the files `old` of a folder by those of a run that begins.

    All that can fail for lack of space or rights is done in a folder beside the old files.
    """
    fresh = Path(tempfile.mkdtemp(prefix=_FRESH, dir=path))
    try:
        for name in _LINES:
            (fresh / name).touch()
        write_durably(fresh / CONFIG, config.encode())
        for name in old:
            _remove(path / name)
        for name in (*_LINES, CONFIG):      # the last one makes it a run folder
            (fresh / name).rename(path / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _lock(path: Path) -> FolderLock:
    try:
        return FolderLock(path)
    except BlockingIOError as error:
        raise RunFolderError(f"{path}: {error}, another run; wait for its end, or choose another --out") from None


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path}: cannot be written: {error.strerror or error}")


def _complete(record: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return a record with all of these fields. ValueError for any other: it would leave a null in every later table."""
    if unknown := sorted(set(record) - set(fields)):
        raise ValueError(f"unknown record field {unknown[0]!r}; known: {', '.join(fields)}")
    return {name: record.get(name) for name in fields if name in record or name not in OPTIONAL}


def _plain(value: Any) -> Any:
    """Return plain JSON data: scalars of numpy and torch become Python's, NaN and infinities become null."""
    if value is None or type(value) in (str, int, bool):    # most of them
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _pretty(plain: Any) -> str:
    return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data):]


def _is_own(name: str) -> bool:
    """Tell whether a run writes a file or folder of this name, what a killed one leaves behind included."""
    written = TEMPORARY.fullmatch(name)
    return name in _OWN_NAMES or name.startswith(_FRESH) or (written is not None and written["name"] in _OWN_NAMES)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
