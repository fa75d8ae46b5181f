"""The page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from pydantic import BaseModel, TypeAdapter

from fedms.config.paths import bare_name
from fedms.foreign import conform, parse_json, read_regular
from fedms.report.cards import cost_cards, outcome_cards
from fedms.report.figures import CHARTS, GAIN, GRID, INK, LOSS, MUTED, SURFACE, as_svg, method_color, plain_style
from fedms.report.formats import duration, p_value, percent, size
from fedms.report.measures import Perplexity, measure_of
from fedms.report.numbers import by_method, comparison, differing_keys, field_of, focus_method, merit, participants, read_runs
from fedms.report.significance import differences
from fedms.report.tables import marked_table, write_text
from fedms.report.verdict import headline
from fedms.report.wording import findings, statements
from fedms.storage.records import CONFIG, SAMPLES, RunRecords

TEMPLATES = Path(__file__).parent

# Light colors are what the figures are drawn in; in the page each becomes a CSS variable with this dark twin.
DARK = {INK: "#e6e9ef", MUTED: "#98a2b3", GRID: "#2b3442", SURFACE: "#161b24", GAIN: "#4ade80", LOSS: "#ff8f85",
        "#c2410c": "#fb8c3c", "#1d4ed8": "#6ea8fe", "#0f766e": "#2dd4bf", "#7c3aed": "#b197fc", "#5b6b80": "#a3b1c6",
        "#be185d": "#f472b6", "#4d7c0f": "#a3e635", "#0369a1": "#38bdf8", "#a16207": "#facc15", "#0e7490": "#22d3ee",
        "#b45309": "#fbbf24", "#6d28d9": "#c4b5fd", "#15803d": "#4ade80", "#be123c": "#fb7185", "#475569": "#cbd5e1",
        "#86198f": "#e879f9", "#1e6091": "#7dd3fc", "#7f1d1d": "#fca5a5"}


def write_report(path: str | Path) -> Path:
    """Write `report.html` into a run folder or a folder of runs.

    Returns:
        Its path.

    Raises:
        RunFolderError: If there is no run, or the file cannot be written.
    """
    path = Path(path)
    runs, notes = read_runs(path)
    target = path / "report.html"
    write_text(target, render(runs, notes))
    return target


def render(runs: Sequence[RunRecords], notes: Iterable[str] = ()) -> str:
    """Return the page about some runs as HTML."""
    import jinja2

    methods = by_method(runs)
    focus = focus_method(methods)
    focus_runs = methods[focus]
    rows = comparison(runs)
    header, cells = marked_table(rows)
    outcome, _, more = headline(runs).partition(". ")
    config = focus_runs[0].config
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=" on ".join(map(bare_name, (config["model"]["id"], config["data"]["name"]))), colors=_css_colors(),
        script=script, script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        setting=_setting(runs), headline=outcome.rstrip(".") + ".", lead=more, privacy=statements(runs),
        findings=findings(runs, notes), cards=outcome_cards(focus, rows) if any(r.summary for r in focus_runs) else [],
        costs=cost_cards(focus_runs), focus=focus, methods=list(methods),
        clients=sorted({c["id"]: str(c.get("group") or "client") for r in runs for c in participants(r)}.items()),
        header=header, rows=cells, tests=differences(runs), charts=_charts(runs), method_class=_css_name,
        grouped=any(c.get("group") for r in runs for c in r.clients), clients_by_method=_clients_by_method(runs),
        samples=[{"title": _name(r), "rows": found} for r in runs if (found := _samples(r.path))],
        details=[_client_details(r) for r in runs if r.clients],
        rounds=[{"title": _name(r), "rows": r.rounds, "measure": measure_of([r])} for r in runs if r.rounds],
        provenance=_provenance(runs), config=(focus_runs[0].path / CONFIG).read_text(encoding="utf-8"),
        differing=differing_keys(runs),
        percent=percent, p_value=p_value, size=size, duration=duration, measure=measure_of(runs), merit=merit,
    )


class _Sample(BaseModel):
    """An entry of `samples.json`: what is asked, and what the data, the model before training, and the client answer."""

    client: int
    group: str | None
    prompt: str
    expected: str
    before: str
    after: str


_SAMPLES = TypeAdapter(list[_Sample])


def _samples(folder: Path) -> list[_Sample]:
    """Return what `fedms samples` wrote into a run folder; nothing if it did not, or the file is damaged."""
    try:
        return conform(_SAMPLES, parse_json(read_regular(folder / SAMPLES)))
    except (OSError, ValueError):
        return []


def _name(run: RunRecords) -> str:
    return f"{run.method}, seed {run.seed}"


def _setting(runs: Sequence[RunRecords]) -> str:
    config = runs[0].config
    seeds = sorted({r.seed for r in runs})
    partition = config["data"]["partition"]
    if partition == "dirichlet":
        partition += f" ({config['data']['alpha']:g})"
    head = "" if measure_of(runs) is Perplexity else f"{config['model']['head']} head, "     # a language model's own
    return (f"{config['clients']['count']} clients, {partition} partition, LoRA rank {config['lora']['rank']}, {head}"
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")


def _charts(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Draw the charts that these runs have data for, each with the views that they have data for."""
    from markupsafe import Markup

    found = []
    for chart in CHARTS:
        views = []
        for label, draw in chart.views.items():
            with plain_style():
                if (figure := draw(runs)) is not None:
                    described = f"{chart.title}{' over ' + label if label else ''}. {chart.caption}"
                    views.append({"label": label, "described": described,
                                  "svg": Markup(_svg(figure, f"{chart.name}-{label}"))})
        if views:
            found.append({"name": chart.name, "title": chart.title, "caption": chart.caption, "views": views})
    return found


def _clients_by_method(runs: Sequence[RunRecords]) -> Optional[dict[str, Any]]:
    """Return what each client reaches by method, as a mean over seeds."""
    methods = {m: group for m, group in by_method(runs).items() if any(r.clients for r in group)}
    if len(methods) < 2:
        return None
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    about: dict[int, dict[str, Any]] = {}
    for method, group in methods.items():
        for run in group:
            for client in participants(run):
                about.setdefault(client["id"], client)
                if (v := merit(client)) is not None:
                    values[client["id"]][method].append(v)
    measure, rows = measure_of(runs), []
    for number in sorted(values):
        means = {m: statistics.fmean(v) for m, v in values[number].items()}
        best = max(means.values())
        rows.append({"id": number, "group": about[number].get("group") or "–", "n_train": about[number].get("n_train"),
                     "cells": [{"text": measure.number(means.get(m)), "best": means.get(m) == best, "method": m} for m in methods]})
    return {"methods": list(methods), "rows": rows}


def _client_details(run: RunRecords) -> dict[str, Any]:
    names = [n for n in ("personalized", "mixture", "global", "local", "zero_shot", "half", "oracle")
             if any(field_of(c, "accuracy", n) is not None for c in run.clients)]
    gated = any(c.get("gate_mean") is not None for c in run.clients)
    titles = {"macro_f1": "macro F1 %", "auroc": "AUROC %", "calibration_error": "calibration error %"}
    scores = {name: title for name, title in titles.items() if any(c.get(name) is not None for c in run.clients)}
    return {"title": _name(run), "method": run.method, "names": names, "scores": scores, "gated": gated, "measure": measure_of([run]),
            "rows": sorted(run.clients, key=lambda c: c["id"])}


def _provenance(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Return what made the runs, each program on each machine once, with the names of the runs that it worked on."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for line in run.provenance:
            key = tuple(line.get(name) for name in ("version", "commit", "machine", "python", "torch", "command"))
            entry = found.setdefault(key, {**line, "runs": []})
            if _name(run) not in entry["runs"]:
                entry["runs"].append(_name(run))
    return list(found.values())


def _css_name(color_or_method: str) -> str:
    return "c" + (color_or_method if color_or_method.startswith("#") else method_color(color_or_method))[1:]


def _css_colors() -> list[tuple[str, str, str]]:
    return [(_css_name(light), light, dark) for light, dark in DARK.items()]


def _svg(figure: Any, name: str) -> str:
    """Return a figure as inline SVG that follows the page.

    Every color is a CSS variable, and what stands for a method or a client has its class, see
    :func:`fedms.report.figures.style.mark`.
    """
    svg = as_svg(figure, name)
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="((?:of|client)-[^"]*)"', r'<g class="\1"', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(font: [^;\"]*?)'[^;\"]*", r"\1var(--font)", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    return re.sub("|".join(DARK), lambda match: f"var(--{_css_name(match[0])})", svg)
