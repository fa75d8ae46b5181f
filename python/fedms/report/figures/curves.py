"""Validation accuracy, or loss of a language model, over rounds, bytes, operations and simulated time; and the depth over rounds."""
from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from fedms.report.figures.style import (MUTED, SURFACE, Curve, end_labels, has_ours, height_of, mark, method_color, new_axes,
                                        percent_axis, round_axis)
from fedms.report.measures import Measure, measure_of
from fedms.report.numbers import OURS, by_method, first_stage_rounds, flops_by_round
from fedms.storage.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Amounts = Callable[[RunRecords], list[Optional[float]]]
Unit = Callable[[float], tuple[str, float]]


@dataclass(frozen=True)
class _Line:
    """A curve over an amount.

    Attributes:
        positions: Round of each of its points, counted over both stages.
        curve: The points; their x are sums of the amount so far.
    """

    positions: list[int]
    curve: Curve


def accuracy_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw validation accuracy by round over both stages: one line for each method, the range over seeds shaded."""
    measure = measure_of(runs)
    curves = _curves(runs, lambda run: [r.get(measure.validation) for r in run.rounds])
    if not curves:
        return None
    figure, axes = _accuracy_axes(curves, measure)
    _draw(axes, [_Line([int(x) for x in curve.xs], curve) for curve in curves], first_stage_rounds(runs), 1.0)
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
    return _accuracy_over(runs, lambda run: [sum_known(r.get("bytes_up"), r.get("bytes_down")) for r in run.rounds],
                          "sent and received by clients so far", decimal("B"))


def accuracy_over_flops_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw validation accuracy over the operations that all clients have done so far, cached features included."""
    return _accuracy_over(runs, flops_by_round, "operations of clients so far", decimal("FLOP"))


def depth_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Draw the number of trained blocks by round; None where it is the same in all rounds of all methods."""
    curves = _curves(runs, lambda run: [r.get("depth") for r in run.rounds])
    if len({value for curve in curves for value in curve.means}) < 2:
        return None
    figure, axes = new_axes(height_of(curves, 2.9))
    for curve in curves:
        mark(axes.plot(curve.xs, curve.means, color=curve.color, linewidth=1.9, drawstyle="steps-mid", marker="o",
                       markersize=3.5, markeredgecolor=SURFACE, markeredgewidth=0.6), curve.methods)
    top = max(max(c.means) for c in curves)
    axes.set_ylim(0, top + 0.8)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("trained blocks (depth)")
    round_axis(axes, runs)
    end_labels(axes, curves)
    return figure


def decimal(unit: str) -> Unit:
    """Return a function that chooses the decimal prefix with which the longest value is below 1000."""
    def fitting(longest: float) -> tuple[str, float]:
        power = min(5, max(0, int(math.log10(longest) // 3))) if longest > 0 else 0
        return " kMGTP"[power].strip() + unit, 1000.0 ** power
    return fitting


def _curves(runs: Sequence[RunRecords], value: Amounts) -> list[Curve]:
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
            color = new.color if method in OURS else old.color
            curves[twin] = Curve((*old.methods, method), color, old.xs, old.ys)
    return curves


def _accuracy_over(runs: Sequence[RunRecords], amounts: Amounts, label: str, unit: Unit) -> Optional[Figure]:
    """Draw validation accuracy over the sum so far of an amount. Both are averaged over seeds, round by round.

    Args:
        runs: The runs.
        amounts: Returns the amount of each recorded round of a run, or None where it is unknown.
        label: What the amount is.
        unit: Returns the name and the size of the unit in which the longest sum is written.

    Returns:
        The figure, or None where no run knows the amount, or it is always 0.
    """
    lines, measure = [], measure_of(runs)
    first = first_stage_rounds(runs)
    for method, group in by_method(runs).items():
        points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for run in group:
            so_far = 0.0
            for record, amount in zip(run.rounds, amounts(run)):
                so_far += amount or 0.0
                if amount is not None and (reached := record.get(measure.validation)) is not None:
                    position = record["round"] + (first if record["stage"] == "stage2" else 0)
                    points[position].append((so_far, reached))
        if points:
            positions = sorted(points)
            lines.append(_Line(positions, Curve((method,), method_color(method),
                                                [statistics.fmean(x for x, _ in points[p]) for p in positions],
                                                [[y for _, y in points[p]] for p in positions])))
    longest = max((line.curve.xs[-1] for line in lines), default=0.0)
    if longest == 0:
        return None
    name, scale = unit(longest)
    figure, axes = _accuracy_axes([line.curve for line in lines], measure)
    _draw(axes, lines, first, scale)
    axes.set_xlabel(f"{label} ({name})")
    axes.set_xlim(-0.02 * longest / scale, 1.02 * longest / scale)
    end_labels(axes, [Curve(c.methods, c.color, [x / scale for x in c.xs], c.ys) for c in (line.curve for line in lines)])
    return figure


def _accuracy_axes(curves: Sequence[Curve], measure: Measure) -> tuple[Any, Any]:
    figure, axes = new_axes(height_of(curves, 3.3))
    if measure.percent:
        percent_axis(axes.yaxis)
    axes.set_ylabel(measure.validation_title)
    return figure, axes


def _draw(axes: Any, lines: Sequence[_Line], first: int, scale: float) -> None:
    """Draw each line in two pieces, as stage 2 measures another model.

    A first stage that several methods have in common belongs to none of them: it is drawn once, in gray.

    Args:
        axes: Where to draw.
        lines: The lines.
        first: Number of rounds of stage 1.
        scale: The unit of x.
    """
    shared: dict[Any, list[str]] = defaultdict(list)
    for line in lines:
        shared[_values(_piece(line, 0, first))] += line.curve.methods
    for line in lines:
        for low, high in ((0, first), (first, math.inf)):
            piece = _piece(line, low, high)
            if not piece.xs:
                continue
            methods = shared[_values(piece)] if low == 0 else list(piece.methods)
            common = low == 0 and len(methods) > len(piece.methods)
            if common and methods[0] != piece.methods[0]:
                continue
            xs, color = [x / scale for x in piece.xs], MUTED if common else piece.color
            lows, highs = [min(y) for y in piece.ys], [max(y) for y in piece.ys]
            if lows != highs:
                mark([axes.fill_between(xs, lows, highs, color=color, alpha=0.13, linewidth=0)], methods)
            mark(axes.plot(xs, piece.means, color=color, linewidth=2.4 if has_ours(piece) and not common else 1.7,
                           marker="o", markersize=4, markeredgecolor=SURFACE, markeredgewidth=0.8), methods)
            if common:
                axes.annotate(f"shared by {len(methods)}", (xs[-1], piece.means[-1]), (0, -8), textcoords="offset points",
                              ha="right", va="top", color=MUTED, fontsize=8.5)


def _piece(line: _Line, above: float, until: float) -> Curve:
    """Return the part of a line whose rounds are above `above` and at most `until`."""
    chosen = [i for i, position in enumerate(line.positions) if above < position <= until]
    curve = line.curve
    return Curve(curve.methods, curve.color, [curve.xs[i] for i in chosen], [curve.ys[i] for i in chosen])


def _values(curve: Curve) -> tuple[Any, ...]:
    return tuple(curve.xs), tuple(map(tuple, curve.ys))


def sum_known(*values: Optional[float]) -> Optional[float]:
    """Return the sum of the values that are known, or None if none is."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None
