"""What each client reaches: with all methods, and of the method in focus beside training alone."""
from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from fedms.report.figures.style import (GAIN, INK, LOSS, MUTED, SURFACE, client_label, group_color, mark, method_color,
                                        name_rows, new_axes, percent_axis)
from fedms.report.measures import measure_of
from fedms.report.numbers import OURS, by_method, focus_method, local_only, merit, merits, participants, worst_tenth
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLIENTS = 30       # that a picture with a row for each client shows


def clients_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw what every client reaches on its own test samples: one row for each method, with mean and worst 10 %."""
    measure, rows = measure_of(runs), []
    if zero := [v for r in {r.seed: r for r in runs}.values() if (v := merits(r, "zero_shot"))]:
        rows.append(("zero-shot", MUTED, zero))
    for method, group in by_method(runs).items():
        if values := [v for r in group if (v := merits(r, "personalized"))]:
            rows.append((method, method_color(method), values))
    if not rows:
        return None
    figure, axes = new_axes(0.75 + 0.4 * len(rows))
    for y, (method, color, values) in enumerate(rows):
        # Over seeds as in the table: of each seed first, then their mean.
        average = statistics.fmean(map(statistics.fmean, values))
        mean, worst = measure.shown(average), measure.shown(statistics.fmean(map(worst_tenth, values)))
        dots = [measure.shown(v) for seed in values for v in seed]
        mark([axes.scatter(dots, [y] * len(dots), s=30, color=color, alpha=0.32, linewidths=0, zorder=2),
              *axes.plot([mean, mean], [y - 0.32, y + 0.32], color=color, linewidth=3, solid_capstyle="butt", zorder=3),
              *axes.plot([worst], [y], marker="|", color=color, markersize=12, markeredgewidth=1.4, zorder=3),
              axes.annotate(measure.number(average), (mean, y - 0.32), (0, 1.5), textcoords="offset points", ha="center",
                            va="bottom", color=color, fontsize=9, fontweight="bold")], [method])
    names = [method for method, _, _ in rows]
    name_rows(axes, names, [color for _, color, _ in rows], names, bold=OURS)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    if measure.percent:
        percent_axis(axes.xaxis)
    axes.set_xlabel(measure.title)
    return figure


def gain_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw each client's step from training alone to the method in focus, the largest gain first; means over seeds.

    Training alone is the `local` run of the same seed where there is one, else the run's own local expert.
    """
    focus = by_method(runs)[focus_method(by_method(runs))]
    measure, compared = measure_of(runs), any(local_only(r, runs) for r in focus)
    pairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
    groups: dict[int, str] = {}
    for run in focus:
        alone = local_only(run, runs)
        for client in participants(run):
            x = alone.get(client["id"]) if compared else merit(client, "local")
            y = merit(client)
            if x is not None and y is not None:
                pairs[client["id"]].append((x, y))
                groups[client["id"]] = str(client.get("group") or "")
    if not pairs or focus[0].method == "local":
        return None
    steps = {number: (statistics.fmean(x for x, _ in each), statistics.fmean(y for _, y in each))
             for number, each in pairs.items()}
    order = sorted(steps, key=lambda number: steps[number][0] - steps[number][1])
    shown = order if len(order) <= MOST_CLIENTS else [*order[:MOST_CLIENTS // 2], *order[-MOST_CLIENTS // 2:]]
    names = sorted(set(groups.values()))
    figure, axes = new_axes(1.15 + 0.21 * max(12, len(shown)))
    for row, number in enumerate(shown):
        x, y = steps[number]
        color = GAIN if y > x else LOSS if y < x else MUTED
        x, y = measure.shown(x), measure.shown(y)
        mark([*axes.plot([x, y], [row, row], color=color, linewidth=2, zorder=2),
              *axes.plot([x], [row], marker="o", color=color, markerfacecolor=SURFACE, markersize=5.5, zorder=3),
              *axes.plot([y], [row], marker="o", color=color, markersize=5.5, zorder=4)], [number], "client")
    name_rows(axes, [client_label(groups[number], number) for number in shown],
              [group_color(names, groups[number]) for number in shown], shown, "client")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    better, worse = (sum(sign * (y - x) > 0 for x, y in steps.values()) for sign in (1, -1))
    title = f"better for {better} of {len(steps)}, worse for {worse}"
    if len(shown) < len(steps):
        title += f"; shown: {len(shown)} with the largest gains and losses"
    axes.set_title(title, loc="left", color=INK, fontsize=9.5, fontweight="bold")
    if measure.percent:
        percent_axis(axes.xaxis)
    axes.set_xlabel(f"○ {'local-only' if compared else 'its own local expert'}   ● {focus[0].method}: {measure.title}")
    return figure
