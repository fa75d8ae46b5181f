"""The run folder: what a run leaves on disk, and how it is read back.

    config.toml     the resolved configuration
    rounds.jsonl    one line a round
    visits.jsonl    one line a client and round
    clients.jsonl   one line a client, written at the end
    data.json       which data the run is of: name and fingerprint, compared when it is resumed or compared
    summary.json    the outcome; missing while a run is under way or when it was killed
    checkpoint/     what the run needs to go on (:mod:`fedms.storage.checkpoint`)
    clients/        engine flower-sim: the simulated clients' own folders

Numbers: accuracies, shares and gate weights are fractions in [0, 1] (``*_percent`` are percent), times seconds,
sizes bytes. ``simulated_seconds`` is the time on the clients' own devices (:mod:`fedms.federated.devices`), null where their
speed and link are not given; a round takes as long as its slowest client. Keys are sorted and floats written by
``repr``, so equal runs give equal bytes but for :data:`EXEMPT`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, create_model

from fedms.config import ConfigError, RunConfig, config_from_dict, dump_toml, of_method, upgraded
from fedms.foreign import all_printable, conform, parse_json, parse_toml, read_regular
from fedms.storage.durable import LOCK, TEMPORARY, FolderLock, write_durably

EXEMPT = frozenset({"seconds", "peak_memory_bytes"})
"""Fields that may differ between two runs of the same configuration."""

ROUND_FIELDS = (
    "stage", "round", "depth", "clients", "loss", "validation_accuracy", "validation_loss", "bytes_up", "bytes_down",
    "gate_mean", "gate_entropy", "residual_norm", "seconds", "simulated_seconds", "event",
)
VISIT_FIELDS = (
    "stage", "round", "client", "depth", "status", "reason", "n_train", "loss", "validation_accuracy",
    "validation_loss", "flops", "seconds", "peak_memory_bytes", "bytes_up", "bytes_down", "trained_params",
    "trained_percent", "simulated_seconds", "gate_mean", "gate_entropy",
)
CLIENT_FIELDS = (
    "id", "group", "unseen", "n_train", "n_validation", "n_test", "accuracy", "macro_f1", "gate_mean", "gate_std",
    "gate_entropy", "language",
)
ACCURACY_FIELDS = ("personalized", "mixture", "global", "local", "zero_shot", "half", "oracle")
SUMMARY_FIELDS = (
    "method", "model", "fingerprint", "dataset", "classes", "prompts", "seed", "rounds", "personalized_accuracy",
    "global_test_accuracy",
    "zero_shot_accuracy", "macro_f1", "unseen_accuracy", "gate", "final_depth", "trainable_params",
    "trainable_percent", "bytes_up", "bytes_down", "flops", "seconds", "simulated_seconds",
    "peak_memory_bytes", "notes", "language",
)
OPTIONAL = frozenset({"language"})
"""Fields that are written only where a task has them."""

CONFIG, ROUNDS, VISITS, CLIENTS, SUMMARY, DATA = (
    "config.toml", "rounds.jsonl", "visits.jsonl", "clients.jsonl", "summary.json", "data.json")
_OWN_NAMES = frozenset({CONFIG, DATA, ROUNDS, VISITS, CLIENTS, SUMMARY, "report.html", "checkpoint", "clients", "tensorboard",
                        "wandb", LOCK})
_FRESH = ".new-"
_REPORTED = (("run", "method"), ("run", "seed"), ("model", "id"), ("model", "head"), ("data", "name"),
             ("data", "partition"), ("data", "alpha"), ("lora", "rank"), ("clients", "count"))

# What a line that is read back must be. Fields that are missing were not known to an older version, and become null.
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Text = str | None


def _schema(name: str, fields: Iterable[str], **others: Any) -> TypeAdapter[Any]:
    """A record whose fields are numbers or null but for the `others`; fields that are not known may be there."""
    kinds: dict[str, Any] = {field: (others.get(field, _Number), ... if field in _REQUIRED else None) for field in fields}
    return TypeAdapter(create_model(name, __config__=ConfigDict(extra="ignore", strict=True), **kinds))


_REQUIRED = frozenset({"stage", "round", "client", "id"})
_NUMBERS = dict[str, _Number]
_SCHEMAS = {
    ROUNDS: _schema("Round", ROUND_FIELDS, stage=str, round=_Count, event=_Text),
    VISITS: _schema("Visit", VISIT_FIELDS, stage=str, round=_Count, client=_Count, status=_Text, reason=_Text),
    CLIENTS: _schema("Client", CLIENT_FIELDS, id=_Count, group=_Text, unseen=bool | None, accuracy=_NUMBERS,
                     language=_NUMBERS | None),
    SUMMARY: _schema(
        "Summary", SUMMARY_FIELDS, method=_Text, model=_Text, fingerprint=_Text, dataset=_Text, classes=list[str] | None,
        prompts=list[list[str]] | None, rounds=_NUMBERS | None, personalized_accuracy=_NUMBERS | None,
        unseen_accuracy=_NUMBERS | None, gate=dict[str, _Number | bool] | None, final_depth=_NUMBERS | None,
        notes=list[str] | None, language=_NUMBERS | None)}


class RunFolderError(Exception):
    """A run folder that exists already, cannot be written, or cannot be read."""


class RunFolder:
    """Writer of one run folder, which no other process can write to meanwhile; make it with :meth:`create` or
    :meth:`resume`, and :meth:`close` it."""

    def __init__(self, path: Path, lock: FolderLock):
        self.path, self._lock = path, lock
        self._changed = {ROUNDS, VISITS, CLIENTS}   # files that may not last yet

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, overwrite: bool = False) -> RunFolder:
        """Make the folder with its ``config.toml``, all or nothing.

        A folder that holds anything is refused. With ``overwrite`` an earlier run is replaced, but never a folder
        with files that no run writes, nor one that another process writes to. Raises :class:`RunFolderError`.
        """
        path = Path(path)
        text = dump_toml(config)
        lock = None
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
            # All that can fail for lack of space or rights is done in a folder beside the old files.
            try:
                lock = _lock(path)
                fresh = Path(tempfile.mkdtemp(prefix=_FRESH, dir=path))
                try:
                    for name in (ROUNDS, VISITS, CLIENTS):
                        (fresh / name).touch()
                    write_durably(fresh / CONFIG, text.encode())
                    for name in old:
                        _remove(path / name)
                    for name in (ROUNDS, VISITS, CLIENTS, CONFIG):  # the last one makes it a run folder
                        (fresh / name).rename(path / name)
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
            except BaseException:
                if lock:
                    lock.release()
                    if not existed:
                        shutil.rmtree(path, ignore_errors=True)
                raise
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
        return cls(path, lock)

    @classmethod
    def resume(cls, path: str | Path, config: RunConfig) -> RunFolder:
        """Open the folder of a run that was stopped, or make it where no run has begun.

        Raises :class:`RunFolderError`, and :class:`fedms.config.ConfigError` if the run there has another
        configuration.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            return cls.create(path, config, overwrite=True)
        try:
            lock = _lock(path)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
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
        """The summary of a run that has ended."""
        return RunRecords.read(self.path).summary

    def keep_data(self, name: str, fingerprint: str) -> None:
        """Write down which data the run is of; of an earlier run of the folder they must be the same, see
        :func:`check_same_data`."""
        check_same_data(self.path, name, fingerprint)
        if not (self.path / DATA).exists():
            try:
                write_durably(self.path / DATA, json.dumps({"name": name, "fingerprint": fingerprint}).encode())
            except OSError as error:
                raise RunFolderError(f"{self.path / DATA}: cannot be written: {error.strerror}") from error

    def sync(self) -> dict[str, int]:
        """Make all records so far last; returns the size of each of their files, bytes, for :meth:`rewind`."""
        sizes = {}
        for name in (ROUNDS, VISITS, CLIENTS):
            try:
                with open(self.path / name, "rb") as file:
                    if name in self._changed:
                        os.fsync(file.fileno())
                    sizes[name] = file.seek(0, os.SEEK_END)
            except OSError as error:
                raise RunFolderError(f"{self.path / name}: cannot be written: {error.strerror}") from error
        self._changed = set()
        return sizes

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Drop all records that were added after :meth:`sync` returned these sizes; without sizes, all."""
        for name in (ROUNDS, VISITS, CLIENTS):
            size = sizes.get(name, 0)
            self._changed.add(name)
            try:
                with open(self.path / name, "r+b") as file:
                    if file.seek(0, os.SEEK_END) < size:
                        raise RunFolderError(f"{self.path / name}: lines that belong to the checkpoint are missing; "
                                             "replace the run by --force")
                    file.truncate(size)
            except OSError as error:
                raise RunFolderError(f"{self.path / name}: cannot be written: {error.strerror}") from error

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``rounds.jsonl``; fields of :data:`ROUND_FIELDS`, missing ones become null."""
        self._append(ROUNDS, _complete(record, ROUND_FIELDS))

    def append_visit(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``visits.jsonl``; fields of :data:`VISIT_FIELDS`, missing ones become null."""
        self._append(VISITS, _complete(record, VISIT_FIELDS))

    def append_client(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``clients.jsonl``; fields of :data:`CLIENT_FIELDS`, missing ones become null."""
        record = _complete(record, CLIENT_FIELDS)
        record["accuracy"] = _complete(record["accuracy"] or {}, ACCURACY_FIELDS)
        self._append(CLIENTS, record)

    def write_summary(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``summary.json`` at once (temporary file, fsync, rename); returns it as plain data."""
        plain = _plain(_complete(summary, SUMMARY_FIELDS))
        text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.sync()
            write_durably(self.path / SUMMARY, text.encode())
        except OSError as error:
            raise RunFolderError(f"{self.path / SUMMARY}: cannot be written: {error.strerror}") from error
        return plain

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps(_plain(record), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        self._changed.add(name)
        try:
            file = os.open(self.path / name, os.O_WRONLY | os.O_APPEND)     # a removed folder is not made anew
            try:
                end = os.fstat(file).st_size
                try:
                    _write_all(file, line.encode())
                except OSError:
                    os.ftruncate(file, end)     # a full disk takes a part of the line
                    raise
            finally:
                os.close(file)
        except OSError as error:
            raise RunFolderError(f"{self.path / name}: cannot be written: {error.strerror}") from error


# Fields that had another name in the records of earlier versions.
RENAMED = {"personalised": "personalized", "personalised_accuracy": "personalized_accuracy"}


def renamed(record: Any) -> Any:
    """A record with today's names of its fields, whatever version wrote it."""
    if isinstance(record, dict):
        return {RENAMED.get(key, key): renamed(value) for key, value in record.items()}
    return [renamed(value) for value in record] if isinstance(record, list) else record


@dataclass(frozen=True)
class RunRecords:
    """A run folder read back as plain data. ``config`` has today's keys whatever version wrote it, and none that a later
    version added; ``summary`` is None for a run that has not ended."""

    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    visits: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    summary: dict[str, Any] | None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path, whole: bool = True) -> RunRecords:
        """Read a run folder; for those who look often, without its visits and clients unless ``whole``. A last line
        cut off by a kill is dropped and noted; any other damage raises :class:`RunFolderError` with file and line."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise RunFolderError(f"{path}: no run folder ({CONFIG} is missing)")
        try:
            config = upgraded(parse_toml(read_regular(path / CONFIG)))
            for table, key in _REPORTED:
                if not isinstance(config.get(table), dict) or key not in config[table]:
                    raise RunFolderError(f"{path / CONFIG}: {table}.{key} is missing, so it is not a run's configuration")
            config_from_dict(config)
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            raise RunFolderError(f"{path / CONFIG}: cannot be read: {error}") from None
        notes: list[str] = []
        files = (ROUNDS, VISITS, CLIENTS) if whole else (ROUNDS,)
        lines = {name: _read_lines(path / name, notes) for name in files}
        summary = None
        if (path / SUMMARY).exists():
            try:
                summary = _record(SUMMARY, read_regular(path / SUMMARY))
            except (OSError, ValueError) as error:
                raise RunFolderError(f"{path / SUMMARY}: cannot be read: {error}") from None
        return cls(path, config, lines[ROUNDS], lines.get(VISITS, []), lines.get(CLIENTS, []), summary, tuple(notes))

    @property
    def method(self) -> str:
        return self.config["run"]["method"]

    @property
    def seed(self) -> int:
        return self.config["run"]["seed"]


def find_runs(path: str | Path) -> list[Path]:
    """The run folders at ``path``: itself, or those directly inside it, sorted by name.

    Raises :class:`RunFolderError` if there are none.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunFolderError(f"{path}: no such folder")
    if (path / CONFIG).is_file():
        return [path]
    runs = sorted(child.parent for child in path.glob(f"*/{CONFIG}") if not child.parent.name.startswith("."))
    if not runs:
        raise RunFolderError(f"{path}: holds no run (no {CONFIG} in it or one level below)")
    return runs


def comparable(records: RunRecords) -> dict[str, Any]:
    """Everything recorded but the fields of :data:`EXEMPT`: equal for two runs of one configuration."""
    return _strip({"config": records.config, "rounds": records.rounds, "visits": records.visits,
                   "clients": records.clients, "summary": records.summary})


def _strip(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _strip(v) for k, v in value.items() if k not in EXEMPT}
    return [_strip(v) for v in value] if isinstance(value, list) else value


def _complete(record: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    # A misspelled field would silently leave a null in every table made from the records later.
    if unknown := sorted(set(record) - set(fields)):
        raise ValueError(f"unknown record field {unknown[0]!r}; known: {', '.join(fields)}")
    return {name: record.get(name) for name in fields if name in record or name not in OPTIONAL}


def _plain(value: Any) -> Any:
    """Plain JSON data: scalars of numpy and torch become Python's, NaN and infinities become null."""
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


def _lock(path: Path) -> FolderLock:
    try:
        return FolderLock(path)
    except BlockingIOError as error:
        raise RunFolderError(f"{path}: {error}, another run; wait for its end, or choose another --out") from None


def check_same_config(path: Path, config: RunConfig) -> None:
    """Raises :class:`fedms.config.ConfigError` if the run in a folder has another configuration, naming the keys."""
    earlier = config_from_dict(RunRecords.read(path).config)
    if config.clients.count is None:        # the data said how many, and `check_same_data` compares them
        config = config.model_copy(update={
            "clients": config.clients.model_copy(update={"count": earlier.clients.count})})
    there, here = (_flat(of_method(c.model_dump(exclude_none=True))) for c in (earlier, config))
    if differing := sorted(key for key in {*there, *here} if there.get(key) != here.get(key)):
        raise ConfigError([f"{key}: {here.get(key, 'unset')!r}, but the run in {path} has {there.get(key, 'unset')!r}; "
                           "go on with that value, or choose another --out" for key in differing])


def check_same_data(path: Path, name: str, fingerprint: str) -> None:
    """Raises :class:`fedms.config.ConfigError` if the run in a folder was on data of another fingerprint; folders that name
    none, as older versions wrote them, pass."""
    try:
        there = json.loads((path / DATA).read_text())["fingerprint"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path / DATA}: cannot be read: {error}; run it again by --force") from error
    if there != fingerprint:
        raise ConfigError(f"data.name: {name!r} now holds other data than when {path} was begun (its samples, labels or "
                          "clients have changed), so the two cannot be compared; bring the old data back, choose another "
                          "--out, or run all again by --force")


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data):]


def _is_own(name: str) -> bool:
    """Whether a run writes a file or folder of this name, what a killed one leaves behind included."""
    written = TEMPORARY.fullmatch(name)
    return name in _OWN_NAMES or name.startswith(_FRESH) or (written is not None and written["name"] in _OWN_NAMES)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        text = read_regular(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None
    records = []
    lines = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(path.name, line))
        except ValueError as error:
            if number == len(lines):
                notes.append(f"{path.name}: its last line is cut off and was left out")
            else:
                raise RunFolderError(f"{path}, line {number}: not a record: {error}") from None
    return records


def _record(name: str, line: bytes) -> dict[str, Any]:
    """A record of the file `name`: every field of it, and texts that can be shown; names of classes as they are."""
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    value = renamed(value)
    found = conform(_SCHEMAS[name], value)
    record = {field: value.get(field) for field in type(found).model_fields}
    return {field: each if field in ("classes", "prompts") else all_printable(each) for field, each in record.items()}
