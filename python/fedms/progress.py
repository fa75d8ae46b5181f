"""Progress of a run: the calls a run makes, and the terminal display that answers them."""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Mapping
from typing import Any

LARGEST_NATS = 700.0        # whose perplexity is a number of Python

_ASCII = str.maketrans({"–": "-", "—": "-", "−": "-", "±": "+/-", "…": "...", "≥": ">=", "≤": "<=", "×": "x", "•": "*",
                        "█": "#", **dict.fromkeys("▁▂▃▄▅▆▇", "|"), **dict.fromkeys("─━│┃┌┐└┘╭╮╰╯├┤┬┴┼╸╺", "-")})


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start:error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("fedms.nearest", _nearest)


def accept_any_text() -> None:
    """Make stdout and stderr accept every text from now on.

    What their encoding does not have is written as the nearest ASCII, or escaped, so that no run ends because of a sign in its
    results or in the name of a file.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fedms.nearest")


class Progress:
    """The events of a run. This listener ignores them all; others derive from it.

    Metrics are plain numbers by name (`loss`, `validation_accuracy` or `perplexity`, `depth`, ...) and may be None.
    """

    def start(self, total_visits: int, title: str) -> None:
        """Called when a run begins. Clients will be visited `total_visits` times."""

    def visit(self, stage: str, round: int, client: int | None, **metrics: Any) -> None:
        """Called after a visit. The client is None if it is secret; rounds count from 1 in each stage."""

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        """Called after a round."""

    def note(self, text: str) -> None:
        """Called with a note for the user."""

    def done(self, text: str) -> None:
        """Called when one of several parallel runs has ended."""

    def phase(self, text: str) -> None:
        """Called when another phase begins, such as "loading MiniLM"."""

    def close(self) -> None:
        """Called at the end of a run, whether it succeeded or failed."""


class Listeners(Progress):
    """Passes every event on to several listeners."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def start(self, total_visits: int, title: str) -> None:
        for each in self._listeners:
            each.start(total_visits, title)

    def visit(self, stage: str, round: int, client: int | None, **metrics: Any) -> None:
        for each in self._listeners:
            each.visit(stage, round, client, **metrics)

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        for each in self._listeners:
            each.round(stage, round, **metrics)

    def note(self, text: str) -> None:
        for each in self._listeners:
            each.note(text)

    def done(self, text: str) -> None:
        for each in self._listeners:
            each.done(text)

    def phase(self, text: str) -> None:
        for each in self._listeners:
            each.phase(text)

    def close(self) -> None:
        for each in self._listeners:
            each.close()


class TerminalProgress(Progress):
    """Shows a heading for each run, a line for each round, and below them a bar over the client visits still to come.

    Lines fit 80 columns but for events.

    Args:
        console: A `rich.console.Console`. Where it is no terminal, only the lines are written.
    """

    def __init__(self, console: Any):
        from rich.progress import BarColumn, Progress as Bar, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._console = console
        bar_width = max(6, min(40, console.width - 70))
        self._bar = Bar(
            BarColumn(bar_width=bar_width), TaskProgressColumn(), TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[state]}", markup=False), console=console, transient=True,
        )
        self._task: Any = None
        self._notes: set[str] = set()

    def start(self, total_visits: int, title: str) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=total_visits, state="")
        else:
            self._bar.reset(self._task, total=total_visits, state="")
        self._print(title)
        if self._console.is_terminal:
            self._bar.start()

    def visit(self, stage: str, round: int, client: int | None, **metrics: Any) -> None:
        if self._task is not None:
            metrics.pop("gate_mean", None)
            self._bar.update(self._task, advance=1, state=f"{_stage(stage)} round {round}{_metrics(metrics)}")

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        line = f"  {_stage(stage)} round {round:>2}{_metrics(metrics)}"
        event = metrics.get("event")
        self._print(f"{line}  {event}" if event else line)

    def note(self, text: str) -> None:
        if text not in self._notes:  # runs of a comparison share their data, and so most of their notes
            self._notes.add(text)
            self._print(f"note: {text}")

    def done(self, text: str) -> None:
        self._print(f"  {text}")

    def phase(self, text: str) -> None:
        if self._task is not None and self._console.is_terminal:
            self._bar.update(self._task, state=text)
        else:
            self._print(f"{text} ...")

    def close(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def perplexity(nats: float) -> float:
    """Return the perplexity that a mean loss in nats a token stands for; at most exp(700), which is still a number."""
    return math.exp(min(nats, LARGEST_NATS))


def validation_perplexity(record: Mapping[str, Any]) -> float | None:
    """Return a language model's perplexity on validation samples; None where it is unknown.

    Args:
        record: Of a visit or a round. Its `validation_loss` is the mean loss in nats a token. Older runs and runs with privacy
            have none: there it is 1 / `validation_accuracy`, the mean of exp(-loss) over clients, and so the least that the
            perplexity can be.
    """
    if (nats := record.get("validation_loss")) is not None:
        return perplexity(nats)
    share = record.get("validation_accuracy")
    return 1 / share if share else None


def validation_words(task: str | None, record: Mapping[str, Any]) -> str:
    """Return the result on validation samples in words: a language model's perplexity, the accuracy of other models.

    Args:
        task: The kind of the run's task; None where old records do not name it, which are of classification.
        record: Of a visit or a round, with `validation_accuracy` and `validation_loss`.
    """
    if task == "causal_lm":
        return "unknown" if (found := validation_perplexity(record)) is None else f"perplexity {found:.1f}"
    return "unknown" if (share := record["validation_accuracy"]) is None else f"{share:.1%}"


def _stage(stage: str) -> str:
    return stage.replace("stage", "stage ")


def _metrics(metrics: dict[str, Any]) -> str:
    words = {"depth": "depth {:d}", "loss": "loss {:.3f}", "validation_accuracy": "validation {:>6.1%}",
             "perplexity": "perplexity {:>6.1f}", "gate_mean": "gate {:.2f}", "epsilon": "epsilon {:.3g}"}
    return "".join("  " + text.format(metrics[name]) for name, text in words.items() if metrics.get(name) is not None)
