"""Draws the pictures of docs/start/concepts.md again: `fedms run sentiment --set run.threads=1 --out RUN`, then
`python docs/evidence/pictures.py RUN`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from fedms import report

runs, _ = report.read_runs(sys.argv[1])
with matplotlib.rc_context({"svg.hashsalt": "fedms", "figure.dpi": 72}):
    for name, figure in (("rounds", report.accuracy_figure(runs)), ("gate", report.gate_figure(runs))):
        figure.patch.set(alpha=1, facecolor="white")    # it is shown on dark pages too
        figure.savefig(Path(__file__).parent / "img" / f"{name}.svg", metadata={"Date": None})
