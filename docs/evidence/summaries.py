"""Draw the summary of each benchmark page, docs/evidence/img/NAME-summary.svg, from a table of that page:
`python docs/evidence/summaries.py`.
"""
from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
SHADES = ["#2563eb", "#94a3b8", "#64748b", "#cbd5e1"]       # the first one is for what is this project's own


@dataclass(frozen=True)
class Summary(ABC):
    """A picture of columns of a table.

    Attributes:
        page: Name of the page, without suffix.
        header: Words of the table's header line, by which its first line is found.
        columns: Numbers of the columns that are drawn, from 0.
        title: Title of the picture.
    """

    page: str
    header: str
    columns: tuple[int, ...]
    title: str

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header of the table and its rows, as text."""
        lines = (HERE / f"{self.page}.md").read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("|") and self.header in line)
        end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
        header, _, *body = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines[start:end]]
        return header, body

    @abstractmethod
    def written(self) -> list[str]:
        """Return the labels and numbers that the picture must hold as text."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return the picture."""

    def save(self) -> Path:
        """Write the picture, and return its file."""
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "fedms", "svg.fonttype": "none", "font.size": 9}):
            path = HERE / f"img/{self.page}-summary.svg"
            self.figure().savefig(path, metadata={"Date": None})
        return path


@dataclass(frozen=True)
class Bars(Summary):
    """Bars, a series for each column. The first number of a cell is drawn, and written beside its bar.

    Attributes:
        labels: Columns whose cells, joined, name a row.
        ours: Beginning of the labels, or of the titles of series, that are this project's own.
        names: Titles of the series, if the table's own are clear beside other columns alone.
    """

    labels: tuple[int, ...] = (0,)
    ours: str = "ours"
    names: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, list[float]]]:
        """Return the label of each row and its numbers, NaN where there is none."""
        rows, above = [], ""
        for cells in self.table()[1]:
            above = cells[0] or above
            label = ", ".join([above, *(cells[i] for i in self.labels[1:])])
            rows.append((label, [float(number[0]) if (number := re.match(r"[\d.]+", cells[i])) else math.nan for i in self.columns]))
        return rows

    def written(self) -> list[str]:
        return [text for label, numbers in self.rows() for text in (label, *(f"{number:g}" for number in numbers if number == number))]

    def figure(self) -> Figure:
        """Return the bars."""
        from matplotlib.figure import Figure

        header, rows = self.table()[0], self.rows()
        titles, labels = self.names or [header[i] for i in self.columns], [label for label, _ in rows]
        figure = Figure(figsize=(7.2, 0.6 + len(rows) * (0.12 + 0.2 * len(titles))), layout="constrained")
        axes = figure.subplots()
        for place, title in enumerate(titles):
            heights = [row + (place - (len(titles) - 1) / 2) * 0.8 / len(titles) for row in range(len(rows))]
            own = len(titles) > 1 and title.startswith(self.ours)
            colors = [SHADES[0] if own or (len(titles) == 1 and label.startswith(self.ours)) else SHADES[max(place, 1)] for label in labels]
            numbers = [numbers[place] for _, numbers in rows]
            bars = axes.barh(heights, numbers, 0.72 / len(titles), color=colors, label=title)
            axes.bar_label(bars, [f"{number:g}" if number == number else "" for number in numbers], padding=3)
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.margins(x=0.1)
        axes.set_title(self.title, loc="left", fontsize=10)
        if len(titles) > 1:
            axes.legend(frameon=False, loc="lower right")
        return figure


@dataclass(frozen=True)
class Gaps(Summary):
    """Differences with their intervals, "~+0.05 ± 0.10", a panel for each column. Those without ~, which are shown, are in color and
    written above their points.

    Attributes:
        most: Rows with a difference beyond this are left out.
    """

    most: float = 3.0

    def rows(self) -> list[tuple[str, list[tuple[bool, float, float]]]]:
        """Return the label of each row and for each column whether a difference is shown, the difference, and half its interval."""
        rows = []
        for label, *cells in self.table()[1]:
            found = [re.fullmatch(r"(~?)([+-][\d.]+) ± ([\d.]+)", cells[i - 1]) for i in self.columns]
            if all(found) and all(abs(float(each[2])) <= self.most for each in found):
                rows.append((label, [(not each[1], float(each[2]), float(each[3])) for each in found]))
        return rows

    def written(self) -> list[str]:
        return [text for label, gaps in self.rows() for text in (label, *(f"{gap:+.2f}" for shown, gap, _ in gaps if shown))]

    def figure(self) -> Figure:
        """Return the panels."""
        from matplotlib.figure import Figure

        header, rows = self.table()[0], self.rows()
        figure = Figure(figsize=(9.2, 1.0 + 0.24 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(self.columns), sharey=True, sharex=True)
        for place, (axes, column) in enumerate(zip(panels, self.columns)):
            for row, (_, gaps) in enumerate(rows):
                shown, gap, half = gaps[place]
                axes.errorbar(gap, row, xerr=half, fmt="o", markersize=3, color=SHADES[0 if shown else 1])
                if shown:
                    axes.annotate(f"{gap:+.2f}", (gap, row), (0, 3), textcoords="offset points", ha="center", fontsize=6)
            axes.axvline(0, color=SHADES[2], linewidth=0.8)
            axes.set_title(header[column].replace(", ", "\n"), fontsize=9)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(left=False)
        panels[0].set_yticks(range(len(rows)), [label for label, _ in rows])
        panels[0].invert_yaxis()
        figure.supxlabel(self.title, fontsize=10)
        return figure


SUMMARIES = (
    Bars("sparse_lora", "over PEFT, all blocks", (2,), "A training step of MiniLM: times as fast as PEFT on all blocks"),
    Bars("gpu", "Unsloth's operators", (2, 5, 6, 7), "An H200: time over the bare GEMM (less is better)", (0, 1), "fedms"),
    Bars("deployment", "Flower simulation", (1, 2, 3), "Seconds a round, by clients (less is better)", (0,), "embedded"),
    Bars("cpu", "over PEFT, int8", (4, 7), "int8 with LoRA, one thread: times as fast as PEFT in fp32",
         (0, 1), "forward and", ("forward", "forward and backward")),
    Bars("cuda", "without ranks", (1, 2), "An H200: time over cuBLAS without ranks (less is better)", (0,),
         "with ranks"),
    Gaps("mixture", "by domain, 12 clients", (1, 2, 3, 4), "points over the reference; blue: a difference is shown"),
)

if __name__ == "__main__":
    for each in SUMMARIES:
        print(each.save())
