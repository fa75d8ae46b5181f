"""What the records of the study show: differences by seed, ranks, and what differences could have been found."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.study.plan import GATE, LABELS, Setting, StudyRun
from fedms.config import registry
from fedms.report.intervals import LEVEL, Interval, Ranks, average_ranks, by_seed
from fedms.report.numbers import OURS
from fedms.storage.records import RunRecords

StudyRecord = tuple[StudyRun, Mapping[str, Any]]
POWER = 0.8
GATED = ("fedms", GATE)      # what learns a gate, by its name in the records


def as_run(line: Mapping[str, Any]) -> RunRecords:
    """Return a record as reports read it, without its seconds: runs side by side slow each other down."""
    return RunRecords(Path(line["id"]), {"run": {"method": line["id"], "seed": line["seed"]}}, [], [],
                      list(line["clients"]), {**line, "seconds": None})


def gap_of(runs: Sequence[RunRecords], ours: str, theirs: str) -> Interval | None:
    """Return the difference of two methods' accuracies, paired by client and clustered by seed; None without pairs."""
    def scores(method: str) -> dict[tuple[int, int], float]:
        return {(run.seed, client["id"]): client["accuracy"]["personalized"] for run in runs if run.method == method
                for client in run.clients if not client["unseen"] and "personalized" in client["accuracy"]}

    first, second = scores(ours), scores(theirs)
    return by_seed({key: first[key] - second[key] for key in sorted(first.keys() & second.keys())})


def str_gap(gap: Interval) -> str:
    """Return a difference in points, with ~ before it where none is shown."""
    if math.isinf(gap.half):
        return f"{100 * gap.mean:+.1f} (one seed)"
    return f"{'~' if abs(gap.mean) <= gap.half else ''}{100 * gap.mean:+.1f} ± {100 * gap.half:.1f}"


def ranks_of(done: Sequence[StudyRecord]) -> Ranks | None:
    """Rank the methods that are planned for all settings in each setting and seed. A seed that lacks one of them is left out."""
    blocks: dict[tuple[str, int], dict[str, float]] = {}
    for run, line in done:
        if run.id in registry.methods() and run.id not in run.setting.more:
            blocks.setdefault((run.setting.name, line["seed"]), {})[run.id] = line["personalized_accuracy"]["mean"]
    most = max(map(len, blocks.values()), default=0)
    return average_ranks([block for block in blocks.values() if len(block) == most])


def gate_line(id: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Say what a gate does in the mean over seeds, what it gains over a fixed mix, and what it could have gained.

    Args:
        id: A method or an ablation.
        lines: Its lines in the records of one setting.
    """
    weight, entropy, half, oracle = (statistics.fmean(line["gate"][key] for line in lines) for key in (
        "mean", "entropy", "half_mix_accuracy", "oracle_accuracy"))
    return (f"- The gate of {name_of(id)} gives the local expert {100 * weight:.0f} % of the weight (entropy {entropy:.2f}, at most "
            f"{math.log(2):.2f}). Half and half of the same experts would have {100 * half:.1f} %: the gate is "
            f"{str_gap(_over(lines, _half(lines)))} points ahead of it. The right expert for each sample, which no gate can know, "
            f"would have {100 * oracle:.1f} %.")


def name_of(id: str) -> str:
    """Return what the page calls a method or an ablation."""
    return LABELS.get(id, f"`{id}`")


_Lines = Sequence[Mapping[str, Any]]


def _mean(line: Mapping[str, Any], kind: str) -> float:
    """Return the mean over clients that took part of one of the accuracies in a record."""
    return statistics.fmean(client["accuracy"][kind] for client in line["clients"] if not client["unseen"] and kind in client["accuracy"])


def _half(lines: _Lines) -> list[float]:
    return [line["gate"]["half_mix_accuracy"] for line in lines]


def _better_expert(lines: _Lines) -> list[float]:
    """Return the accuracy in each record of the expert, global or local, that is better in the mean over records."""
    return max(([_mean(line, kind) for line in lines] for kind in ("global", "local")), key=statistics.fmean)


def _over(lines: _Lines, others: Sequence[float]) -> Interval:
    found = by_seed({(line["seed"], 0): line["personalized_accuracy"]["mean"] - other for line, other in zip(lines, others)})
    assert found is not None
    return found


def findings_part(done: Sequence[StudyRecord]) -> list[str]:
    """Return what the page says first: where our methods stand, and where no difference is shown."""
    settings = {run.setting: [line for other, line in done if other.setting == run.setting] for run, _ in done}
    runs = {setting: [as_run(line) for line in lines if line["id"] in registry.methods()] for setting, lines in settings.items()}
    found = []
    if ranks := ranks_of(done):
        places = [f"{name} {rank:.1f}" for name, rank in ranks.mean.items()]
        found.append(f"- Average ranks over {ranks.blocks} settings and seeds: {', '.join(places)}. Ranks that are closer than "
                     f"{ranks.critical:.1f} are not shown to differ.")
    verdicts = {id: [gap.shows for setting in runs if (gap := _gap_to(id, _half)(settings[setting], runs[setting])) is not None
                     and not math.isinf(gap.half)] for id in GATED}
    if any(verdicts.values()):
        counts = [f"{name_of(id)} {each.count('better')} of {len(each)}, behind on {each.count('worse')}"
                  for id, each in verdicts.items() if each]
        found.append("- A learned gate should be ahead of half and half by the interval on two settings. It is ahead on: "
                     f"{'; '.join(counts)}.")
    standing = [part for ours in OURS for part in _standing(ours, runs)]
    return ["## What it shows", "\n".join(found), *standing, *_worth_of_mixing(settings, runs)] if found or standing else []


def _standing(ours: str, runs: Mapping[Setting, Sequence[RunRecords]]) -> list[str]:
    """Return a table of the methods that one of ours is ahead of, behind, and not shown to differ from, by setting."""
    rows = []
    for setting, each in runs.items():
        gaps = {m: gap for m in dict.fromkeys(run.method for run in each) if m != ours and (gap := gap_of(each, ours, m))}
        if any(not math.isinf(gap.half) for gap in gaps.values()):
            rows.append([setting.title, *(", ".join(m for m, gap in gaps.items() if gap.shows == verdict) or "–"
                                          for verdict in ("better", "worse", "no difference shown"))])
    header = ["setting", "ahead of", "behind", "no difference shown to"]
    return [f"Where `{ours}` stands, by the interval of seeds:", table(header, rows)] if rows else []


def _worth_of_mixing(settings: Mapping[Setting, _Lines], runs: Mapping[Setting, Sequence[RunRecords]]) -> list[str]:
    """Return a table of what mixing and gates are worth in each setting, without the columns that no record tells of."""
    columns: dict[str, Callable[[_Lines, Sequence[RunRecords]], Interval | None]] = {
        "`fedms` over `fedavg_ft`": _ft_gap,
        **{f"mixture of `{ours}` over its better expert": _gap_to(ours, _better_expert) for ours in OURS},
        **{f"gate of {name_of(id)} over half and half": _gap_to(id, _half) for id in GATED}}
    gaps = {title: {setting: gap(settings[setting], runs[setting]) for setting in runs} for title, gap in columns.items()}
    shown = [title for title, each in gaps.items() if any(each.values())]
    if not shown:
        return []
    rows = [[setting.title, *(str_gap(gap) if (gap := gaps[title][setting]) else "–" for title in shown)] for setting in runs]
    return ["What mixing is worth, in points: against `fedavg_ft`, which fine-tunes the same global expert and mixes nothing; against the "
            "better of the two experts; and the gate against half and half of the same experts.", table(["setting", *shown], rows)]


def table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, its columns after the first aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def _ft_gap(lines: _Lines, runs: Sequence[RunRecords]) -> Interval | None:
    return gap_of(runs, "fedms", "fedavg_ft")


def _gap_to(method: str, rival: Callable[[_Lines], list[float]]) -> Callable[[_Lines, Sequence[RunRecords]], Interval | None]:
    """Return a function of a setting's records that returns how far a mixture is ahead of what `rival` returns."""
    def gap(lines: _Lines, runs: Sequence[RunRecords]) -> Interval | None:
        own = [line for line in lines if line["id"] == method and line.get("gate")]
        return _over(own, rival(own)) if own else None
    return gap


def power_part(done: Sequence[StudyRecord]) -> list[str]:
    """Say which differences these seeds could have shown, from how much differences vary between them."""
    rows = []
    for setting in dict.fromkeys(run.setting for run, _ in done):
        runs = [as_run(line) for run, line in done if run.setting == setting and run.id in registry.methods()]
        gaps = [gap for m in dict.fromkeys(run.method for run in runs)
                if m != OURS[0] and (gap := gap_of(runs, OURS[0], m)) and gap.seeds > 2]
        if gaps:
            half, seeds = statistics.median(gap.half for gap in gaps), min(gap.seeds for gap in gaps)
            rows.append([setting.title, str(seeds), f"{100 * half:.1f}", f"{100 * half * detectable(seeds):.1f}"])
    if not rows:
        return []
    return [f"**What these seeds can show**, in points of difference to `{OURS[0]}`, median over methods: how far the interval reaches to "
            "either side, and the true difference that would have been found four times in five. Smaller ones need more seeds or more test "
            "samples: `SEEDS` in `bench/study/plan.py`.",
            table(["setting", "seeds", "interval", "difference found"], rows)]


def detectable(seeds: int) -> float:
    """Return the true difference that a paired t test finds with probability `POWER`, in half widths of its interval."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound = float(t.ppf((1 + LEVEL) / 2, seeds - 1))
    shift = brentq(lambda delta: nct.sf(bound, seeds - 1, delta) - POWER, 0.1, 20 * bound)
    return float(shift) / bound
