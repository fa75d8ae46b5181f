"""The critical-difference diagram (Demsar, JMLR 7, 2006)."""
from __future__ import annotations

from typing import TYPE_CHECKING

from fedms.report.figures.style import INK, MUTED, method_color
from fedms.report.intervals import Ranks
from fedms.report.numbers import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW, TOP = 0.24, 1.0        # inches a name, and above the first one


def cliques(ranks: Ranks) -> list[tuple[float, float]]:
    """Return the first and last average rank of each largest group whose members are not shown to differ from each other."""
    values = list(ranks.mean.values())
    found: list[tuple[float, float]] = []
    for first in values:
        last = max(value for value in values if value - first <= ranks.critical)
        if last > first and not (found and found[-1][1] >= last):
            found.append((first, last))
    return found


def ranks_figure(ranks: Ranks) -> Figure:
    """Draw the average ranks on an axis, 1 being best, each with its method's name, and a bar over each group of methods whose
    ranks are closer than the critical difference."""
    from matplotlib.figure import Figure

    names, groups = list(ranks.mean), cliques(ranks)
    rows = (len(names) + 1) // 2
    height = TOP + ROW * rows + 0.1 * len(groups)
    figure = Figure(figsize=(7.2, height))
    axes = figure.add_axes((0.2, 0, 0.6, 1))
    axes.set_axis_off()
    axes.set_xlim(1, len(names))
    axes.set_ylim(height, 0)
    axis = 0.62
    axes.plot([1, len(names)], [axis, axis], color=INK, linewidth=1.2)
    for tick in range(1, len(names) + 1):
        axes.plot([tick, tick], [axis - 0.06, axis], color=INK, linewidth=1)
        axes.text(tick, axis - 0.1, str(tick), ha="center", va="bottom", fontsize=9, color=INK)
    axes.plot([1, 1 + ranks.critical], [0.2, 0.2], color=MUTED, linewidth=2)
    axes.text(1 + ranks.critical / 2, 0.16, f"critical difference {ranks.critical:.2f}", ha="center", va="bottom", fontsize=8.5,
              color=MUTED)
    for number, (first, last) in enumerate(groups):
        y = axis + 0.1 * (number + 1)
        axes.plot([first - 0.03, last + 0.03], [y, y], color=INK, linewidth=3, solid_capstyle="round")
    for place, name in enumerate(names):
        left = place < rows
        row = place if left else len(names) - 1 - place
        y, edge = TOP + 0.1 * len(groups) + ROW * row - 0.1, 1 if left else len(names)
        rank, color = ranks.mean[name], method_color(name)
        axes.plot([rank, rank, edge], [axis, y, y], color=color, linewidth=1)
        axes.text(edge + (-0.08 if left else 0.08), y, f"{name}  {rank:.1f}" if left else f"{rank:.1f}  {name}",
                  ha="right" if left else "left", va="center", fontsize=9, color=color,
                  fontweight="bold" if name in OURS else "normal", clip_on=False)
    return figure
