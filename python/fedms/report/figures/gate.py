"""What the gates of clients do."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from fedms.report.figures.clients import MOST_CLIENTS
from fedms.report.figures.style import MUTED, SURFACE, client_label, group_color, mark, name_rows, new_axes
from fedms.report.numbers import by_method, focus_method, participants
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gate_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the gate's weight on the local expert by client: mean and standard deviation over its test samples."""
    gated = [r for r in by_method(runs)[focus_method(by_method(runs))]
             if any(c.get("gate_mean") is not None for c in r.clients)]
    sizes = {(str(c.get("group") or ""), c["id"]): c.get("n_train") for r in gated for c in participants(r)
             if c.get("gate_mean") is not None}
    if not sizes:
        return None
    clients = sorted(sizes)[:MOST_CLIENTS]
    groups = sorted({g for g, _ in sizes})
    figure, axes = new_axes(1.15 + 0.21 * max(12, len(clients)))
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    place = {client: y for y, (_, client) in enumerate(clients)}
    width = 0.5 / len(gated)
    for number, run in enumerate(gated):
        for client in participants(run):
            mean = client.get("gate_mean")
            if mean is None or client["id"] not in place:
                continue
            y = place[client["id"]] + (number - (len(gated) - 1) / 2) * width
            color = group_color(groups, client.get("group"))
            spread = client.get("gate_std") or 0
            mark([*axes.plot([max(0, mean - spread), min(1, mean + spread)], [y, y], color=color, alpha=0.4,
                             linewidth=4 if len(gated) == 1 else 2.5, solid_capstyle="round", zorder=2),
                  *axes.plot([mean], [y], marker="o", color=color, markersize=6 if len(gated) == 1 else 4,
                             markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3)], [client["id"]], "client")
    name_rows(axes, [client_label(g, i, sizes[g, i]) for g, i in clients], [group_color(groups, g) for g, _ in clients],
              [i for _, i in clients], "client")
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nglobal expert", "25", "50\nhalf", "75", "100\nlocal expert"])
    axes.set_xlabel("weight of the local expert (%)")
    return figure
