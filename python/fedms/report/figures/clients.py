"""Accuracies and gains by client."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from fedms.report.figures.style import HALF, INK, MUTED, SURFACE, WIDE, group_color, method_color, new_axes, percent_axis
from fedms.report.numbers import by_method, client_values, field_of, focus_method, local_only, participants, worst_tenth
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def clients_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the personalized test accuracy of every client: one row for each method, with mean and worst 10 %."""
    rows = []
    if zero := [v for r in {r.seed: r for r in runs}.values() if (v := client_values(r, "zero_shot"))]:
        rows.append(("zero-shot", MUTED, zero))
    for method, group in by_method(runs).items():
        if values := [v for r in group if (v := client_values(r, "personalized"))]:
            rows.append((method, method_color(method), values))
    if not rows:
        return None
    figure, axes = new_axes(WIDE, 0.75 + 0.4 * len(rows))
    for y, (method, color, values) in enumerate(rows):
        # Over seeds as in the table: of each seed first, then their mean.
        mean, worst = statistics.fmean(map(statistics.fmean, values)), statistics.fmean(map(worst_tenth, values))
        dots = [v for seed in values for v in seed]
        axes.scatter(dots, [y] * len(dots), s=42, color=color, alpha=0.32, linewidths=0, zorder=2)
        axes.plot([mean, mean], [y - 0.32, y + 0.32], color=color, linewidth=3, solid_capstyle="butt", zorder=3)
        axes.plot([worst], [y], marker="|", color=color, markersize=12, markeredgewidth=1.4, zorder=3)
        axes.annotate(f"{100 * mean:.1f}", (mean, y - 0.32), (0, 1.5), textcoords="offset points", ha="center",
                      va="bottom", color=color, fontsize=9, fontweight="bold")
    axes.set_yticks(range(len(rows)), [r[0] for r in rows])
    for label, row in zip(axes.get_yticklabels(), rows):
        label.set_color(row[1])
        label.set_fontweight("bold" if row[0] == "fedms" else "normal")
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.grid(axis="y", visible=False)
    percent_axis(axes.xaxis)
    axes.set_xlabel("test accuracy of a client (%)")
    return figure


def gain_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the accuracy of the method in focus against training alone, one dot for each client and seed.

    Above the diagonal the federation helps. Training alone is the `local` run of the same seed where there is one, else the
    run's own local expert.
    """
    focus = by_method(runs)[focus_method(by_method(runs))]
    points, compared = [], any(local_only(r, runs) for r in focus)
    for run in focus:
        alone = local_only(run, runs)
        for client in participants(run):
            x = alone.get(client["id"]) if compared else field_of(client, "accuracy", "local")
            y = field_of(client, "accuracy", "personalized")
            if x is not None and y is not None:
                points.append((x, y, client.get("group"), client["id"]))
    if not points or focus[0].method == "local":
        return None
    groups = sorted({str(g or "") for _, _, g, _ in points})
    figure, axes = new_axes(HALF, 1.15 + 0.21 * max(12, len({p[3] for p in points})))
    low = min(min(p[:2]) for p in points)
    high = max(max(p[:2]) for p in points)
    margin = 0.06 * (high - low) + 0.01
    low, high = low - margin, min(1.02, high + margin)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for group in groups:
        chosen = [p for p in points if str(p[2] or "") == group]
        axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=46, alpha=0.85, linewidths=0.8,
                     color=group_color(groups, group), edgecolors=SURFACE, zorder=3, label=group)
    if len(focus) == 1 and len(points) <= 16:
        for x, y, _, client in points:
            axes.annotate(str(client), (x, y), (5, 3), textcoords="offset points", fontsize=7.5, color=MUTED)
    better = sum(y > x for x, y, _, _ in points)
    worse = sum(y < x for x, y, _, _ in points)
    axes.text(0.03, 0.97, f"better for {better} of {len(points)}", transform=axes.transAxes, va="top", color=INK,
              fontsize=9.5, fontweight="bold")
    axes.text(0.97, 0.03, f"worse for {worse}", transform=axes.transAxes, ha="right", color=MUTED, fontsize=9.5)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.set_xlabel("local-only test accuracy (%)" if compared else "test accuracy of its own local expert (%)")
    axes.set_ylabel(f"{focus[0].method} test accuracy (%)")
    if len(groups) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, labelcolor=INK,
                    handletextpad=0.1, borderaxespad=0.2)
    return figure
