"""The comparison of methods as a table: for the terminal, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from fedms.errors import RunFolderError
from fedms.report.formats import duration, p_value, percent, size
from fedms.report.measures import measure_of
from fedms.report.numbers import Stat, below_local, by_method, comparison, field_of, focus_method, read_runs
from fedms.report.significance import differences
from fedms.storage.durable import write_durably


def write_comparison(path: str | Path) -> tuple[Path, Path]:
    """Write `compare.csv` (a line for each run) and `compare.md` (a line for each method) into a folder of runs.

    Returns:
        The paths of both.

    Raises:
        RunFolderError: If there is no run, or a file cannot be written.
    """
    path = Path(path)
    runs, _ = read_runs(path)
    text = io.StringIO()
    columns = ("method", "seed", "personalized_mean", "personalized_std", "personalized_worst10", "global_test",
               "unseen_as_it_arrives", "unseen_after_training", "zero_shot", "macro_f1", "calibration_error", "auroc", "below_local",
               "gate_mean", "gate_collapsed", "perplexity", "bits_per_byte", "choice_accuracy", "trainable_percent", "bytes_up",
               "bytes_down", "flops", "seconds", "peak_memory_bytes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for run in runs:
        s = run.summary
        writer.writerow([run.method, run.seed,
                         *(field_of(s, "personalized_accuracy", k) for k in ("mean", "std", "worst10")),
                         field_of(s, "global_test_accuracy"),
                         *(field_of(s, "unseen_accuracy", k) for k in ("as_it_arrives", "after_training")),
                         *(field_of(s, k) for k in ("zero_shot_accuracy", "macro_f1", "calibration_error", "auroc")),
                         below_local(run, runs), field_of(s, "gate", "mean"), field_of(s, "gate", "collapsed"),
                         *(field_of(s, "language", k) for k in ("perplexity", "bits_per_byte", "choice_accuracy")),
                         *(field_of(s, k) for k in columns[-6:])])
    write_text(path / "compare.csv", text.getvalue())
    header, rows = table(comparison(runs))
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    measure = measure_of(runs)
    if tests := differences(runs):
        lines += ["", f"{focus_method(by_method(runs))} against the others, paired by client and seed (Wilcoxon's signed-rank "
                  "test, corrected by Holm), and by seed, which is what counts, as clients of a seed share an expert:", "",
                  f"| against | {measure.column} | 95 % interval by seed | shown | clients better | worse | p | p corrected |",
                  "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
        lines += [f"| {t.against} | {measure.signed(t.gap)} | {measure.interval(t.interval)} | {t.interval.shows} | "
                  f"{t.better} of {t.pairs} | {t.worse} | {p_value(t.p)} | {p_value(t.corrected)} |" for t in tests]
    write_text(path / "compare.md", "\n".join(lines) + "\n")
    return path / "compare.csv", path / "compare.md"


@dataclass(frozen=True)
class _Column:
    """A column of the comparison.

    Attributes:
        title: Its title.
        short: Its title where room is scarce.
        key: Its key in a row of the comparison.
        show: Writes a value.
        keep: Rank by which columns are left out where room is scarce, the lowest first.
        higher: Whether higher is better; None where neither is.
    """

    title: str
    short: str
    key: str
    show: Callable[[Stat], str]
    keep: int
    higher: Optional[bool] = True


_COLUMNS = (
    _Column("perplexity", "perplexity", "perplexity", lambda s: f"{s.mean:.2f}", 9, False),
    _Column("bits a byte", "bits\na byte", "bits_per_byte", lambda s: f"{s.mean:.3f}", 5, False),
    _Column("own answer chosen %", "chosen\n%", "choices", lambda s: percent(s), 6),
    _Column("personalized %", "mean\nacc. %", "personalized", lambda s: percent(s), 8),
    _Column("worst 10 % of clients %", "worst 10 %\nacc. %", "worst10", lambda s: percent(s), 7),
    _Column("global test %", "global\ntest %", "global_test", lambda s: percent(s), 3),
    _Column("unseen clients %", "unseen\n%", "unseen", lambda s: percent(s), 1),
    _Column("macro F1 %", "macro\nF1 %", "macro_f1", lambda s: percent(s), 1),
    _Column("better off alone %", "alone\nbetter %", "below_local", lambda s: percent(s, 0), 6, False),
    _Column("trained %", "trained\n%", "trainable_percent", lambda s: f"{s.mean:.2f}", 2, None),
    _Column("sent up", "sent\nup", "bytes_up", lambda s: size(s.mean), 5, False),
    _Column("sent down", "sent\ndown", "bytes_down", lambda s: size(s.mean), 3, False),
    _Column("TFLOP", "TFLOP", "flops", lambda s: f"{s.mean / 1e12:.3g}", 1, False),
    _Column("time", "time", "seconds", lambda s: duration(s.mean), 4, None),
    _Column("AUROC %", "AUROC\n%", "auroc", lambda s: percent(s), 0),
    _Column("calibration error %", "calib.\nerror %", "calibration_error", lambda s: percent(s), 0, False),
)


def table(rows: Sequence[dict[str, Any]], width: Optional[int] = None) -> tuple[list[str], list[list[str]]]:
    """Return a comparison as text: header and cells, for the terminal, Markdown and the page alike.

    Args:
        rows: What :func:`fedms.report.numbers.comparison` returned.
        width: Number of characters that the table may take. Titles are then short and of two lines, and the least important
            columns are left out until it fits, with two blanks between columns. None for no limit.
    """
    columns = [c for c in _COLUMNS if any(row.get(c.key) for row in rows)]
    names = [row["method"] + (f" ({row['unfinished']} unfinished)" if row["unfinished"] else "") for row in rows]
    while True:
        header = ["method", *(c.title if width is None else c.short for c in columns)]
        cells = [[name, *(c.show(row[c.key]) if row.get(c.key) else "–" for c in columns)]
                 for name, row in zip(names, rows)]
        widths = [max(len(line) for text in column for line in text.split("\n")) for column in zip(header, *cells)]
        if width is None or not columns or sum(widths) + 2 * (len(widths) - 1) <= width:
            return header, cells
        columns.remove(min(columns, key=lambda c: c.keep))


@dataclass(frozen=True)
class Cell:
    """A cell of the comparison on the page.

    Attributes:
        text: What it shows.
        value: The number behind it, by which the column is sorted; None where it is unknown.
        best: Whether no other cell of the column is better, and some are worse.
    """

    text: str
    value: Optional[float]
    best: bool


def marked_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Return the header and the cells of :func:`table` with the best cell of each column marked.

    Cells that read alike are equally good. Columns that say how a run was made rather than how good it is mark none.
    """
    header, texts = table(rows)
    columns = [c for c in _COLUMNS if c.title in header]
    cells = [[Cell(line[0], None, False)] for line in texts]
    for place, column in enumerate(columns, start=1):
        values = [row[column.key].mean if row.get(column.key) else None for row in rows]
        known = sorted({v for v in values if v is not None}, reverse=bool(column.higher))
        shown = {line[place] for line, value in zip(texts, values) if value is not None}
        top = texts[values.index(known[0])][place] if column.higher is not None and len(shown) > 1 else None
        for line, text, value in zip(cells, texts, values):
            line.append(Cell(text[place], value, value is not None and _number(text[place]) == _number(top)))
    return header, cells


def _number(text: Optional[str]) -> Optional[str]:
    """Return what a cell shows without its spread over seeds."""
    return text and text.partition(" ±")[0]


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises RunFolderError if it cannot be written."""
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from error
