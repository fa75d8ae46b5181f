"""The records of a run: which fields they have, and how they are read back.

    config.toml     the resolved configuration
    data.json       which data the run is of: name and fingerprint, compared when it is resumed or compared
    provenance.jsonl  one line each time that a process began to work on the run: version, machine, command
    rounds.jsonl    one line a round
    visits.jsonl    one line a client and round
    clients.jsonl   one line a client, written at the end
    outcome.json    what the summary says beyond these lines, such as the names of the classes
    summary.json    the summary, made from all of these; missing while a run is under way or when it was killed
    checkpoint/     what the run needs to go on (:mod:`fedms.storage.checkpoint`)
    final/          the shared tensors as every client has them in the end (:mod:`fedms.storage.final`)
    clients/        engine flower-sim: the simulated clients' own folders

In buffered rounds (`[clients] asynchronous`) visits stand in the order of their arrival, in the round that they arrived in;
`staleness` is the number of rounds that went by since the client was asked.

Accuracies, shares and gate weights are fractions in [0, 1] (`*_percent` are percent), times seconds, sizes bytes.
`simulated_seconds` is the time on the clients' own devices (:mod:`fedms.federated.devices`), null where their speed and
link are not given; a round takes as long as its slowest client. Keys are sorted and floats written by `repr`, so equal
runs give equal bytes but for the fields of :data:`EXEMPT`.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, create_model

from fedms.config import config_from_dict, upgraded
from fedms.errors import RunFolderError
from fedms.foreign import all_printable, conform, parse_json, parse_toml, read_regular

EXEMPT = frozenset({"seconds", "peak_memory_bytes"})
"""Fields that may differ between two runs of the same configuration."""

ROUND_FIELDS = (
    "stage", "round", "depth", "clients", "loss", "validation_accuracy", "validation_loss", "bytes_up", "bytes_down",
    "gate_mean", "gate_entropy", "residual_norm", "seconds", "simulated_seconds", "event", "epsilon",
)
VISIT_FIELDS = (
    "stage", "round", "client", "depth", "status", "reason", "n_train", "loss", "validation_accuracy",
    "validation_loss", "flops", "seconds", "peak_memory_bytes", "bytes_up", "bytes_down", "trained_params",
    "trained_percent", "simulated_seconds", "gate_mean", "gate_entropy", "staleness",
)
CLIENT_FIELDS = (
    "id", "group", "unseen", "n_train", "n_validation", "n_test", "accuracy", "validation_accuracy", "validation_loss",
    "macro_f1", "calibration_error", "auroc", "gate_mean", "gate_std", "gate_entropy", "language",
)
ACCURACY_FIELDS = ("personalized", "mixture", "global", "local", "zero_shot", "half", "oracle")
OUTCOME_FIELDS = (
    "fingerprint", "classes", "prompts", "learns_gate", "personal_stages", "global_test_accuracy", "unseen_after_training",
    "final_depth", "seconds", "notes", "privacy",
)
SUMMARY_FIELDS = (
    "method", "model", "fingerprint", "dataset", "classes", "prompts", "seed", "rounds", "personalized_accuracy",
    "global_test_accuracy", "zero_shot_accuracy", "macro_f1", "calibration_error", "auroc", "unseen_accuracy",
    "gate", "final_depth", "trainable_params", "trainable_percent", "bytes_up", "bytes_down", "flops", "seconds", "simulated_seconds",
    "peak_memory_bytes", "notes", "language", "privacy",
)
PROVENANCE_FIELDS = ("began", "version", "commit", "machine", "python", "torch", "command")
OPTIONAL = frozenset({"language", "privacy", "epsilon", "staleness"})
"""Fields that are written only where a task, a run with privacy or one with buffered rounds has them."""

CONFIG, ROUNDS, VISITS, CLIENTS, OUTCOME, SUMMARY, DATA = (
    "config.toml", "rounds.jsonl", "visits.jsonl", "clients.jsonl", "outcome.json", "summary.json", "data.json")
PROVENANCE = "provenance.jsonl"
SAMPLES = "samples.json"        # what a language model answers, from `fedms samples`
# Keys that reports read of a configuration, without asking whether it has them.
_REPORTED = (("run", "method"), ("run", "seed"), ("model", "id"), ("model", "head"), ("data", "name"),
             ("data", "partition"), ("data", "alpha"), ("lora", "rank"), ("clients", "count"))
# Fields that had another name in the records of earlier versions.
_RENAMED = {"personalised": "personalized", "personalised_accuracy": "personalized_accuracy"}

# What a line that is read back must be. A field that is missing was not known to an older version, and becomes null,
# but for those of OPTIONAL.
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Numbers = dict[str, _Number]
_Text = str | None
_Texts = list[str] | None
_REQUIRED = frozenset({"stage", "round", "client", "id"})


def _schema(name: str, fields: Iterable[str], **others: Any) -> TypeAdapter[Any]:
    """Return the schema of a record whose fields are numbers or null, but for `others`. Unknown fields may be there."""
    kinds: dict[str, Any] = {field: (others.get(field, _Number), ... if field in _REQUIRED else None) for field in fields}
    return TypeAdapter(create_model(name, __config__=ConfigDict(extra="ignore", strict=True), **kinds))


_SCHEMAS = {
    ROUNDS: _schema("Round", ROUND_FIELDS, stage=str, round=_Count, event=_Text),
    VISITS: _schema("Visit", VISIT_FIELDS, stage=str, round=_Count, client=_Count, status=_Text, reason=_Text),
    CLIENTS: _schema("Client", CLIENT_FIELDS, id=_Count, group=_Text, unseen=bool | None, accuracy=_Numbers,
                     language=_Numbers | None),
    PROVENANCE: _schema("Provenance", PROVENANCE_FIELDS, **dict.fromkeys(PROVENANCE_FIELDS, _Text)),
    OUTCOME: _schema(
        "Outcome", OUTCOME_FIELDS, fingerprint=str, classes=list[str], prompts=list[list[str]] | None, learns_gate=bool,
        personal_stages=list[str], final_depth=_Numbers, notes=list[str],
        privacy=dict[str, Any] | None),
    SUMMARY: _schema(
        "Summary", SUMMARY_FIELDS, method=_Text, model=_Text, fingerprint=_Text, dataset=_Text, classes=_Texts,
        prompts=list[list[str]] | None, rounds=_Numbers | None, personalized_accuracy=_Numbers | None,
        unseen_accuracy=_Numbers | None, gate=dict[str, _Number | bool] | None, final_depth=_Numbers | None,
        notes=_Texts, language=_Numbers | None, privacy=dict[str, Any] | None)}


@dataclass(frozen=True)
class RunRecords:
    """A run folder read back as plain data.

    Attributes:
        path: The folder.
        config: The configuration, with today's keys whatever version wrote it, and none that a later version added.
        rounds: Lines of `rounds.jsonl`.
        visits: Lines of `visits.jsonl`.
        clients: Lines of `clients.jsonl`.
        summary: The summary, or None for a run that has not ended.
        notes: A line for each damage that was repaired by leaving something out.
        outcome: What the summary says beyond the other records, or None for a run that was not evaluated yet or by an
            older version.
        provenance: Lines of `provenance.jsonl`: what made the run.
    """

    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    visits: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    summary: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    outcome: dict[str, Any] | None = None
    provenance: Sequence[dict[str, Any]] = ()

    @classmethod
    def read(cls, path: str | Path, whole: bool = True) -> RunRecords:
        """Read a run folder.

        A last line that was cut off by a kill is left out and noted.

        Args:
            path: The folder.
            whole: Whether to read visits and clients too; False for those who look often.

        Raises:
            RunFolderError: If it is no run folder, or damaged in another way; the message names file and line.
        """
        path = Path(path)
        config = _read_config(path)
        notes: list[str] = []
        files = (ROUNDS, VISITS, CLIENTS, PROVENANCE) if whole else (ROUNDS,)
        lines = {name: _read_lines(path / name, notes) for name in files}
        return cls(path, config, lines[ROUNDS], lines.get(VISITS, []), lines.get(CLIENTS, []), _read_one(path / SUMMARY),
                   tuple(notes), _read_one(path / OUTCOME), lines.get(PROVENANCE, []))

    @property
    def method(self) -> str:
        return self.config["run"]["method"]

    @property
    def seed(self) -> int:
        return self.config["run"]["seed"]


def find_runs(path: str | Path) -> list[Path]:
    """Return the run folders at `path`: itself, or those directly inside it, sorted by name.

    Raises:
        RunFolderError: If there are none.
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
    """Return everything recorded but the fields of :data:`EXEMPT`: it is equal for two runs of one configuration."""
    return _strip({"config": records.config, "rounds": records.rounds, "visits": records.visits,
                   "clients": records.clients, "outcome": records.outcome, "summary": records.summary})


def renamed(record: Any) -> Any:
    """Return a record with today's names of its fields, whatever version wrote it."""
    if isinstance(record, dict):
        return {_RENAMED.get(key, key): renamed(value) for key, value in record.items()}
    return [renamed(value) for value in record] if isinstance(record, list) else record


def _strip(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _strip(v) for k, v in value.items() if k not in EXEMPT}
    return [_strip(v) for v in value] if isinstance(value, list) else value


def _read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run folder as plain values."""
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
    return config


def _read_one(path: Path) -> dict[str, Any] | None:
    """Return the record of a file that holds a single one, or None if there is no file."""
    if not path.exists():
        return None
    try:
        return _record(path.name, read_regular(path))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the records of a file with one a line; none if there is no file."""
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
    """Return a record of the file `name` with every field of it; of those of :data:`OPTIONAL`, the ones that are there.

    Texts are made fit to be shown, but for the names of classes, which are compared.
    """
    value = renamed(parse_json(line))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    found = conform(_SCHEMAS[name], value)
    record = {field: value.get(field) for field in type(found).model_fields if field in value or field not in OPTIONAL}
    return {field: each if field in ("classes", "prompts") else all_printable(each) for field, each in record.items()}
