"""The pictures: each a function from runs to a ``matplotlib.figure.Figure``."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from fedms.storage.records import RunRecords
from fedms.report.numbers import (by_method, client_values, field_of, first_stage_rounds, focus_method, local_only,
                                  participants, worst_tenth)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#1c2430", "#667084", "#e4e7ec", "#ffffff"
METHOD_COLORS = {"fedms": "#c2410c", "fedavg_ft": "#1d4ed8", "fedavg_prior": "#0f766e", "fedavg": "#7c3aed",
                  "local": "#5b6b80", "fedprox": "#be185d", "fedper": "#4d7c0f", "fedrep": "#a16207", "ditto": "#0369a1",
                  "apfl": "#b45309", "ffa_lora": "#86198f", "fedsa_lora": "#15803d", "fedex_lora": "#be123c",
                  "feddpa": "#0e7490", "fedms_plus": "#7f1d1d"}
_OTHER_METHODS = ("#be185d", "#4d7c0f", "#0369a1", "#a16207")
GROUP_COLORS = ("#0e7490", "#b45309", "#6d28d9", "#15803d", "#be123c", "#475569", "#86198f", "#1e6091")
_WIDE, _HALF = 8.6, 5.05  # figure widths in inches; the page stretches them to its column, and to half of it


@dataclass(frozen=True)
class _Curve:
    """One line of a picture: its methods, color, and values over seeds by position on the axis."""

    methods: tuple[str, ...]
    color: str
    xs: Sequence[float]
    ys: list[list[float]]

    @property
    def label(self) -> str:
        """Names, one a line. Of more than three that coincide two are named, the one that reports speak of first."""
        names = sorted(self.methods, key=lambda name: name != "fedms")
        return ",\n".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"])

    @property
    def means(self) -> list[float]:
        return [statistics.fmean(y) for y in self.ys]


def _curves(runs: Sequence[RunRecords], value: Callable[[RunRecords], list[Optional[float]]]) -> list[_Curve]:
    """One curve a method; ``value`` gives a number for each recorded round. Methods that coincide share a curve."""
    offset = first_stage_rounds(runs)
    curves: list[_Curve] = []
    for method, group in by_method(runs).items():
        points: dict[int, list[float]] = defaultdict(list)
        for run in group:
            for record, y in zip(run.rounds, value(run)):
                if y is not None:
                    points[record["round"] + (offset if record["stage"] == "stage2" else 0)].append(y)
        if not points:
            continue
        xs = sorted(points)
        new = _Curve((method,), method_color(method), xs, [points[x] for x in xs])
        twin = next((i for i, c in enumerate(curves) if c.xs == new.xs and c.ys == new.ys), None)
        if twin is None:
            curves.append(new)
        else:
            old = curves[twin]
            color = new.color if method == "fedms" else old.color
            curves[twin] = _Curve((*old.methods, method), color, old.xs, old.ys)
    return curves


def method_color(method: str) -> str:
    """The color of a method, the same in every picture and page."""
    return METHOD_COLORS.get(method) or _OTHER_METHODS[sum(method.encode()) % len(_OTHER_METHODS)]


def accuracy_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Validation accuracy per round over both stages, one line a method, the range over seeds shaded."""
    curves = _curves(runs, lambda run: [r.get("validation_accuracy") for r in run.rounds])
    if not curves:
        return None
    figure, axes = _axes(_WIDE, _height(curves, 3.3))
    first = first_stage_rounds(runs)
    for curve in curves:
        # Stage 2 measures another model, so its line starts anew.
        for piece in (_part(curve, lambda x: x <= first), _part(curve, lambda x: x > first)):
            lows, highs = [min(y) for y in piece.ys], [max(y) for y in piece.ys]
            if lows != highs:
                axes.fill_between(piece.xs, lows, highs, color=curve.color, alpha=0.13, linewidth=0)
            axes.plot(piece.xs, piece.means, color=curve.color, linewidth=2.4 if _has_fedms(curve) else 1.7,
                      marker="o", markersize=4, markeredgecolor=SURFACE, markeredgewidth=0.8)
    _percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy (%)")
    _round_axis(axes, runs)
    _end_labels(axes, curves)
    return figure


def clock_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Validation accuracy over the simulated clock of the clients' devices, one line a method; None without clocks."""
    def unit(longest: float) -> tuple[str, float]:
        return ("h", 3600) if longest >= 2 * 3600 else ("min", 60) if longest >= 120 else ("s", 1)

    return _accuracy_over(runs, lambda run: [r.get("simulated_seconds") for r in run.rounds],
                          "time on the clients' devices, simulated", unit)


def accuracy_over_bytes_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Validation accuracy over the bytes that all clients have sent and received so far, one line a method."""
    return _accuracy_over(runs, lambda run: [_sum_known(r.get("bytes_up"), r.get("bytes_down")) for r in run.rounds],
                          "sent and received by clients so far", _decimal("B"))


def accuracy_over_flops_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Validation accuracy over the operations that all clients have done so far, one line a method."""
    def flops(run: RunRecords) -> list[Optional[float]]:
        sums: dict[tuple[str, int], float] = defaultdict(float)
        for visit in run.visits:
            sums[visit["stage"], visit["round"]] += visit.get("flops") or 0
        return [sums.get((r["stage"], r["round"])) for r in run.rounds]

    return _accuracy_over(runs, flops, "operations of clients so far", _decimal("FLOP"))


def _sum_known(*values: Optional[float]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _decimal(unit: str) -> Callable[[float], tuple[str, float]]:
    """The unit with a prefix in which the longest value is below 1000."""
    def fitting(longest: float) -> tuple[str, float]:
        power = min(5, max(0, int(math.log10(longest) // 3))) if longest > 0 else 0
        return " kMGTP"[power].strip() + unit, 1000.0 ** power
    return fitting


def _accuracy_over(runs: Sequence[RunRecords], amounts: Callable[[RunRecords], list[Optional[float]]], label: str,
                   unit: Callable[[float], tuple[str, float]]) -> Optional[Figure]:
    """Validation accuracy over the sum so far of an amount that each round has; None where no run knows it, or it is
    always 0. Over seeds both coordinates of a round are averaged. `unit`: name and size for the longest sum."""
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
            curves.append((positions, _Curve((method,), method_color(method),
                                             [statistics.fmean(x for x, _ in points[p]) for p in positions],
                                             [[y for _, y in points[p]] for p in positions])))
    longest = max((curve.xs[-1] for _, curve in curves), default=0.0)
    if longest == 0:
        return None
    name, scale = unit(longest)
    figure, axes = _axes(_WIDE, _height([curve for _, curve in curves], 3.3))
    for positions, curve in curves:
        # Stage 2 measures another model, so its line starts anew.
        split = sum(position <= first for position in positions)
        for piece in (slice(split), slice(split, None)):
            axes.plot([x / scale for x in curve.xs[piece]], curve.means[piece], color=curve.color, marker="o",
                      linewidth=2.4 if _has_fedms(curve) else 1.7, markersize=4, markeredgecolor=SURFACE,
                      markeredgewidth=0.8)
    _percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy (%)")
    axes.set_xlabel(f"{label} ({name})")
    axes.set_xlim(-0.01 * longest / scale, longest / scale)
    _end_labels(axes, [_Curve(c.methods, c.color, [x / scale for x in c.xs], c.ys) for _, c in curves])
    return figure


def gate_size_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Mean weight on the local expert against the number of training samples, one dot a client and seed."""
    focus = by_method(runs)[focus_method(by_method(runs))]
    points = [(client["n_train"], client["gate_mean"], str(client.get("group") or "")) for run in focus
              for client in participants(run) if client.get("gate_mean") is not None and client.get("n_train")]
    if not points:
        return None
    groups = sorted({group for _, _, group in points})
    figure, axes = _axes(_HALF, 2.9)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for group in groups:
        chosen = [p for p in points if p[2] == group]
        axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=46, alpha=0.85, linewidths=0.8,
                     color=_group_color(groups, group), edgecolors=SURFACE, zorder=3)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, 1.05 * max(n for n, _, _ in points))
    axes.set_xlabel("training samples of a client")
    axes.set_ylabel("gate weight on the local expert")
    return figure


def depth_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Active blocks per round."""
    curves = _curves(runs, lambda run: [r.get("depth") for r in run.rounds])
    if not curves:
        return None
    figure, axes = _axes(_HALF, _height(curves, 2.9))
    for curve in curves:
        axes.plot(curve.xs, curve.means, color=curve.color, linewidth=1.9, drawstyle="steps-mid", marker="o",
                  markersize=3.5, markeredgecolor=SURFACE, markeredgewidth=0.6)
    top = max(max(c.means) for c in curves)
    axes.set_ylim(0, top + 0.8)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("trained blocks (depth)")
    _round_axis(axes, runs)
    _end_labels(axes, curves)
    return figure


def bytes_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Bytes sent by all clients, summed over rounds."""
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
    curves = [_Curve(c.methods, c.color, c.xs, [[v / scale for v in y] for y in c.ys]) for c in curves]
    figure, axes = _axes(_HALF, _height(curves, 2.9))
    for curve in curves:
        axes.plot(curve.xs, curve.means, color=curve.color, linewidth=1.9, marker="o", markersize=3.5,
                  markeredgecolor=SURFACE, markeredgewidth=0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"sent by clients so far ({unit})")
    _round_axis(axes, runs)
    _end_labels(axes, curves)
    return figure


def clients_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Personalized test accuracy of every client, one row a method, with mean and worst 10 %."""
    rows = []
    if zero := [v for r in {r.seed: r for r in runs}.values() if (v := client_values(r, "zero_shot"))]:
        rows.append(("zero-shot", MUTED, zero))
    for method, group in by_method(runs).items():
        if values := [v for r in group if (v := client_values(r, "personalized"))]:
            rows.append((method, method_color(method), values))
    if not rows:
        return None
    figure, axes = _axes(_WIDE, 0.75 + 0.4 * len(rows))
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
    _percent_axis(axes.xaxis)
    axes.set_xlabel("test accuracy of a client (%)")
    return figure


def gate_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Weight on the local expert by client: mean, and standard deviation over its test samples."""
    gated = [r for r in by_method(runs)[focus_method(by_method(runs))]
             if any(c.get("gate_mean") is not None for c in r.clients)]
    if not gated:
        return None
    clients = sorted({(str(c.get("group") or ""), c["id"]) for r in gated for c in participants(r)
                      if c.get("gate_mean") is not None})
    if not clients:
        return None
    groups = sorted({g for g, _ in clients})
    figure, axes = _axes(_HALF, 1.15 + 0.21 * max(12, len(clients)))
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    place = {client: y for y, (_, client) in enumerate(clients)}
    width = 0.5 / len(gated)
    for number, run in enumerate(gated):
        for client in participants(run):
            mean = client.get("gate_mean")
            if mean is None:
                continue
            y = place[client["id"]] + (number - (len(gated) - 1) / 2) * width
            color = _group_color(groups, client.get("group"))
            spread = client.get("gate_std") or 0
            axes.plot([max(0, mean - spread), min(1, mean + spread)], [y, y], color=color, alpha=0.4,
                      linewidth=4 if len(gated) == 1 else 2.5, solid_capstyle="round", zorder=2)
            axes.plot([mean], [y], marker="o", color=color, markersize=6 if len(gated) == 1 else 4,
                      markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3)
    axes.set_yticks(range(len(clients)), [f"{g or 'client'} {i}" for g, i in clients])
    for label, (group, _) in zip(axes.get_yticklabels(), clients):
        label.set_color(_group_color(groups, group))
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="y", visible=False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nglobal expert", "0.25", "0.5\nhalf", "0.75", "1\nlocal expert"])
    axes.set_xlabel("gate weight on the local expert")
    return figure


def gain_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Mixture against local-only accuracy of each client; above the diagonal the federation helps.

    Local-only is the ``local`` run of the same seed where there is one, else the run's own local expert.
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
    figure, axes = _axes(_HALF, 1.15 + 0.21 * max(12, len({p[3] for p in points})))
    low = min(min(p[:2]) for p in points)
    high = max(max(p[:2]) for p in points)
    margin = 0.06 * (high - low) + 0.01
    low, high = low - margin, min(1.02, high + margin)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for group in groups:
        chosen = [p for p in points if str(p[2] or "") == group]
        axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=46, alpha=0.85, linewidths=0.8,
                     color=_group_color(groups, group), edgecolors=SURFACE, zorder=3, label=group)
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
    _percent_axis(axes.xaxis)
    _percent_axis(axes.yaxis)
    axes.set_xlabel("local-only test accuracy (%)" if compared else "test accuracy of its own local expert (%)")
    axes.set_ylabel(f"{focus[0].method} test accuracy (%)")
    if len(groups) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, labelcolor=INK,
                    handletextpad=0.1, borderaxespad=0.2)
    return figure


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


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's settings; and a dollar sign in a name starts no formula."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        yield


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG file, the same for an equal figure of this name; text stays text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    return figure, axes


def _height(curves: Sequence[_Curve], least: float) -> float:
    """Inches in which the names at the lines' ends have room."""
    return max(least, 0.95 + 0.165 * sum(1 + curve.label.count("\n") for curve in curves))


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}" if -1e-9 <= v <= 1 + 1e-9 else ""))


def _round_axis(axes: Any, runs: Sequence[RunRecords]) -> None:
    """Rounds counted within their stage, a line between the stages."""
    first = first_stage_rounds(runs)
    second = max((r["round"] for run in runs for r in run.rounds if r["stage"] == "stage2"), default=0)
    stride = max(1, math.ceil((first + second) / 16))
    ticks = [(x, x) for x in range(1, first + 1, stride)] + [(first + x, x) for x in range(1, second + 1, stride)]
    axes.set_xticks([x for x, _ in ticks], [str(name) for _, name in ticks])
    axes.set_xlim(0.6, first + second + 0.4)
    axes.set_xlabel("round")
    axes.grid(axis="x", visible=False)
    for start, rounds, name in ((0, first, "stage 1"), (first, second, "stage 2")):
        if rounds:
            axes.text(start + (rounds + 1) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center",
                      va="bottom", color=MUTED, fontsize=8.5)
    if first and second:
        axes.axvline(first + 0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))


def _part(curve: _Curve, inside: Callable[[float], bool]) -> _Curve:
    chosen = [(x, y) for x, y in zip(curve.xs, curve.ys) if inside(x)]
    return _Curve(curve.methods, curve.color, [x for x, _ in chosen], [y for _, y in chosen])


def _has_fedms(curve: _Curve) -> bool:
    return "fedms" in curve.methods


def _end_labels(axes: Any, curves: Sequence[_Curve]) -> None:
    """Names at the right of the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    line = 11.5 * (high - low) / (axes.figure.get_figheight() * 72 * 0.75)
    order = sorted(curves, key=lambda c: c.means[-1])
    labels = [curve.label for curve in order]
    heights = [line * (1 + label.count("\n")) for label in labels]
    places: list[float] = []
    for number, curve in enumerate(order):
        lowest = places[-1] + (heights[number - 1] + heights[number]) / 2 if places else low
        places.append(max(curve.means[-1], lowest))
    # Pushing upwards alone would leave the axes: shift all labels down by half of what they were moved on average.
    shift = statistics.fmean(p - c.means[-1] for p, c in zip(places, order))
    right = axes.get_xlim()[1]
    last = max(c.xs[-1] for c in curves)
    for place, curve, label in zip(places, order, labels):
        if curve.xs[-1] < last or abs(place - shift - curve.means[-1]) > line:
            bend = right - 0.03 * (right - axes.get_xlim()[0])
            axes.plot([curve.xs[-1], bend, right], [curve.means[-1], curve.means[-1], place - shift], linewidth=0.8,
                      color=curve.color, linestyle=(0, (1, 2)), clip_on=False)
        axes.annotate(label, (right, place - shift), (4, 0), textcoords="offset points", va="center",
                      color=curve.color, fontsize=9, annotation_clip=False,
                      fontweight="bold" if _has_fedms(curve) else "normal")


def _group_color(groups: Sequence[str], group: Any) -> str:
    name = str(group or "")
    return GROUP_COLORS[groups.index(name) % len(GROUP_COLORS)] if name in groups else MUTED
