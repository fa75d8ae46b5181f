"""Experiment trackers: what a run records, sent to TensorBoard, Weights & Biases or MLflow while it goes on.

Only the records on disk are read, so a resumed run is tracked from its first round, and a run whose clients train in
other processes is tracked like any other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedms.errors import ConfigError, RunFolderError
from fedms.progress import Progress
from fedms.storage.records import SUMMARY, RunRecords, find_runs

EXTRA = "pip install 'fedms[track]'"


class Sink(Protocol):
    """One run at a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of one round. ``step`` counts the rounds of both stages from 1."""

    def end(self, values: Mapping[str, float]) -> None:
        """Log the numbers of the summary and end the run. They are empty if the run was stopped."""


class TensorBoard:
    """Writes event files to `RUN/tensorboard`, which `tensorboard --logdir OUT` shows."""

    def __init__(self, run: RunRecords) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))
        self._last = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a round."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._last = step

    def end(self, values: Mapping[str, float]) -> None:
        """Write the numbers of the summary, and close the file."""
        self.log(self._last, values)
        self._writer.close()


class WandB:
    """Sends a run to the Weights & Biases project `fedms`, or $WANDB_PROJECT; WANDB_MODE=offline keeps it here."""

    def __init__(self, run: RunRecords) -> None:
        import wandb

        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "fedms"), name=_name(run), config=run.config,
                               dir=str(run.path), reinit="create_new")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a round."""
        self._run.log(dict(values), step=step)

    def end(self, values: Mapping[str, float]) -> None:
        """Send the numbers of the summary, and end the run there."""
        self._run.summary.update(dict(values))
        self._run.finish()


class MLflow:
    """Sends a run to the MLflow experiment `fedms`, or $MLFLOW_EXPERIMENT_NAME, at $MLFLOW_TRACKING_URI."""

    def __init__(self, run: RunRecords) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedms")
        experiment = self._client.get_experiment_by_name(name)
        identity = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(identity, run_name=_name(run)).info.run_id
        for table, keys in run.config.items():
            for key, value in keys.items():
                self._client.log_param(self._run, f"{table}.{key}", value)
        self._last = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a round."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)
        self._last = step

    def end(self, values: Mapping[str, float]) -> None:
        """Send the numbers of the summary, and end the run there, as killed if it has none."""
        self.log(self._last, values)
        self._client.set_terminated(self._run, "FINISHED" if values else "KILLED")


TRACKERS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}  # by their package


class Tracking(Progress):
    """Sends the records of the runs in a folder to trackers, after every round and at the end.

    Args:
        out: A run folder, or a folder of run folders. Runs in it that have ended already are left alone.
        names: Names of trackers, see :data:`TRACKERS`.
        note: Told of a tracker that failed. The run goes on without it, as its records are on disk.

    Raises:
        ConfigError: If a name is unknown, or the tracker's package is not installed.
    """

    def __init__(self, out: str | Path, names: Iterable[str], note: Callable[[str], None]) -> None:
        self._out, self._note = Path(out), note
        self._kinds = [_tracker(name) for name in names]
        self._sinks: dict[Path, list[Sink]] = {}
        self._logged: dict[Path, int] = {}
        self._ended = {folder: _ended(folder) for folder in self._folders()}

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        """Send the rounds that were recorded since the last call."""
        self.update()

    def close(self) -> None:
        """Send what is left, and end the runs at the trackers."""
        self.update()
        for sinks in self._sinks.values():
            self._call(sinks, lambda sink: sink.end({}))
        self._sinks.clear()

    def update(self) -> None:
        """Send what the records hold and was not sent yet."""
        for folder in self._folders():
            if (end := _ended(folder)) is not None and end == self._ended.get(folder):
                continue
            run = RunRecords.read(folder, whole=False)
            if folder not in self._sinks:
                self._sinks[folder] = self._call(self._kinds, lambda kind: kind(run))
            logged = self._logged.get(folder, 0)
            for step, record in enumerate(run.rounds[logged:], logged + 1):
                values = {f"{record['stage']}/{name}": value for name, value in _numbers(record)}
                self._call(self._sinks[folder], lambda sink: sink.log(step, values))
            self._logged[folder] = len(run.rounds)
            if run.summary is not None:
                values = {f"summary/{name}": value for name, value in _numbers(run.summary)}
                self._call(self._sinks.pop(folder), lambda sink: sink.end(values))
                self._ended[folder] = end

    def _call(self, sinks: list[Any], action: Callable[[Any], Any]) -> list[Any]:
        """Return what an action gives for each sink. One that fails is reported and taken out of the list."""
        given = []
        for sink in list(sinks):
            try:
                given.append(action(sink))
            except Exception as error:  # a tracker may fail in any way: no network, no rights, another version
                name = getattr(sink, "__name__", type(sink).__name__)
                self._note(f"{name} stopped: {error}; the records in {self._out} are whole")
                sinks.remove(sink)
        return given

    def _folders(self) -> list[Path]:
        with contextlib.suppress(RunFolderError):
            return find_runs(self._out)
        return []


def _tracker(name: str) -> type[Sink]:
    if name not in TRACKERS:
        raise ConfigError(f"--track: got {name!r}; accepted: {', '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"--track: {name} is not installed: {EXTRA}")
    return TRACKERS[name]


def _ended(folder: Path) -> int | None:
    """Return when the summary was written, in ns; None for a run that has not ended."""
    try:
        return (folder / SUMMARY).stat().st_mtime_ns
    except OSError:
        return None


def _name(run: RunRecords) -> str:
    return f"{run.method}-seed{run.seed}"


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Yield the numbers in a record, with dotted names for nested ones."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, numbers.Real) and not isinstance(value, bool) and f"{prefix}{name}" != "round":
            yield f"{prefix}{name}", float(value)
