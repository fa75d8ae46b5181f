"""Draws the summary of each benchmark page, docs/evidence/img/NAME-summary.svg, from a table of that page: `python docs/evidence/summaries.py`."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Summary:
    """One picture: bars of a column of a page's first table whose header holds `header`.

    Attributes:
        page: Name of the page, without suffix.
        header: Words of the table's header line.
        columns: Numbers of the columns that are drawn, from 0, a series each; their titles become the legend.
        title: Title of the picture.
        labels: Columns whose cells, joined, name a row.
        ours: Beginning of the labels, or of the titles of series, that are this project's own.
    """

    page: str
    header: str
    columns: tuple[int, ...]
    title: str
    labels: tuple[int, ...] = (0,)
    ours: str = "ours"


SUMMARIES = (
    Summary("sparse_lora", "over PEFT, all blocks", (2,), "A training step of MiniLM: times as fast as PEFT on all blocks"),
    Summary("gpu", "Unsloth's operators", (2, 5, 6, 7), "An H200: time over the bare GEMM (less is better)", (0, 1),
            "fedms"),
    Summary("deployment", "Flower simulation", (1, 2, 3), "Seconds a round, by clients (less is better)", (0,), "embedded"),
)


def rows(summary: Summary) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Return the titles of a summary's series, and its rows: a label and a number for each series."""
    lines = (HERE / f"{summary.page}.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and summary.header in line)
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    header, _, *body = table
    found, above = [], ""
    for cells in body:
        above = cells[0] or above
        label = ", ".join([above, *(cells[i] for i in summary.labels[1:])])
        found.append((label, [float(number[0]) if (number := re.match(r"[\d.]+", cells[i])) else float("nan") for i in summary.columns]))
    return [header[i] for i in summary.columns], found


def draw(summary: Summary) -> Path:
    """Draw a summary, and return its file."""
    import matplotlib
    from matplotlib.figure import Figure

    titles, found = rows(summary)
    with matplotlib.rc_context({"svg.hashsalt": "fedms", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, 0.6 + len(found) * (0.12 + 0.2 * len(titles))), layout="constrained")
        axes = figure.subplots()
        shades = ["#2563eb", "#94a3b8", "#64748b", "#cbd5e1"]
        for place, title in enumerate(titles):
            heights = [row + (place - (len(titles) - 1) / 2) * 0.8 / len(titles) for row in range(len(found))]
            own = len(titles) > 1 and title.startswith(summary.ours)
            colors = [shades[0] if own or (len(titles) == 1 and label.startswith(summary.ours)) else shades[max(place, 1)] for label, _ in found]
            numbers = [values[place] for _, values in found]
            bars = axes.barh(heights, numbers, 0.72 / len(titles), color=colors, label=title)
            axes.bar_label(bars, [f"{number:g}" if number == number else "" for number in numbers], padding=3)
        axes.set_yticks(range(len(found)), [label for label, _ in found])
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.margins(x=0.1)
        axes.set_title(summary.title, loc="left", fontsize=10)
        if len(titles) > 1:
            axes.legend(frameon=False, loc="lower right")
        path = HERE / f"img/{summary.page}-summary.svg"
        figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    for each in SUMMARIES:
        print(draw(each))
