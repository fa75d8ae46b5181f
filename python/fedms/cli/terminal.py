"""What commands print: consoles, progress bars, tables and the results of runs."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedms.progress import Listeners, Progress, TerminalProgress

if TYPE_CHECKING:
    from fedms_ext.profiling import Served


def _console(stderr: bool = False) -> Console:
    """Return a console that neither wraps nor cuts lines when it writes to a pipe or a file."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = 10_000
    return made


console, errors = _console(), _console(stderr=True)


def show(text: str) -> None:
    """Print one line of a command's result on stdout, as it is."""
    console.print(text, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line about a command's work on stderr, as it is."""
    errors.print(text, markup=False, soft_wrap=True)


def plain_table(*titles: str, left: Iterable[str] = (), no_wrap: bool = False) -> Table:
    """Return an empty table without lines.

    Args:
        titles: Titles of the columns.
        left: Titles of the columns that are aligned to the left; the others are numbers.
        no_wrap: Cut rather than wrap a cell that is too wide.
    """
    table, left = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False), set(left)
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right", vertical="bottom", no_wrap=no_wrap)
    return table


def paragraph(mark: str, text: str, style: str = "") -> None:
    """Print a mark and a text. In a terminal the text is wrapped beside the mark."""
    line = Table.grid()
    line.add_column(style=style, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(mark), Text(text))
    console.print(line)


@contextlib.contextmanager
def run_progress(out: Path, track: Optional[list[str]] = None) -> Iterator[Progress]:
    """Show the progress of the runs in `out` in the terminal, and send it to trackers.

    Args:
        out: Folder of the run or the runs, which trackers read.
        track: Names of trackers, see :data:`fedms.report.trackers.TRACKERS`.

    Raises:
        ConfigError: If a tracker is unknown or not installed.
    """
    progress: Progress = TerminalProgress(errors)
    if track:
        from fedms.report.trackers import Tracking

        progress = Listeners(progress, Tracking(out, track, progress.note))
    try:
        yield progress
    finally:
        progress.close()


@contextlib.contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """Show a progress bar. Yields a function to call with (step, number of steps, loss)."""
    from rich.progress import BarColumn, Progress as Bar, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True),
             TextColumn("{task.fields[loss]}"), console=errors, transient=True) as bar:
        task = bar.add_task(title, total=None, loss="")
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=f"loss {loss:.3f}")


def show_results(folder: Path) -> None:
    """Print the outcome, the table and the findings of the runs in a folder, and write their report.

    Raises:
        RunFolderError: If the folder holds no run, or a file cannot be read or written.
    """
    from fedms import report as reports

    runs, notes = reports.read_runs(folder)
    comparison = reports.comparison(runs)
    header, rows = reports.table(comparison, width=console.width)
    table = plain_table(*header, left=header[:1], no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] in reports.OURS and len(rows) > 2 else None)
    console.print()
    console.print(reports.headline(runs), markup=False)
    console.print()
    console.print(table)
    if left_out := len(reports.table(comparison)[0]) - len(header):
        console.print(f"{left_out} more column{'s' if left_out > 1 else ''} in the report", style="dim")
    console.print()
    for finding in reports.findings(runs, notes):
        mark, style = {"good": ("+ ", "green"), "bad": ("! ", "red"), "plain": ("- ", "")}[finding["kind"]]
        paragraph(mark, finding["text"], style)
    console.print()
    if runs[0].path != folder:
        for path in reports.write_comparison(folder):
            show(f"table:  {path}")
    show(f"report: {reports.write_report(folder)}")


def show_served(counted: Served) -> None:
    """Print one line for each backend, and below it the products that it computed, the largest first."""
    table = plain_table("served by", "product (rows; K -> N, rank)", "calls", "GFLOP", "share",
                        left=("served by", "product (rows; K -> N, rank)"))
    total = sum(counted.flops.values())
    for name, (calls, flops) in counted.backends().items():
        table.add_row(name, "all", str(calls), f"{flops / 1e9:.3g}", f"{100 * flops / total:.1f} %", style="bold")
        for (server, product), part in counted.flops.most_common():
            if server == name:
                table.add_row("", str(product), str(counted.calls[server, product]), f"{part / 1e9:.3g}",
                              f"{100 * part / total:.1f} %")
    show("\none training step of the first client, with the prefix of its samples and the validation of one")
    console.print(table)
