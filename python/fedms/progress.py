"""Progress of a run: the calls a run makes, and the terminal display that answers them."""

from __future__ import annotations

from typing import Any


class Progress:
    """Listener that does nothing; the base of every display.

    Metrics are plain numbers by name (``loss``, ``validation_accuracy``, ``depth``, ...) and may be None.
    """

    def start(self, total_visits: int, title: str) -> None:
        """A run begins that visits clients ``total_visits`` times."""

    def visit(self, stage: str, round: int, client: int, **metrics: Any) -> None:
        """A client was visited; rounds count from 1 within a stage."""

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        """A round ended."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def phase(self, text: str) -> None:
        """What is being done now, e.g. ``"loading MiniLM"``."""

    def close(self) -> None:
        """The run ended, well or badly."""


class TerminalProgress(Progress):
    """A progress bar over client visits, with one line for each round above it.

    ``console`` is a ``rich.console.Console``; where it is no terminal only the lines are written.
    """

    def __init__(self, console: Any):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn

        self._console = console
        self._bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[state]}"),
            console=console, transient=True,
        )
        self._task: Any = None
        self._title = ""

    def start(self, total_visits: int, title: str) -> None:
        self._title = title
        if self._task is None:
            self._task = self._bar.add_task(title, total=total_visits, state="")
        else:
            self._bar.reset(self._task, total=total_visits, description=title, state="")
        self._bar.start()

    def visit(self, stage: str, round: int, client: int, **metrics: Any) -> None:
        if self._task is not None:
            state = f"{_stage(stage)} round {round} client {client}{_metrics(metrics)}"
            self._bar.update(self._task, advance=1, state=state)

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        line = f"{self._title:<16.16} {_stage(stage)} round {round:>2}{_metrics(metrics)}"
        event = metrics.get("event")
        self._print(f"{line}  {event}" if event else line)

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def phase(self, text: str) -> None:
        if self._task is not None and self._console.is_terminal:
            self._bar.update(self._task, state=text)
        else:
            self._print(f"{text} ...")

    def close(self) -> None:
        self._bar.stop()
        self._task = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _stage(stage: str) -> str:
    return stage.replace("stage", "stage ")


def _metrics(metrics: dict[str, Any]) -> str:
    words = {"depth": "depth {:d}", "loss": "loss {:.3f}", "validation_accuracy": "validation {:.1%}",
             "gate_mean": "gate {:.2f}"}
    return "".join("  " + text.format(metrics[name]) for name, text in words.items() if metrics.get(name) is not None)
