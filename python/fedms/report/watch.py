"""A live view of runs, made from their records: it works beside any engine, and from another terminal or machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedms.foreign import printable
from fedms.progress import validation_perplexity, validation_words
from fedms.report.numbers import field_of
from fedms.storage.durable import owner
from fedms.storage.records import RunRecords, find_runs

BARS = "▁▂▃▄▅▆▇█"
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class RunState:
    """Where one run stands.

    Attributes:
        records: Its records, without visits and clients.
        state: "ended", "running", or "stopped" if no process works on it.
    """

    records: RunRecords
    state: str

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read where the run in a folder stands. RunFolderError if it is no run folder, or damaged."""
        running = owner(folder) is not None  # asked first: a run that ends now has its summary when that is read
        records = RunRecords.read(folder, whole=False)
        return cls(records, "ended" if records.summary else "running" if running else "stopped")

    @property
    def rounds(self) -> int:
        """Number of rounds of both stages that the run is to have."""
        return sum(self.records.config[stage]["rounds"] for stage in STAGES)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last round, at the mean pace of this stage so far; None if that is unknown."""
        done = self.records.rounds
        if self.state != "running" or not done:
            return None
        pace = [r["seconds"] for r in done if r["stage"] == done[-1]["stage"] and r["seconds"] is not None]
        return (self.rounds - len(done)) * sum(pace) / len(pace) if pace else None


def read_states(path: str | Path) -> list[RunState]:
    """Return the states of the runs in a folder. RunFolderError if there is none."""
    return [RunState.read(folder) for folder in find_runs(path)]


def over(states: Sequence[RunState]) -> bool:
    """Tell whether no run is running any more."""
    return all(state.state != "running" for state in states)


def view(states: Sequence[RunState]) -> RenderableType:
    """Return a table with a line for each run, and below it what happened last in each."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("run", "", "stage", "round", "depth", "loss", "validation", "", "gate", "up", "left"):
        table.add_column(title, justify="left" if title in ("run", "", "stage") else "right", no_wrap=True)
    events = []
    for state in states:
        last: dict[str, Any] = state.records.rounds[-1] if state.records.rounds else {}
        task = field_of(state.records.config, "task", "kind")
        validation = [validation_perplexity(r) if task == "causal_lm" else r["validation_accuracy"] for r in state.records.rounds]
        style = {"ended": "green", "running": "bold", "stopped": "yellow"}[state.state]
        table.add_row(
            Text(printable(state.records.path.name)), Text(state.state, style),
            Text(printable(last.get("stage", "").replace("stage", ""), 20)),
            f"{len(state.records.rounds)}/{state.rounds}", _number(last.get("depth"), "d"),
            _number(last.get("loss"), ".3f"), "" if validation[-1:] in ([], [None]) else validation_words(task, last),
            sparkline(validation), _number(last.get("gate_mean"), ".2f"),
            _bytes(sum(r["bytes_up"] or 0 for r in state.records.rounds)), _time(state.seconds_left),
        )  # fmt: skip
        happened = [f"round {number}: {r['event']}" for number, r in enumerate(state.records.rounds, 1) if r["event"]]
        events += [Text(printable(f"{state.records.path.name}, {line}"), "dim") for line in happened[-1:]]
    return Group(table, *events)


def sparkline(values: Sequence[float | None], width: int = 16) -> str:
    """Return the last values as bars between their least and their greatest."""
    known = [value for value in values if value is not None][-width:]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] if span else BARS[3] for value in known)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count else ""


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
