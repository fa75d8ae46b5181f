"""The report: from the records on disk to one self-contained HTML file, a CSV and a Markdown table.

Only :mod:`fedms.records` is read, never a live object, so a report can be made again at any time and equal records
give an equal file. Every picture is a function from runs to a ``matplotlib.figure.Figure``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fedms.config import METHODS
from fedms.files import write_durably
from fedms.records import CONFIG, RunFolderError, RunRecords, find_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"

INK, MUTED, GRID, SURFACE = "#1c2430", "#667084", "#e4e7ec", "#ffffff"
METHOD_COLOURS = {"fedms": "#c2410c", "fedavg_ft": "#1d4ed8", "fedavg_prior": "#0f766e", "fedavg": "#7c3aed",
                  "local": "#5b6b80"}
_OTHER_METHODS = ("#be185d", "#4d7c0f", "#0369a1", "#a16207")
GROUP_COLOURS = ("#0e7490", "#b45309", "#6d28d9", "#15803d", "#be123c", "#475569", "#86198f", "#1e6091")

# Light colours are what the figures are drawn in; in the page each becomes a CSS variable with this dark twin.
DARK = {INK: "#e6e9ef", MUTED: "#98a2b3", GRID: "#2b3442", SURFACE: "#161b24", "#c2410c": "#fb8c3c",
        "#1d4ed8": "#6ea8fe", "#0f766e": "#2dd4bf", "#7c3aed": "#b197fc", "#5b6b80": "#a3b1c6", "#be185d": "#f472b6",
        "#4d7c0f": "#a3e635", "#0369a1": "#38bdf8", "#a16207": "#facc15", "#0e7490": "#22d3ee", "#b45309": "#fbbf24",
        "#6d28d9": "#c4b5fd", "#15803d": "#4ade80", "#be123c": "#fb7185", "#475569": "#cbd5e1", "#86198f": "#e879f9",
        "#1e6091": "#7dd3fc"}

ONE_SEED = "One seed: a difference of a few points may be chance."

GATE_CONSTANT = 0.01  # a gate whose weights spread by less than this mixes as a constant would

# Two-sided 95 % quantiles of Student's t for 2, 3, ... values; above 11 values the last is a little too wide.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)

_WIDE, _HALF = 8.6, 5.05  # figure widths in inches; the page stretches them to its column, and to half of it


# Reading and averaging

@dataclass(frozen=True)
class Stat:
    """Mean over seeds, the sample standard deviation, None for a single seed, and the number of seeds."""

    mean: float
    std: Optional[float]
    n: int = 1

    @classmethod
    def of(cls, values: Iterable[Optional[float]]) -> Optional[Stat]:
        known = [v for v in values if v is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    @property
    def may_be_zero(self) -> bool:
        """Whether 0 lies in the 95 % confidence interval of the mean (Student's t); False for a single seed."""
        if self.std is None:
            return False
        return abs(self.mean) <= _T95[min(self.n, len(_T95) + 1) - 2] * self.std / math.sqrt(self.n)


def read_runs(path: str | Path) -> tuple[list[RunRecords], list[str]]:
    """All runs at ``path``, ordered by method and seed, and a note for every one that is damaged.

    Raises :class:`fedms.records.RunFolderError` if not one can be read.
    """
    runs, notes = [], []
    for folder in find_runs(path):
        try:
            runs.append(RunRecords.read(folder))
        except RunFolderError as error:
            notes.append(str(error))
    if not runs:
        raise RunFolderError("\n".join(notes))
    return sorted(runs, key=lambda r: (_rank(r.method), r.seed, r.path.name)), notes


def by_method(runs: Iterable[RunRecords]) -> dict[str, list[RunRecords]]:
    grouped: dict[str, list[RunRecords]] = defaultdict(list)
    for run in runs:
        grouped[run.method].append(run)
    return {m: grouped[m] for m in sorted(grouped, key=_rank)}


def comparison(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """One row a method, zero-shot first: :class:`Stat` over seeds of what the summaries hold, None where unknown.

    ``below_local`` is the share of clients whose personalised accuracy is under that of the ``local`` run of the
    same seed.
    """
    rows = []
    zero_shot = {r.seed: r for r in runs if _client_values(r, "zero_shot")}
    if zero_shot:
        rows.append({
            "method": "zero-shot", "seeds": len(zero_shot), "unfinished": 0,
            "personalised": Stat.of(_client_mean(r, "zero_shot") for r in zero_shot.values()),
            "worst10": Stat.of(worst_tenth(_client_values(r, "zero_shot")) for r in zero_shot.values()),
        })
    for method, group in by_method(runs).items():
        ended = [r for r in group if r.summary]
        row: dict[str, Any] = {"method": method, "seeds": len(ended), "unfinished": len(group) - len(ended)}
        for name, keys in {"personalised": ("personalised_accuracy", "mean"),
                           "worst10": ("personalised_accuracy", "worst10"), "macro_f1": ("macro_f1",),
                           "global_test": ("global_test_accuracy",), "trainable_percent": ("trainable_percent",),
                           "bytes_up": ("bytes_up",), "bytes_down": ("bytes_down",), "seconds": ("seconds",),
                           "peak_memory_bytes": ("peak_memory_bytes",)}.items():
            row[name] = Stat.of(_get(r.summary, *keys) for r in ended)
        if method != "local":
            row["below_local"] = Stat.of(_below_local(r, runs) for r in ended)
        rows.append(row)
    return rows


def worst_tenth(values: Sequence[float]) -> float:
    """Mean of the worst 10 % of clients, at least one."""
    return statistics.fmean(sorted(values)[:max(1, math.ceil(len(values) / 10))])


# Writing

def write_report(path: str | Path) -> Path:
    """Write ``report.html`` into a run folder or a folder of runs; returns its path.

    Raises :class:`fedms.records.RunFolderError` if there is no run or the file cannot be written.
    """
    path = Path(path)
    runs, notes = read_runs(path)
    target = path / "report.html"
    _write(target, render(runs, notes))
    return target


def write_comparison(path: str | Path) -> tuple[Path, Path]:
    """Write ``compare.csv`` (one line a run) and ``compare.md`` (one line a method) into a folder of runs."""
    path = Path(path)
    runs, _ = read_runs(path)
    text = io.StringIO()
    columns = ("method", "seed", "personalised_mean", "personalised_std", "personalised_worst10", "global_test",
               "zero_shot", "macro_f1", "below_local", "gate_mean", "gate_collapsed",
               "trainable_percent", "bytes_up", "bytes_down", "flops", "seconds", "peak_memory_bytes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for run in runs:
        s = run.summary
        writer.writerow([run.method, run.seed,
                         *(_get(s, "personalised_accuracy", k) for k in ("mean", "std", "worst10")),
                         _get(s, "global_test_accuracy"), _get(s, "zero_shot_accuracy"), _get(s, "macro_f1"),
                         _below_local(run, runs), _get(s, "gate", "mean"), _get(s, "gate", "collapsed"),
                         *(_get(s, k) for k in columns[-6:])])
    _write(path / "compare.csv", text.getvalue())
    header, rows = table(comparison(runs))
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    _write(path / "compare.md", "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n")
    return path / "compare.csv", path / "compare.md"


@dataclass(frozen=True)
class _Column:
    """A column of the comparison: ``short`` is its title where room is scarce, ``keep`` says for how long it stays."""

    title: str
    short: str
    key: str
    show: Callable[[Stat], str]
    keep: int


_COLUMNS = (
    _Column("personalised %", "mean\nacc. %", "personalised", lambda s: percent(s), 8),
    _Column("worst 10 % of clients %", "worst 10 %\nacc. %", "worst10", lambda s: percent(s), 7),
    _Column("global test %", "global\ntest %", "global_test", lambda s: percent(s), 3),
    _Column("macro F1 %", "macro\nF1 %", "macro_f1", lambda s: percent(s), 1),
    _Column("clients below local %", "below\nlocal %", "below_local", lambda s: percent(s, 0), 6),
    _Column("trained %", "trained\n%", "trainable_percent", lambda s: f"{s.mean:.2f}", 2),
    _Column("sent up", "sent\nup", "bytes_up", lambda s: size(s.mean), 5),
    _Column("time", "time", "seconds", lambda s: duration(s.mean), 4),
)


def table(rows: Sequence[dict[str, Any]], width: Optional[int] = None) -> tuple[list[str], list[list[str]]]:
    """A comparison as text: header and cells, for the terminal, Markdown and the page alike.

    With ``width``, in characters, titles are short and of two lines, and the least important columns are left out
    until the table fits, with two spaces between columns.
    """
    columns = [c for c in _COLUMNS if any(row.get(c.key) for row in rows)]
    names = [row["method"] + (f" ({row['unfinished']} unfinished)" if row["unfinished"] else "") for row in rows]
    while True:
        header = ["method", *(c.title if width is None else c.short for c in columns)]
        cells = [[name, *(c.show(row[c.key]) if row.get(c.key) else "–" for c in columns)]
                 for name, row in zip(names, rows)]
        widths = [max(len(line) for text in column for line in text.split("\n")) for column in zip(header, *cells)]
        if width is None or not columns or sum(widths) + 2 * (len(widths) - 1) <= width:
            return header, cells
        columns.remove(min(columns, key=lambda c: c.keep))


def render(runs: Sequence[RunRecords], notes: Iterable[str] = ()) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    methods = by_method(runs)
    focus = focus_method(methods)
    focus_runs = methods[focus]
    figures = []
    for name, make, title, caption, width in _FIGURES:
        with _plain_style():
            if (figure := make(runs)) is not None:
                figures.append({"title": title, "caption": caption, "width": width, "svg": Markup(_svg(figure, name))})
    header, cells = table(comparison(runs))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    config = focus_runs[0].config
    return environment.get_template("report.html.j2").render(
        title=f"{config['model']['id']} on {config['data']['name']}",
        setting=_setting(runs), headline=headline(runs), findings=findings(runs, notes), cards=_cards(focus_runs),
        focus=focus, several=len(methods) > 1, header=header, rows=cells, figures=figures, colours=_css_colours(),
        method_class=_css_name,
        grouped=any(c.get("group") for r in runs for c in r.clients), clients_by_method=_clients_by_method(runs),
        details=[_client_details(r) for r in runs if r.clients],
        rounds=[{"title": f"{r.method}, seed {r.seed}", "rows": r.rounds} for r in runs if r.rounds],
        config=(focus_runs[0].path / CONFIG).read_text(encoding="utf-8"), differing=_differing(runs),
        percent=percent, size=size, duration=duration,
    )


# Words

def focus_method(methods: Iterable[str]) -> str:
    """The method a report speaks of first: fedms where present, else the last one."""
    methods = list(methods)
    return "fedms" if "fedms" in methods else methods[-1]


def headline(runs: Sequence[RunRecords]) -> str:
    """The outcome in one or two sentences: who is ahead of whom, by how much, and what that is worth."""
    methods = by_method([r for r in runs if r.summary])
    scores = {m: Stat.of(_get(r.summary, "personalised_accuracy", "mean") for r in group)
              for m, group in methods.items()}
    scores = {m: s for m, s in scores.items() if s}
    if not scores:
        return "No run here has ended, so there is no outcome yet."
    focus = focus_method(scores)
    own = scores[focus]
    text = f"{focus} reaches {percent(own)} % mean personalised accuracy"
    rivals = sorted((m for m in scores if m != focus), key=lambda m: -scores[m].mean)
    if not rivals:
        gaps = {label: Stat.of(_client_gap(r, "personalised", name) for r in methods[focus])
                for name, label in (("zero_shot", "zero-shot"), ("global", "its own global expert"))}
        parts = [f"{_points(gap.mean)} {'above' if gap.mean > 0 else 'below'} {label}"
                 for label, gap in gaps.items() if gap and not _is_zero(gap.mean)]
        single = len(methods[focus]) == 1
        return text + (", " + _listing(parts) if parts else "") + "." + (" " + ONE_SEED if single else "")
    gaps = {}
    for rival in rivals:
        gaps[rival] = (_paired_gap(methods[focus], methods[rival])
                       or Stat(own.mean - scores[rival].mean, None))  # no seed in common
    # Those it loses to come first, then the others from the nearest on.
    order = sorted(gaps, key=lambda m: (gaps[m].mean >= 0, abs(gaps[m].mean)))
    clear = [m for m in order if not gaps[m].may_be_zero]
    parts = [f"{_points(gaps[m].mean)} {'ahead of' if gaps[m].mean > 0 else 'behind'} {m}"
             if not _is_zero(gaps[m].mean) else f"level with {m}" for m in clear]
    text += ": " + _listing(parts) if parts else ""
    if tied := [f"{m} ({_signed(gaps[m].mean)} ± {100 * gaps[m].std:.1f})" for m in order if m not in clear]:
        text += ("; " if parts else ": ") + "not clearly apart from " + _listing(tied)
    return text + "." + (" " + ONE_SEED if any(g.std is None for g in gaps.values()) else "")


def findings(runs: Sequence[RunRecords], notes: Iterable[str] = ()) -> list[dict[str, str]]:
    """What a reader must not miss, as ``{"kind": "good" | "bad" | "plain", "text"}``."""
    found: list[dict[str, str]] = []

    def say(text: str, kind: str = "plain") -> None:
        if text not in {f["text"] for f in found}:
            found.append({"kind": kind, "text": text})

    methods = by_method(runs)
    focus = focus_method(methods)
    ended = [r for r in methods[focus] if r.summary]
    for run in runs:
        if run.summary is None:
            say(f"{run.method}, seed {run.seed}, has not ended: {_how_far(run)}. It has no test results.", "bad")
    worst = Stat.of(_get(r.summary, "personalised_accuracy", "worst10") for r in ended)
    if worst:
        say(f"On its worst 10 % of clients {focus} scores {percent(worst)} %.")
    below = Stat.of(_below_local(r, runs) for r in ended)
    if below and focus != "local":
        share = f"{percent(below, 0)} % of the clients do" if below.mean > 0 else "No client does"
        say(f"{share} worse with {focus} than training alone.",
            "bad" if below.mean > 0.25 else "good" if below.mean == 0 else "plain")
    for text, kind in _gate_findings(ended):
        say(text, kind)
    arrives = Stat.of(_get(r.summary, "unseen_accuracy", "as_it_arrives") for r in ended)
    after = Stat.of(_get(r.summary, "unseen_accuracy", "after_training") for r in ended)
    if arrives:
        say(f"Unseen clients: {percent(arrives)} % with the global expert as it arrives"
            + (f", {percent(after)} % after training." if after else "."))
    for text in _depth_findings(ended):
        say(text)
    for run in runs:
        lost = [v for v in run.visits if v.get("status") not in ("ok", None)]
        if lost:
            reasons = sorted({str(v["reason"]) for v in lost if v.get("reason")})
            say(f"{run.method}, seed {run.seed}: {len(lost)} of {len(run.visits)} visits did not train"
                + (f" ({'; '.join(reasons)})." if reasons else "."), "bad")
        for note in (_get(run.summary, "notes") or []):
            say((f"Seed {run.seed}: {note}" if len({r.seed for r in runs}) > 1 else note[:1].upper() + note[1:]) + ".")
        for note in run.notes:
            say(f"{run.path.name}: {note}.", "bad")
    for note in notes:
        say(note, "bad")
    if differing := _differing(runs):
        say("The runs differ in more than method and seed: " + ", ".join(differing) + ".", "bad")
    return found


def _gate_findings(ended: Sequence[RunRecords]) -> Iterable[tuple[str, str]]:
    gated = [r for r in ended if _get(r.summary, "gate")]
    if not gated:
        return
    gate = {name: Stat.of(_get(r.summary, "gate", name) for r in gated)
            for name in ("mean", "std_clients", "std_samples", "entropy")}
    collapsed = [r for r in gated if _get(r.summary, "gate", "collapsed")]
    numbers = [f"mean weight on the local expert {gate['mean'].mean:.2f}"] if gate["mean"] else []
    if gate["std_clients"] and gate["std_samples"]:
        numbers.append(f"standard deviation {gate['std_clients'].mean:.2f} over clients and "
                       f"{gate['std_samples'].mean:.2f} over a client's samples")
    if gate["entropy"]:
        numbers.append(f"entropy {gate['entropy'].mean:.2f} of at most 0.69 nats")
    if collapsed:
        side = "local" if statistics.fmean(_get(r.summary, "gate", "mean") for r in collapsed) > 0.5 else "global"
        which = "" if len(collapsed) == len(gated) else f" in {len(collapsed)} of {len(gated)} seeds"
        yield f"The gate collapsed onto the {side} expert{which}: {', '.join(numbers)}.", "bad"
    elif gate["std_clients"] and gate["std_samples"] and max(gate["std_clients"].mean,
                                                             gate["std_samples"].mean) < GATE_CONSTANT:
        yield f"The gate acts as one constant weight, whatever the client or sample: {', '.join(numbers)}.", "plain"
    else:
        yield f"The gate did not collapse: {', '.join(numbers)}.", "good"
    gain = Stat.of(_client_gap(r, "mixture", "half") for r in gated)
    half = Stat.of(_client_mean(r, "half") for r in gated)
    if gain and half:
        text = f"A fixed half-and-half mix of the same experts scores {percent(half)} %, the learned gate "
        if _is_zero(gain.mean) and not gain.std:
            text += "the same"
        elif gain.std is None:
            text += (f"{_points(gain.mean)} {'more' if gain.mean > 0 else 'less'} "
                     "(one seed, so no spread to judge it by)")
        else:
            verdict = "not clearly different" if gain.may_be_zero else "clearly different"
            text += f"{_signed(gain.mean)} ± {100 * gain.std:.1f} points, {verdict} over {gain.n} seeds"
        if oracle := Stat.of(_client_mean(r, "oracle") for r in gated):
            text += f". Picking a right expert for every sample that has one would score {percent(oracle)} %"
        clear = gain.std is not None and not gain.may_be_zero
        yield text + ".", "plain" if not clear else "good" if gain.mean > 0 else "bad"


def _depth_findings(ended: Sequence[RunRecords]) -> Iterable[str]:
    """Where activation ended, and the trained share that belongs to it; runs that agree share a sentence."""
    seeds: dict[str, list[str]] = defaultdict(list)
    for run in ended:
        depths = [(_stage(stage), depth) for stage in ("stage1", "stage2")
                  if (depth := _get(run.summary, "final_depth", stage)) is not None]
        if depths and (share := run.summary.get("trainable_percent")) is not None:
            (first, depth), *rest = depths
            text = f"{first} ended at depth {depth}" + "".join(f", {stage} at depth {d}" for stage, d in rest)
            seeds[f"{text}; no visit trained more than {share:.2f} % of the foundation model's number of parameters"
                  ].append(str(run.seed))
    for text, which in seeds.items():
        yield (f"Seed {', '.join(which)}: {text}." if len(seeds) > 1 else f"{text[0].upper()}{text[1:]}.")


def _how_far(run: RunRecords) -> str:
    if run.rounds:
        last = run.rounds[-1]
        return f"the last round recorded is {_stage(last['stage'])}, round {last['round']}"
    return f"no round was completed, {len(run.visits)} visits are recorded"


def _setting(runs: Sequence[RunRecords]) -> str:
    config = runs[0].config
    seeds = sorted({r.seed for r in runs})
    partition = config["data"]["partition"]
    if partition == "dirichlet":
        partition += f" ({config['data']['alpha']:g})"
    return (f"{config['clients']['count']} clients, {partition} partition, LoRA rank {config['lora']['rank']}, "
            f"{config['model']['head']} head, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")


def _cards(runs: Sequence[RunRecords]) -> list[dict[str, str]]:
    ended = [r for r in runs if r.summary]

    def stat(*keys: str) -> Optional[Stat]:
        return Stat.of(_get(r.summary, *keys) for r in ended)

    cards = [
        ("personalised accuracy", stat("personalised_accuracy", "mean"), lambda s: f"{percent(s)} %"),
        ("worst 10 % of clients", stat("personalised_accuracy", "worst10"), lambda s: f"{percent(s)} %"),
        ("global test", stat("global_test_accuracy"), lambda s: f"{percent(s)} %"),
        ("weight on local expert", stat("gate", "mean"), lambda s: f"{s.mean:.2f}"),
        ("parameters trained", stat("trainable_percent"), lambda s: f"{s.mean:.2f} %"),
        ("sent by clients", stat("bytes_up"), lambda s: size(s.mean)),
        ("time", stat("seconds"), lambda s: duration(s.mean)),
        ("peak memory", stat("peak_memory_bytes"), lambda s: size(s.mean)),
    ]
    return [{"name": name, "value": show(value)} for name, value, show in cards if value]


def percent(value: Stat | float | None, digits: int = 1) -> str:
    """A fraction as percent without the sign, with the spread over seeds where there is one."""
    if value is None:
        return "–"
    if not isinstance(value, Stat):
        return f"{100 * value:.{digits}f}"
    spread = f" ± {100 * value.std:.{digits}f}" if value.std is not None else ""
    return f"{100 * value.mean:.{digits}f}{spread}"


def size(value: Optional[float]) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: Optional[float]) -> str:
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _points(gap: float) -> str:
    return f"{abs(100 * gap):.1f} points"


def _signed(gap: float) -> str:
    return f"{100 * gap:+.1f}".replace("-", "−")


def _is_zero(gap: float) -> bool:
    """Whether a gap shows as 0.0 points."""
    return abs(gap) < 0.0005


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _stage(stage: str) -> str:
    return stage.replace("stage", "stage ")


# Numbers behind the words and pictures

def _rank(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def _get(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _seen(run: RunRecords) -> list[dict[str, Any]]:
    return [c for c in run.clients if not c.get("unseen")]


def _client_values(run: RunRecords, name: str) -> list[float]:
    return [v for c in _seen(run) if (v := _get(c, "accuracy", name)) is not None]


def _client_mean(run: RunRecords, name: str) -> Optional[float]:
    values = _client_values(run, name)
    return statistics.fmean(values) if values else None


def _client_gap(run: RunRecords, name: str, other: str) -> Optional[float]:
    """Mean over the clients that have both accuracies of the first minus the second."""
    gaps = [a - b for c in _seen(run) if (a := _get(c, "accuracy", name)) is not None
            and (b := _get(c, "accuracy", other)) is not None]
    return statistics.fmean(gaps) if gaps else None


def _local_only(run: RunRecords, runs: Iterable[RunRecords]) -> dict[int, float]:
    """Accuracy of the ``local`` method by client in the run of the same seed; empty if there is none."""
    for other in runs:
        if other.method == "local" and other.seed == run.seed and other.clients:
            return {c["id"]: c["accuracy"]["personalised"] for c in _seen(other)
                    if _get(c, "accuracy", "personalised") is not None}
    return {}


def _below_local(run: RunRecords, runs: Iterable[RunRecords]) -> Optional[float]:
    alone = _local_only(run, runs)
    pairs = [(_get(c, "accuracy", "personalised"), alone.get(c["id"])) for c in _seen(run)]
    pairs = [(own, other) for own, other in pairs if own is not None and other is not None]
    return statistics.fmean(own < other for own, other in pairs) if pairs and run.method != "local" else None


def _paired_gap(ours: Sequence[RunRecords], theirs: Sequence[RunRecords]) -> Optional[Stat]:
    other = {r.seed: _get(r.summary, "personalised_accuracy", "mean") for r in theirs}
    gaps = [own - other[r.seed] for r in ours
            if (own := _get(r.summary, "personalised_accuracy", "mean")) is not None and other.get(r.seed) is not None]
    return Stat.of(gaps)


def _differing(runs: Sequence[RunRecords]) -> list[str]:
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        return {f"{t}.{k}": v for t, keys in config.items() if isinstance(keys, dict) for k, v in keys.items()}

    configs = [flat(r.config) for r in runs]
    keys = sorted({k for c in configs for k in c} - {"run.method", "run.seed"})
    return [k for k in keys if any(c.get(k) != configs[0].get(k) for c in configs)]


def _clients_by_method(runs: Sequence[RunRecords]) -> Optional[dict[str, Any]]:
    """Personalised accuracy of each client under each method, mean over seeds."""
    methods = {m: group for m, group in by_method(runs).items() if any(r.clients for r in group)}
    if len(methods) < 2:
        return None
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    about: dict[int, dict[str, Any]] = {}
    for method, group in methods.items():
        for run in group:
            for client in _seen(run):
                about.setdefault(client["id"], client)
                if (v := _get(client, "accuracy", "personalised")) is not None:
                    values[client["id"]][method].append(v)
    rows = []
    for client in sorted(values):
        means = {m: statistics.fmean(v) for m, v in values[client].items()}
        best = max(means.values())
        rows.append({"id": client, "group": about[client].get("group") or "–", "n_train": about[client].get("n_train"),
                     "cells": [{"text": percent(means.get(m)), "best": means.get(m) == best} for m in methods]})
    return {"methods": list(methods), "rows": rows}


def _client_details(run: RunRecords) -> dict[str, Any]:
    names = [n for n in ("personalised", "mixture", "global", "local", "zero_shot", "half", "oracle")
             if any(_get(c, "accuracy", n) is not None for c in run.clients)]
    gated = any(c.get("gate_mean") is not None for c in run.clients)
    return {"title": f"{run.method}, seed {run.seed}", "names": names, "gated": gated,
            "rows": sorted(run.clients, key=lambda c: c["id"])}


# Pictures

@dataclass(frozen=True)
class _Curve:
    """One line of a picture: its label, colour, and values over seeds by position on the axis."""

    label: str
    colour: str
    xs: Sequence[float]
    ys: list[list[float]]

    @property
    def means(self) -> list[float]:
        return [statistics.fmean(y) for y in self.ys]


def _first_stage_rounds(runs: Iterable[RunRecords]) -> int:
    return max((r["round"] for run in runs for r in run.rounds if r["stage"] == "stage1"), default=0)


def _curves(runs: Sequence[RunRecords], value: Callable[[RunRecords], list[Optional[float]]]) -> list[_Curve]:
    """One curve a method; ``value`` gives a number for each recorded round. Methods that coincide share a curve."""
    offset = _first_stage_rounds(runs)
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
        new = _Curve(method, method_colour(method), xs, [points[x] for x in xs])
        twin = next((i for i, c in enumerate(curves) if c.xs == new.xs and c.ys == new.ys), None)
        if twin is None:
            curves.append(new)
        else:
            old = curves[twin]
            colour = new.colour if method == "fedms" else old.colour
            curves[twin] = _Curve(f"{old.label}, {method}", colour, old.xs, old.ys)
    return curves


def method_colour(method: str) -> str:
    """The colour of a method, the same in every picture and page."""
    return METHOD_COLOURS.get(method) or _OTHER_METHODS[sum(method.encode()) % len(_OTHER_METHODS)]


def accuracy_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Validation accuracy per round over both stages, one line a method, the range over seeds shaded."""
    curves = _curves(runs, lambda run: [r.get("validation_accuracy") for r in run.rounds])
    if not curves:
        return None
    figure, axes = _axes(_WIDE, 3.3)
    first = _first_stage_rounds(runs)
    for curve in curves:
        # Stage 2 measures another model, so its line starts anew.
        for piece in (_part(curve, lambda x: x <= first), _part(curve, lambda x: x > first)):
            lows, highs = [min(y) for y in piece.ys], [max(y) for y in piece.ys]
            if lows != highs:
                axes.fill_between(piece.xs, lows, highs, color=curve.colour, alpha=0.13, linewidth=0)
            axes.plot(piece.xs, piece.means, color=curve.colour, linewidth=2.4 if _has_fedms(curve) else 1.7,
                      marker="o", markersize=4, markeredgecolor=SURFACE, markeredgewidth=0.8)
    _percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy (%)")
    _round_axis(axes, runs)
    _end_labels(axes, curves)
    return figure


def clock_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Validation accuracy over the simulated clock of the clients' devices, one line a method; None without clocks.

    Over seeds both coordinates of a round are averaged.
    """
    curves = []
    first = _first_stage_rounds(runs)
    for method, group in by_method(runs).items():
        points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for run in group:
            clock = 0.0
            for record in run.rounds:
                clock += record.get("simulated_seconds") or 0.0
                if record.get("simulated_seconds") is not None and record.get("validation_accuracy") is not None:
                    position = record["round"] + (first if record["stage"] == "stage2" else 0)
                    points[position].append((clock, record["validation_accuracy"]))
        if points:
            positions = sorted(points)
            curves.append((positions, _Curve(method, method_colour(method),
                                             [statistics.fmean(x for x, _ in points[p]) for p in positions],
                                             [[y for _, y in points[p]] for p in positions])))
    if not curves:
        return None
    longest = max(curve.xs[-1] for _, curve in curves)
    unit, scale = ("h", 3600) if longest >= 2 * 3600 else ("min", 60) if longest >= 120 else ("s", 1)
    figure, axes = _axes(_WIDE, 3.3)
    for positions, curve in curves:
        # Stage 2 measures another model, so its line starts anew.
        split = sum(position <= first for position in positions)
        for piece in (slice(split), slice(split, None)):
            axes.plot([x / scale for x in curve.xs[piece]], curve.means[piece], color=curve.colour, marker="o",
                      linewidth=2.4 if _has_fedms(curve) else 1.7, markersize=4, markeredgecolor=SURFACE,
                      markeredgewidth=0.8)
    _percent_axis(axes.yaxis)
    axes.set_ylabel("validation accuracy (%)")
    axes.set_xlabel(f"time on the clients' devices, simulated ({unit})")
    axes.set_xlim(0, longest / scale)
    _end_labels(axes, [_Curve(c.label, c.colour, [x / scale for x in c.xs], c.ys) for _, c in curves])
    return figure


def depth_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Active blocks per round."""
    curves = _curves(runs, lambda run: [r.get("depth") for r in run.rounds])
    if not curves:
        return None
    figure, axes = _axes(_HALF, 2.9)
    for curve in curves:
        axes.plot(curve.xs, curve.means, color=curve.colour, linewidth=1.9, drawstyle="steps-mid", marker="o",
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
    curves = [_Curve(c.label, c.colour, c.xs, [[v / scale for v in y] for y in c.ys]) for c in curves]
    figure, axes = _axes(_HALF, 2.9)
    for curve in curves:
        axes.plot(curve.xs, curve.means, color=curve.colour, linewidth=1.9, marker="o", markersize=3.5,
                  markeredgecolor=SURFACE, markeredgewidth=0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"sent by clients so far ({unit})")
    _round_axis(axes, runs)
    _end_labels(axes, curves)
    return figure


def clients_figure(runs: Sequence[RunRecords]) -> Optional[Figure]:
    """Personalised test accuracy of every client, one row a method, with mean and worst 10 %."""
    rows = []
    if zero := [v for r in {r.seed: r for r in runs}.values() if (v := _client_values(r, "zero_shot"))]:
        rows.append(("zero-shot", MUTED, zero))
    for method, group in by_method(runs).items():
        if values := [v for r in group if (v := _client_values(r, "personalised"))]:
            rows.append((method, method_colour(method), values))
    if not rows:
        return None
    figure, axes = _axes(_WIDE, 0.75 + 0.4 * len(rows))
    for y, (method, colour, values) in enumerate(rows):
        # Over seeds as in the table: of each seed first, then their mean.
        mean, worst = statistics.fmean(map(statistics.fmean, values)), statistics.fmean(map(worst_tenth, values))
        dots = [v for seed in values for v in seed]
        axes.scatter(dots, [y] * len(dots), s=42, color=colour, alpha=0.32, linewidths=0, zorder=2)
        axes.plot([mean, mean], [y - 0.32, y + 0.32], color=colour, linewidth=3, solid_capstyle="butt", zorder=3)
        axes.plot([worst], [y], marker="|", color=colour, markersize=12, markeredgewidth=1.4, zorder=3)
        axes.annotate(f"{100 * mean:.1f}", (mean, y - 0.32), (0, 1.5), textcoords="offset points", ha="center",
                      va="bottom", color=colour, fontsize=9, fontweight="bold")
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
    clients = sorted({(str(c.get("group") or ""), c["id"]) for r in gated for c in _seen(r)
                      if c.get("gate_mean") is not None})
    if not clients:
        return None
    groups = sorted({g for g, _ in clients})
    figure, axes = _axes(_HALF, 1.15 + 0.21 * max(12, len(clients)))
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    place = {client: y for y, (_, client) in enumerate(clients)}
    width = 0.5 / len(gated)
    for number, run in enumerate(gated):
        for client in _seen(run):
            mean = client.get("gate_mean")
            if mean is None:
                continue
            y = place[client["id"]] + (number - (len(gated) - 1) / 2) * width
            colour = _group_colour(groups, client.get("group"))
            spread = client.get("gate_std") or 0
            axes.plot([max(0, mean - spread), min(1, mean + spread)], [y, y], color=colour, alpha=0.4,
                      linewidth=4 if len(gated) == 1 else 2.5, solid_capstyle="round", zorder=2)
            axes.plot([mean], [y], marker="o", color=colour, markersize=6 if len(gated) == 1 else 4,
                      markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3)
    axes.set_yticks(range(len(clients)), [f"{g or 'client'} {i}" for g, i in clients])
    for label, (group, _) in zip(axes.get_yticklabels(), clients):
        label.set_color(_group_colour(groups, group))
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
    points, compared = [], any(_local_only(r, runs) for r in focus)
    for run in focus:
        alone = _local_only(run, runs)
        for client in _seen(run):
            x = alone.get(client["id"]) if compared else _get(client, "accuracy", "local")
            y = _get(client, "accuracy", "personalised")
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
                     color=_group_colour(groups, group), edgecolors=SURFACE, zorder=3, label=group)
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


_FIGURES: tuple[tuple[str, Callable[..., Any], str, str, str], ...] = (
    ("clients", clients_figure, "Personalised test accuracy",
     "One dot a client and seed; the bar with the number is the mean, the thin tick the mean of the worst 10 % of "
     "clients.", "wide"),
    ("accuracy", accuracy_figure, "Validation accuracy per round",
     "Mean over clients, weighted by their validation samples. local, and fedavg_ft and fedms in stage 2: each "
     "client's own model after its visit; otherwise the shared model as clients receive it (fedavg_prior: before its "
     "prior). Lines that coincide share a label or lie on each other. Shaded: range over seeds.", "wide"),
    ("clock", clock_figure, "Validation accuracy over simulated time",
     "As above, over the time that the rounds would take on the clients' devices: each round lasts as long as its "
     "slowest client computes, sends and receives. Mean over seeds.", "wide"),
    ("depth", depth_figure, "Depth", "Blocks whose LoRA pairs are trained, mean over seeds. Each stage activates anew.",
     "half"),
    ("bytes", bytes_figure, "Communication", "Bytes sent by all clients, summed over rounds, mean over seeds.", "half"),
    ("gate", gate_figure, "Gate weight by client",
     "Dot: mean over a client's test samples, one a seed; bar: one standard deviation over them.", "half"),
    ("gain", gain_figure, "Against local-only",
     "One dot a client and seed; above the diagonal the client is better off.", "half"),
)


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


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}" if -1e-9 <= v <= 1 + 1e-9 else ""))


def _round_axis(axes: Any, runs: Sequence[RunRecords]) -> None:
    """Rounds counted within their stage, a line between the stages."""
    first = _first_stage_rounds(runs)
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


def _part(curve: _Curve, inside: Callable[[int], bool]) -> _Curve:
    chosen = [(x, y) for x, y in zip(curve.xs, curve.ys) if inside(x)]
    return _Curve(curve.label, curve.colour, [x for x, _ in chosen], [y for _, y in chosen])


def _has_fedms(curve: _Curve) -> bool:
    return "fedms" in curve.label.split(", ")


def _end_labels(axes: Any, curves: Sequence[_Curve]) -> None:
    """Names at the right of the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    line = 11.5 * (high - low) / (axes.figure.get_figheight() * 72 * 0.75)
    order = sorted(curves, key=lambda c: c.means[-1])
    labels = [curve.label.replace(", ", ",\n") for curve in order]
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
        if curve.xs[-1] < last:
            bend = right - 0.03 * (right - axes.get_xlim()[0])
            axes.plot([curve.xs[-1], bend, right], [curve.means[-1], curve.means[-1], place - shift], linewidth=0.8,
                      color=curve.colour, linestyle=(0, (1, 2)), clip_on=False)
        axes.annotate(label, (right, place - shift), (4, 0), textcoords="offset points", va="center",
                      color=curve.colour, fontsize=9, annotation_clip=False,
                      fontweight="bold" if _has_fedms(curve) else "normal")


def _group_colour(groups: Sequence[str], group: Any) -> str:
    name = str(group or "")
    return GROUP_COLOURS[groups.index(name) % len(GROUP_COLOURS)] if name in groups else MUTED


# From pictures to the page

def _css_name(colour_or_method: str) -> str:
    return "c" + (colour_or_method if colour_or_method.startswith("#") else method_colour(colour_or_method))[1:]


def _css_colours() -> list[tuple[str, str, str]]:
    return [(_css_name(light), light, dark) for light, dark in DARK.items()]


@contextlib.contextmanager
def _plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's settings; and a dollar sign in a name starts no formula."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        yield


def _svg(figure: Any, name: str) -> str:
    """Inline SVG with text kept as text and every colour a CSS variable, so that it follows the page's theme."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(font: [^;\"]*?)'[^;\"]*", r"\1var(--font)", svg)
    return re.sub("|".join(DARK), lambda match: f"var(--{_css_name(match[0])})", svg)


def _write(path: Path, text: str) -> None:
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from error
