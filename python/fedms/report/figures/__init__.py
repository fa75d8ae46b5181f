"""The pictures of a report: each is a function from runs to a `matplotlib.figure.Figure`, or to None where there is no data."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedms.report.figures.clients import clients_figure, gain_figure
from fedms.report.figures.curves import (accuracy_figure, accuracy_over_bytes_figure, accuracy_over_flops_figure, bytes_figure,
                                         clock_figure, depth_figure)
from fedms.report.figures.gate import gate_figure, gate_size_figure
from fedms.report.figures.style import GRID, GROUP_COLORS, INK, MUTED, SURFACE, as_svg, method_color, plain_style

__all__ = ["FIGURES", "GRID", "GROUP_COLORS", "INK", "MUTED", "SURFACE", "accuracy_figure", "accuracy_over_bytes_figure",
           "accuracy_over_flops_figure", "as_svg", "bytes_figure", "clients_figure", "clock_figure", "depth_figure",
           "gain_figure", "gate_figure", "gate_size_figure", "method_color", "plain_style"]

FIGURES: tuple[tuple[str, Callable[..., Any], str, str, str], ...] = (
    ("clients", clients_figure, "Personalized test accuracy",
     "One dot a client and seed; the bar with the number is the mean, the thin tick the mean of the worst 10 % of "
     "clients.", "wide"),
    ("accuracy", accuracy_figure, "Validation accuracy per round",
     "Mean over clients, weighted by their validation samples. local, and fedavg_ft and fedms in stage 2: each "
     "client's own model after its visit; otherwise the shared model as clients receive it (fedavg_prior: before its "
     "prior). Lines that coincide share a label or lie on each other. Shaded: range over seeds.", "wide"),
    ("clock", clock_figure, "Validation accuracy over simulated time",
     "As above, over the time that the rounds would take on the clients' devices: each round lasts as long as its "
     "slowest client computes, sends and receives. Mean over seeds.", "wide"),
    ("over-bytes", accuracy_over_bytes_figure, "Validation accuracy over bytes",
     "As above, over what all clients have sent and received. Mean over seeds.", "wide"),
    ("over-flops", accuracy_over_flops_figure, "Validation accuracy over operations",
     "As above, over the operations of all clients, constants included. Mean over seeds.", "wide"),
    ("depth", depth_figure, "Depth", "Blocks whose LoRA pairs are trained, mean over seeds. Each stage activates anew.",
     "half"),
    ("bytes", bytes_figure, "Communication", "Bytes sent by all clients, summed over rounds, mean over seeds.", "half"),
    ("gate", gate_figure, "Gate weight by client",
     "Dot: mean over a client's test samples, one a seed; bar: one standard deviation over them.", "half"),
    ("gate-size", gate_size_figure, "Gate weight and data size", "One dot a client and seed.", "half"),
    ("gain", gain_figure, "Against local-only",
     "One dot a client and seed; above the diagonal the client is better off.", "half"),
)
"""The pictures of the page in their order: name, function, title, caption, and width ("wide" or "half")."""
