"""What the gates of clients do."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from fedms.report.figures.style import HALF, MUTED, SURFACE, group_color, new_axes
from fedms.report.numbers import by_method, focus_method, participants
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gate_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the gate's weight on the local expert by client: mean and standard deviation over its test samples."""
    gated = [r for r in by_method(runs)[focus_method(by_method(runs))]
             if any(c.get("gate_mean") is not None for c in r.clients)]
    if not gated:
        return None
    clients = sorted({(str(c.get("group") or ""), c["id"]) for r in gated for c in participants(r)
                      if c.get("gate_mean") is not None})
    if not clients:
        return None
    groups = sorted({g for g, _ in clients})
    figure, axes = new_axes(HALF, 1.15 + 0.21 * max(12, len(clients)))
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    place = {client: y for y, (_, client) in enumerate(clients)}
    width = 0.5 / len(gated)
    for number, run in enumerate(gated):
        for client in participants(run):
            mean = client.get("gate_mean")
            if mean is None:
                continue
            y = place[client["id"]] + (number - (len(gated) - 1) / 2) * width
            color = group_color(groups, client.get("group"))
            spread = client.get("gate_std") or 0
            axes.plot([max(0, mean - spread), min(1, mean + spread)], [y, y], color=color, alpha=0.4,
                      linewidth=4 if len(gated) == 1 else 2.5, solid_capstyle="round", zorder=2)
            axes.plot([mean], [y], marker="o", color=color, markersize=6 if len(gated) == 1 else 4,
                      markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3)
    axes.set_yticks(range(len(clients)), [f"{g or 'client'} {i}" for g, i in clients])
    for label, (group, _) in zip(axes.get_yticklabels(), clients):
        label.set_color(group_color(groups, group))
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="y", visible=False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nglobal expert", "0.25", "0.5\nhalf", "0.75", "1\nlocal expert"])
    axes.set_xlabel("gate weight on the local expert")
    return figure


def gate_size_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the gate's mean weight on the local expert against the number of training samples."""
    focus = by_method(runs)[focus_method(by_method(runs))]
    points = [(client["n_train"], client["gate_mean"], str(client.get("group") or "")) for run in focus
              for client in participants(run) if client.get("gate_mean") is not None and client.get("n_train")]
    if not points:
        return None
    groups = sorted({group for _, _, group in points})
    figure, axes = new_axes(HALF, 2.9)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for group in groups:
        chosen = [p for p in points if p[2] == group]
        axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=46, alpha=0.85, linewidths=0.8,
                     color=group_color(groups, group), edgecolors=SURFACE, zorder=3)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, 1.05 * max(n for n, _, _ in points))
    axes.set_xlabel("training samples of a client")
    axes.set_ylabel("gate weight on the local expert")
    return figure
