"""The report: from the records on disk to tables, words, charts and one self-contained HTML file.

Only :mod:`fedms.storage.records` is read, never a live object, so a report can be made again at any time and equal records
give an equal file.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedms.report.figures import (GRID, GROUP_COLORS, INK, MUTED, accuracy_figure, accuracy_over_bytes_figure,
                                      accuracy_over_flops_figure, as_svg, clients_figure, clock_figure, depth_figure, gain_figure,
                                      gaps_figure, gate_figure, method_color, plain_style)
    from fedms.report.formats import duration, percent, size
    from fedms.report.numbers import OURS, Stat, comparison, read_runs, worst_tenth
    from fedms.report.page import render, write_report
    from fedms.report.tables import table, write_comparison
    from fedms.report.verdict import ONE_SEED, headline
    from fedms.report.wording import findings

__all__ = ["GRID", "GROUP_COLORS", "INK", "MUTED", "ONE_SEED", "OURS", "Stat", "accuracy_figure", "accuracy_over_bytes_figure",
           "accuracy_over_flops_figure", "as_svg", "clients_figure", "clock_figure", "comparison", "depth_figure", "duration",
           "findings", "gain_figure", "gaps_figure", "gate_figure", "headline", "method_color", "percent", "plain_style",
           "read_runs", "render", "size", "table", "worst_tenth", "write_comparison", "write_report"]


def __getattr__(name: str) -> Any:
    # Looked up when they are asked for: records are read and runs are watched without the libraries for charts.
    if name in __all__:
        for module in ("numbers", "formats", "wording", "verdict", "tables", "page", "figures"):
            found = importlib.import_module(f"fedms.report.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module 'fedms.report' has no attribute {name!r}")
