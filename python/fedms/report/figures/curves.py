"""Lines over rounds, simulated time, bytes and operations."""
from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Optional

from fedms.report.figures.style import (HALF, SURFACE, WIDE, Curve, end_labels, has_fedms, height_of, method_color, new_axes,
                                        percent_axis, round_axis)
from fedms.report.numbers import by_method, first_stage_rounds
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw validation accuracy by round over both stages: one line for each method, the range over seeds shaded."""
    curves = _curves(runs, lambda run: [r.get("validation_accuracy") for r in run.rounds])
    if not curves:
        return None
    figure, axes = new_axes(WIDE, height_of(curves, 3.3))
    first = first_stage_rounds(runs)
    for curve in curves:
        # Stage 2 measures another model, so its line starts anew.
        for piece in (_piece(curve, lambda x: x <= first), _piece(curve, lambda x: x > first)):
            lows, highs = [min(y) for y in piece.ys], [max(y) for y in piece.ys]
            if lows != highs:
                axes.fill_between(piece.xs, lows, highs, color=curve.color, alpha=0.13, linewidth=0)
            axes.plot(piece.xs, piece.means, color=curve.color, linewidth=2.4 if has_fedms(curve) else 1.7,
                      marker="o", markersize=4, markeredgecolor=SURFACE, markeredgewidth=0.8)
    percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy (%)")
    round_axis(axes, runs)
    end_labels(axes, curves)
    return figure


def clock_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw validation accuracy over the simulated time of the clients' devices; None where their speed is not given."""
    def unit(longest: float) -> tuple[str, float]:
        return ("h", 3600) if longest >= 2 * 3600 else ("min", 60) if longest >= 120 else ("s", 1)

    return _accuracy_over(runs, lambda run: [r.get("simulated_seconds") for r in run.rounds],
                          "time on the clients' devices, simulated", unit)


def accuracy_over_bytes_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw validation accuracy over the bytes that all clients have sent and received so far."""
    return _accuracy_over(runs, lambda run: [_sum_known(r.get("bytes_up"), r.get("bytes_down")) for r in run.rounds],
                          "sent and received by clients so far", _decimal("B"))


def accuracy_over_flops_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw validation accuracy over the operations that all clients have done so far."""
    def flops(run: RunRecords) -> list[Optional[float]]:
        sums: dict[tuple[str, int], float] = defaultdict(float)
        for visit in run.visits:
            sums[visit["stage"], visit["round"]] += visit.get("flops") or 0
        return [sums.get((r["stage"], r["round"])) for r in run.rounds]

    return _accuracy_over(runs, flops, "operations of clients so far", _decimal("FLOP"))


def depth_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the number of trained blocks by round."""
    curves = _curves(runs, lambda run: [r.get("depth") for r in run.rounds])
    if not curves:
        return None
    figure, axes = new_axes(HALF, height_of(curves, 2.9))
    for curve in curves:
        axes.plot(curve.xs, curve.means, color=curve.color, linewidth=1.9, drawstyle="steps-mid", marker="o",
                  markersize=3.5, markeredgecolor=SURFACE, markeredgewidth=0.6)
    top = max(max(c.means) for c in curves)
    axes.set_ylim(0, top + 0.8)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("trained blocks (depth)")
    round_axis(axes, runs)
    end_labels(axes, curves)
    return figure


def bytes_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the bytes that all clients have sent so far, by round."""
    def total(run: RunRecords) -> list[Optional[float]]:
        sums, so_far = [], 0.0
        for record in run.rounds:
            so_far += record.get("bytes_up") or 0
            sums.append(so_far)
        return sums

    curves = _curves(runs, total)
    if not curves:
        return None
    unit, scale = "MB", 1e6
    if max(c.means[-1] for c in curves) >= 1e9:
        unit, scale = "GB", 1e9
    elif max(c.means[-1] for c in curves) < 1e6:
        unit, scale = "kB", 1e3
    curves = [Curve(c.methods, c.color, c.xs, [[v / scale for v in y] for y in c.ys]) for c in curves]
    figure, axes = new_axes(HALF, height_of(curves, 2.9))
    for curve in curves:
        axes.plot(curve.xs, curve.means, color=curve.color, linewidth=1.9, marker="o", markersize=3.5,
                  markeredgecolor=SURFACE, markeredgewidth=0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"sent by clients so far ({unit})")
    round_axis(axes, runs)
    end_labels(axes, curves)
    return figure


def _curves(runs: Sequence[RunRecords], value: Callable[[RunRecords], list[Optional[float]]]) -> list[Curve]:
    """Return one curve for each method. Methods whose values coincide share a curve.

    Args:
        runs: The runs.
        value: Returns a number for each recorded round of a run, or None where it is unknown.
    """
    offset = first_stage_rounds(runs)
    curves: list[Curve] = []
    for method, group in by_method(runs).items():
        points: dict[int, list[float]] = defaultdict(list)
        for run in group:
            for record, y in zip(run.rounds, value(run)):
                if y is not None:
                    points[record["round"] + (offset if record["stage"] == "stage2" else 0)].append(y)
        if not points:
            continue
        xs = sorted(points)
        new = Curve((method,), method_color(method), xs, [points[x] for x in xs])
        twin = next((i for i, c in enumerate(curves) if c.xs == new.xs and c.ys == new.ys), None)
        if twin is None:
            curves.append(new)
        else:
            old = curves[twin]
            color = new.color if method == "fedms" else old.color
            curves[twin] = Curve((*old.methods, method), color, old.xs, old.ys)
    return curves


def _accuracy_over(runs: Sequence[RunRecords], amounts: Callable[[RunRecords], list[Optional[float]]], label: str,
                   unit: Callable[[float], tuple[str, float]]) -> Optional[Figure]:
    """Draw validation accuracy over the sum so far of an amount. Both are averaged over seeds, round by round.

    Args:
        runs: The runs.
        amounts: Returns the amount of each recorded round of a run, or None where it is unknown.
        label: What the amount is.
        unit: Returns the name and the size of the unit in which the longest sum is written.

    Returns:
        The figure, or None where no run knows the amount, or it is always 0.
    """
    curves = []
    first = first_stage_rounds(runs)
    for method, group in by_method(runs).items():
        points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for run in group:
            so_far = 0.0
            for record, amount in zip(run.rounds, amounts(run)):
                so_far += amount or 0.0
                if amount is not None and record.get("validation_accuracy") is not None:
                    position = record["round"] + (first if record["stage"] == "stage2" else 0)
                    points[position].append((so_far, record["validation_accuracy"]))
        if points:
            positions = sorted(points)
            curves.append((positions, Curve((method,), method_color(method),
                                             [statistics.fmean(x for x, _ in points[p]) for p in positions],
                                             [[y for _, y in points[p]] for p in positions])))
    longest = max((curve.xs[-1] for _, curve in curves), default=0.0)
    if longest == 0:
        return None
    name, scale = unit(longest)
    figure, axes = new_axes(WIDE, height_of([curve for _, curve in curves], 3.3))
    for positions, curve in curves:
        # Stage 2 measures another model, so its line starts anew.
        split = sum(position <= first for position in positions)
        for piece in (slice(split), slice(split, None)):
            axes.plot([x / scale for x in curve.xs[piece]], curve.means[piece], color=curve.color, marker="o",
                      linewidth=2.4 if has_fedms(curve) else 1.7, markersize=4, markeredgecolor=SURFACE,
                      markeredgewidth=0.8)
    percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy (%)")
    axes.set_xlabel(f"{label} ({name})")
    axes.set_xlim(-0.01 * longest / scale, longest / scale)
    end_labels(axes, [Curve(c.methods, c.color, [x / scale for x in c.xs], c.ys) for _, c in curves])
    return figure


def _piece(curve: Curve, inside: Callable[[float], bool]) -> Curve:
    chosen = [(x, y) for x, y in zip(curve.xs, curve.ys) if inside(x)]
    return Curve(curve.methods, curve.color, [x for x, _ in chosen], [y for _, y in chosen])


def _sum_known(*values: Optional[float]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _decimal(unit: str) -> Callable[[float], tuple[str, float]]:
    """Return a function that chooses the decimal prefix with which the longest value is below 1000."""
    def fitting(longest: float) -> tuple[str, float]:
        power = min(5, max(0, int(math.log10(longest) // 3))) if longest > 0 else 0
        return " kMGTP"[power].strip() + unit, 1000.0 ** power
    return fitting
