"""The page: one self-contained HTML file."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from pydantic import BaseModel, TypeAdapter

from fedms.foreign import conform, parse_json, read_regular
from fedms.report.figures import FIGURES, GRID, INK, MUTED, SURFACE, as_svg, method_color, plain_style
from fedms.report.numbers import (Stat, by_method, comparison, differing_keys, field_of, focus_method, participants,
                                  read_runs)
from fedms.report.significance import differences
from fedms.report.tables import table, write_text
from fedms.report.wording import duration, findings, headline, interval, p_value, percent, signed, size, statements
from fedms.storage.records import CONFIG, SAMPLES, RunRecords

TEMPLATES = Path(__file__).parent

# Light colors are what the figures are drawn in; in the page each becomes a CSS variable with this dark twin.
DARK = {INK: "#e6e9ef", MUTED: "#98a2b3", GRID: "#2b3442", SURFACE: "#161b24", "#c2410c": "#fb8c3c",
        "#1d4ed8": "#6ea8fe", "#0f766e": "#2dd4bf", "#7c3aed": "#b197fc", "#5b6b80": "#a3b1c6", "#be185d": "#f472b6",
        "#4d7c0f": "#a3e635", "#0369a1": "#38bdf8", "#a16207": "#facc15", "#0e7490": "#22d3ee", "#b45309": "#fbbf24",
        "#6d28d9": "#c4b5fd", "#15803d": "#4ade80", "#be123c": "#fb7185", "#475569": "#cbd5e1", "#86198f": "#e879f9",
        "#1e6091": "#7dd3fc", "#7f1d1d": "#fca5a5"}


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
    from markupsafe import Markup

    methods = by_method(runs)
    focus = focus_method(methods)
    focus_runs = methods[focus]
    figures = []
    for name, make, title, caption, width in FIGURES:
        with plain_style():
            if (figure := make(runs)) is not None:
                figures.append({"title": title, "caption": caption, "width": width, "svg": Markup(_svg(figure, name))})
    header, cells = table(comparison(runs))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    config = focus_runs[0].config
    outcome, _, more = headline(runs).partition(". ")
    return environment.get_template("report.html.j2").render(
        title=f"{config['model']['id']} on {config['data']['name']}",
        setting=_setting(runs), headline=outcome.rstrip(".") + ".", lead=more, privacy=statements(runs), findings=findings(runs, notes),
        tests=differences(runs), cards=_cards(focus_runs),
        focus=focus, several=len(methods) > 1, header=header, rows=cells, figures=figures, colors=_css_colors(),
        method_class=_css_name,
        grouped=any(c.get("group") for r in runs for c in r.clients), clients_by_method=_clients_by_method(runs),
        samples=[{"title": f"{r.method}, seed {r.seed}", "rows": found} for r in runs if (found := _samples(r.path))],
        details=[_client_details(r) for r in runs if r.clients],
        rounds=[{"title": f"{r.method}, seed {r.seed}", "rows": r.rounds} for r in runs if r.rounds],
        config=(focus_runs[0].path / CONFIG).read_text(encoding="utf-8"), differing=differing_keys(runs),
        percent=percent, signed=signed, interval=interval, p_value=p_value, size=size, duration=duration,
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
        return Stat.of(field_of(r.summary, *keys) for r in ended)

    cards = [
        ("perplexity", stat("language", "perplexity"), lambda s: f"{s.mean:.2f}"),
        ("perplexity of zero-shot", stat("language", "perplexity_zero_shot"), lambda s: f"{s.mean:.2f}"),
        ("personalized accuracy", stat("personalized_accuracy", "mean"), lambda s: f"{percent(s)} %"),
        ("worst 10 % of clients", stat("personalized_accuracy", "worst10"), lambda s: f"{percent(s)} %"),
        ("global test", stat("global_test_accuracy"), lambda s: f"{percent(s)} %"),
        ("weight on local expert", stat("gate", "mean"), lambda s: f"{s.mean:.2f}"),
        ("parameters trained", stat("trainable_percent"), lambda s: f"{s.mean:.2f} %"),
        ("sent by clients", stat("bytes_up"), lambda s: size(s.mean)),
        ("time", stat("seconds"), lambda s: duration(s.mean)),
        ("peak memory", stat("peak_memory_bytes"), lambda s: size(s.mean)),
    ]
    return [{"name": name, "value": show(value)} for name, value, show in cards if value]


def _clients_by_method(runs: Sequence[RunRecords]) -> Optional[dict[str, Any]]:
    """Return the personalized accuracy of each client by method, as a mean over seeds."""
    methods = {m: group for m, group in by_method(runs).items() if any(r.clients for r in group)}
    if len(methods) < 2:
        return None
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    about: dict[int, dict[str, Any]] = {}
    for method, group in methods.items():
        for run in group:
            for client in participants(run):
                about.setdefault(client["id"], client)
                if (v := field_of(client, "accuracy", "personalized")) is not None:
                    values[client["id"]][method].append(v)
    rows = []
    for number in sorted(values):
        means = {m: statistics.fmean(v) for m, v in values[number].items()}
        best = max(means.values())
        rows.append({"id": number, "group": about[number].get("group") or "–", "n_train": about[number].get("n_train"),
                     "cells": [{"text": percent(means.get(m)), "best": means.get(m) == best} for m in methods]})
    return {"methods": list(methods), "rows": rows}


def _client_details(run: RunRecords) -> dict[str, Any]:
    names = [n for n in ("personalized", "mixture", "global", "local", "zero_shot", "half", "oracle")
             if any(field_of(c, "accuracy", n) is not None for c in run.clients)]
    gated = any(c.get("gate_mean") is not None for c in run.clients)
    return {"title": f"{run.method}, seed {run.seed}", "names": names, "gated": gated,
            "rows": sorted(run.clients, key=lambda c: c["id"])}


def _css_name(color_or_method: str) -> str:
    return "c" + (color_or_method if color_or_method.startswith("#") else method_color(color_or_method))[1:]


def _css_colors() -> list[tuple[str, str, str]]:
    return [(_css_name(light), light, dark) for light, dark in DARK.items()]


def _svg(figure: Any, name: str) -> str:
    """Return a figure as inline SVG with every color a CSS variable, so that it follows the page's theme."""
    svg = as_svg(figure, name)
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(font: [^;\"]*?)'[^;\"]*", r"\1var(--font)", svg)
    return re.sub("|".join(DARK), lambda match: f"var(--{_css_name(match[0])})", svg)
