"""Methods beside each other: gaps with their intervals, and accuracy against cost."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Optional

from fedms.report.figures.curves import Unit, decimal, sum_known
from fedms.report.figures.style import INK, MUTED, SURFACE, mark, method_color, name_rows, new_axes, percent_axis
from fedms.report.measures import measure_of
from fedms.report.numbers import OURS, Stat, by_method, field_of, focus_method
from fedms.report.significance import differences
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gaps_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw how far each other method is from the one in focus: the mean and its 95 % interval by seed."""
    if not (found := differences(runs)):
        return None
    rows = sorted(found, key=lambda each: each.gap)         # what is ahead of the method in focus comes first
    measure = measure_of(runs)
    figure, axes = new_axes(max(3.3, 0.95 + 0.27 * len(rows)))
    axes.axvline(0, color=MUTED, linewidth=1.2, zorder=1)
    for y, row in enumerate(rows):
        color, half = method_color(row.against), 0.0 if math.isinf(row.interval.half) else row.interval.half
        shown = half > 0 and abs(row.gap) > half
        mark([*axes.plot([measure.lead(row.gap + half), measure.lead(row.gap - half)], [y, y], color=color, linewidth=2.2,
                         solid_capstyle="round", zorder=2),
              *axes.plot([measure.lead(row.gap)], [y], marker="o", color=color, markerfacecolor=color if shown else SURFACE, markersize=6.5,
                         zorder=3)], [row.against])
    others = [row.against for row in rows]
    name_rows(axes, others, [method_color(method) for method in others], others)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    focus = focus_method(by_method([run for run in runs if run.summary]))
    axes.set_xlabel(measure.against.format(focus))
    return figure


def accuracy_by_bytes_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw what clients reach with each method over the bytes that all clients sent and received."""
    return _cost(runs, lambda run: sum_known(field_of(run.summary, "bytes_up"), field_of(run.summary, "bytes_down")),
                 "sent and received by all clients", decimal("B"))


def accuracy_by_flops_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw what clients reach with each method over the operations of all clients."""
    return _cost(runs, lambda run: field_of(run.summary, "flops"), "operations of all clients", decimal("FLOP"))


def _cost(runs: Sequence[RunRecords], cost: Callable[[RunRecords], Optional[float]], label: str, unit: Unit) -> Optional[Figure]:
    """Draw one dot for each method, and a line through those that no other beats in both outcome and cost.

    Returns:
        The figure, or None for fewer than two methods, or where all cost the same.
    """
    measure, points = measure_of(runs), []
    for method, group in by_method([run for run in runs if run.summary]).items():
        reached, spent = Stat.of(map(measure.of, group)), Stat.of(map(cost, group))
        if spent and reached:
            points.append((spent.mean, reached.mean, method))
    if len({x for x, _, _ in points}) < 2:
        return None
    longest = max(x for x, _, _ in points)
    name, scale = unit(longest)
    figure, axes = new_axes(3.3)
    best = [p for p in points if not any(q[0] <= p[0] and q[1] > p[1] or q[0] < p[0] and q[1] == p[1] for q in points)]
    best.sort()
    best, points = ([(x, measure.shown(y), method) for x, y, method in each] for each in (best, points))
    axes.plot([x / scale for x, _, _ in best], [y for _, y, _ in best], color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)), zorder=1)
    lowest, highest = min(y for _, y, _ in points), max(y for _, y, _ in points)
    room = max(0.05 * (highest - lowest), 0.003)
    axes.set_ylim(lowest - 2 * room, highest + 3 * room)
    axes.set_xlim(-0.04 * longest / scale, 1.3 * longest / scale)
    taken: list[tuple[float, float]] = []       # where names stand, in shares of the axes
    for x, y, method in sorted(points, key=lambda p: p[1]):
        color = method_color(method)
        across, up = x / (1.34 * longest), (y - lowest + 2 * room) / (highest - lowest + 5 * room)
        while any(abs(across - a) < 0.26 and abs(up - u) < 0.055 for a, u in taken):
            up += 0.01
        taken.append((across, up))
        mark([*axes.plot([x / scale], [y], marker="o", color=color, markersize=7, markeredgecolor=SURFACE, zorder=3),
              axes.annotate(method, (x / scale, up), (7, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                            va="center", color=color if method not in OURS else INK, fontsize=8.5,
                            fontweight="bold" if method in OURS else "normal")], [method])
    if measure.percent:
        percent_axis(axes.yaxis)
    axes.set_ylabel(measure.title)
    axes.set_xlabel(f"{label} ({name})")
    return figure
