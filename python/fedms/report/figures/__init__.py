"""The charts of a report: each is a function from runs to a `matplotlib.figure.Figure`, or to None where there is no data."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedms.report.figures.clients import clients_figure, gain_figure
from fedms.report.figures.curves import (accuracy_figure, accuracy_over_bytes_figure, accuracy_over_flops_figure, clock_figure,
                                         depth_figure)
from fedms.report.figures.gate import gate_figure
from fedms.report.figures.methods import accuracy_by_bytes_figure, accuracy_by_flops_figure, gaps_figure
from fedms.report.figures.style import (GAIN, GRID, GROUP_COLORS, INK, LOSS, MUTED, SURFACE, as_svg, method_color, plain_style)

__all__ = ["CHARTS", "GAIN", "GRID", "GROUP_COLORS", "INK", "LOSS", "MUTED", "SURFACE", "Chart", "accuracy_by_bytes_figure",
           "accuracy_by_flops_figure", "accuracy_figure", "accuracy_over_bytes_figure", "accuracy_over_flops_figure", "as_svg",
           "clients_figure", "clock_figure", "depth_figure", "gain_figure", "gaps_figure", "gate_figure", "method_color",
           "plain_style"]


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        name: Its name, of lowercase letters.
        title: Its title.
        caption: What it shows and how to read it.
        views: Functions that draw it by the name of the axis that they draw it over; a chart with one view needs no name.
    """

    name: str
    title: str
    caption: str
    views: dict[str, Callable[..., Any]]


CHARTS = (
    Chart("clients", "Each client on its own test samples",
          "One dot for each client and seed. The bar with the number is the mean, the thin tick the mean of the worst 10 % of "
          "clients.", {"": clients_figure}),
    Chart("accuracy", "On validation samples",
          "Mean over clients, weighted by their validation samples. In stage 1 the shared model as clients receive it, in stage 2 "
          "each client's own model after its training. Shaded: the range over seeds.",
          {"rounds": accuracy_figure, "bytes": accuracy_over_bytes_figure, "operations": accuracy_over_flops_figure,
           "seconds": clock_figure}),
    Chart("gaps", "Gaps to the method in focus",
          "Dot: mean gap. Line: its 95 % interval over seeds; a method whose line crosses 0 is not shown to differ, "
          "and its dot is hollow. With one seed there is no interval.", {"": gaps_figure}),
    Chart("cost", "Outcome against cost",
          "Mean over clients, each on its own test samples, over what the method cost. The dashed line joins the methods "
          "that no other beats in both.",
          {"bytes": accuracy_by_bytes_figure, "operations": accuracy_by_flops_figure}),
    Chart("gain", "What each client gains over training alone",
          "Hollow dot: the client on its own. Full dot: with the method in focus. Means over seeds, the largest gain first.",
          {"": gain_figure}),
    Chart("gate", "How each client mixes the experts",
          "Dot: mean weight of the local expert over a client's test samples, one for each seed. Bar: one standard deviation. In "
          "brackets: the client's training samples.", {"": gate_figure}),
    Chart("depth", "Depth", "Blocks whose LoRA pairs are trained, mean over seeds. Each stage activates them anew.",
          {"": depth_figure}),
)
"""The charts of the page in their order."""
