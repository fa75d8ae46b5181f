"""What all pictures have in common: colors, axes, names at the ends of lines, and SVG."""
from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedms.config import registry
from fedms.report.numbers import OURS, first_stage_rounds
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#1c2430", "#667084", "#e4e7ec", "#ffffff"
_OTHER_METHODS = ("#be185d", "#4d7c0f", "#0369a1", "#a16207")
GROUP_COLORS = ("#0e7490", "#b45309", "#6d28d9", "#15803d", "#be123c", "#475569", "#86198f", "#1e6091")
GAIN, LOSS = "#157a3c", "#b42318"
WIDTH = 5.05            # of a chart, in inches: texts of 9 points can be read on a phone and in half of a page's width


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        methods: The methods that it stands for.
        color: Its color.
        xs: Positions on the axis.
        ys: Values of all seeds at each position.
    """

    methods: tuple[str, ...]
    color: str
    xs: Sequence[float]
    ys: list[list[float]]

    @property
    def label(self) -> str:
        """Names of its methods, one a line. Of more than three, two are named, and first the one that reports speak of first."""
        names = sorted(self.methods, key=lambda name: name not in OURS)
        return ",\n".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"])

    @property
    def means(self) -> list[float]:
        """The mean over seeds at each x."""
        return [statistics.fmean(y) for y in self.ys]


def method_color(method: str) -> str:
    """Return the color of a method, the same in every picture and page."""
    row = registry.methods().get(method)
    return row.color if row is not None and row.color else _OTHER_METHODS[sum(method.encode()) % len(_OTHER_METHODS)]


def group_color(groups: Sequence[str], group: Any) -> str:
    """Return the color of a client's group; gray for a client of no group."""
    name = str(group or "")
    return GROUP_COLORS[groups.index(name) % len(GROUP_COLORS)] if name in groups else MUTED


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """Use matplotlib's own defaults, whatever the user's settings; and let a dollar sign in a name start no formula."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        yield


def as_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG file with selectable text. Equal figures of the same name give equal files."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def mark(artists: Iterable[Any], of: Iterable[object], kind: str = "of") -> None:
    """Note which methods or clients some artists stand for, so that the page can show one of them alone.

    Args:
        artists: Parts of a figure.
        of: Names of methods, or numbers of clients.
        kind: "of" for methods, "client" for clients.
    """
    for artist in artists:
        artist.set_gid(" ".join(f"{kind}-{each}" for each in of))


def client_label(group: str, number: int, samples: Any = None) -> str:
    """Return how a chart names a client: by its group and number, and its number of samples if it is given."""
    return f"{group or 'client'} {number}" + (f" ({samples:g})" if samples is not None else "")


def name_rows(axes: Any, names: Sequence[str], colors: Sequence[str], of: Sequence[object], kind: str = "of",
              bold: Collection[object] = ()) -> None:
    """Write the name of each row of a chart in its color, and mark it; rows get no grid lines.

    Args:
        axes: The axes, whose row i is at y = i.
        names: The names.
        colors: Their colors.
        of: The method or client of each row.
        kind: As in :func:`mark`.
        bold: Those of `of` whose names are bold.
    """
    axes.set_yticks(range(len(names)), names)
    for label, color, each in zip(axes.get_yticklabels(), colors, of):
        label.set_color(color)
        label.set_fontweight("bold" if each in bold else "normal")
        mark([label], [each], kind)
    axes.grid(axis="y", visible=False)


def new_axes(height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, transparent, `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    return figure, axes


def height_of(curves: Sequence[Curve], least: float) -> float:
    """Return the inches in which the names at the ends of the curves have room, and at least `least`."""
    return max(least, 0.95 + 0.165 * sum(1 + curve.label.count("\n") for curve in curves))


def percent_axis(axis: Any) -> None:
    """Label an axis of shares between 0 and 1 in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}" if -1e-9 <= v <= 1 + 1e-9 else ""))


def round_axis(axes: Any, runs: Sequence[RunRecords]) -> None:
    """Count rounds within their stage on the x axis, and draw a line between the stages."""
    first = first_stage_rounds(runs)
    second = max((r["round"] for run in runs for r in run.rounds if r["stage"] == "stage2"), default=0)
    stride = max(1, math.ceil((first + second) / 16))
    ticks = [(x, x) for x in range(1, first + 1, stride)] + [(first + x, x) for x in range(1, second + 1, stride)]
    axes.set_xticks([x for x, _ in ticks], [str(name) for _, name in ticks])
    axes.set_xlim(0.6, first + second + 0.4)
    axes.set_xlabel("round")
    axes.grid(axis="x", visible=False)
    for start, rounds, name in ((0, first, "stage 1"), (first, second, "stage 2")):
        if rounds:
            axes.text(start + (rounds + 1) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center",
                      va="bottom", color=MUTED, fontsize=8.5)
    if first and second:
        axes.axvline(first + 0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))


def end_labels(axes: Any, curves: Sequence[Curve]) -> None:
    """Write names at the ends of curves: at the right margin, moved apart where they would overlap.

    A curve that ends well before the others has its name at its own end, so that no leader crosses the chart.
    """
    left, right = axes.get_xlim()
    early = [c for c in curves if c.xs[-1] < left + 0.8 * (right - left)]
    for curve in early:
        mark([axes.annotate(curve.label, (curve.xs[-1], curve.means[-1]), (5, 5), textcoords="offset points",
                            **_style(curve))], curve.methods)
    order = sorted((c for c in curves if c not in early), key=lambda c: c.means[-1])
    if not order:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    line = 11.5 * (high - low) / (axes.figure.get_figheight() * 72 * 0.75)
    labels = [curve.label for curve in order]
    heights = [line * (1 + label.count("\n")) for label in labels]
    places: list[float] = []
    for number, curve in enumerate(order):
        lowest = places[-1] + (heights[number - 1] + heights[number]) / 2 if places else low
        places.append(max(curve.means[-1], lowest))
    # Pushing upwards alone would leave the axes: shift all labels down by half of what they were moved on average.
    shift = statistics.fmean(p - c.means[-1] for p, c in zip(places, order))
    for place, curve, label in zip(places, order, labels):
        parts = [axes.annotate(label, (right, place - shift), (4, 0), textcoords="offset points", va="center",
                               annotation_clip=False, **_style(curve))]
        if abs(place - shift - curve.means[-1]) > line:
            parts += axes.plot([curve.xs[-1], right], [curve.means[-1], place - shift], linewidth=0.8, color=curve.color,
                               linestyle=(0, (1, 2)), clip_on=False)
        mark(parts, curve.methods)


def _style(curve: Curve) -> dict[str, Any]:
    return {"color": curve.color, "fontsize": 9, "fontweight": "bold" if has_ours(curve) else "normal"}


def has_ours(curve: Curve) -> bool:
    """Return whether a curve stands for a method of ours, alone or among methods that share it."""
    return any(name in OURS for name in curve.methods)
