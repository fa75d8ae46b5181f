"""The outcome in words: the headline, the findings, and how numbers are written."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Optional

from fedms.foreign import few
from fedms.report.intervals import Interval
from fedms.report.numbers import (Stat, below_local, by_method, client_gap, client_mean, differing_keys, field_of,
                                  focus_method, idle_visits, learned_gate, paired_gap)
from fedms.storage.records import RunRecords

ONE_SEED = "One seed: a difference of a few points may be chance."
GATE_CONSTANT = 0.01  # a gate whose weights spread by less than this mixes as a constant would


def headline(runs: Sequence[RunRecords]) -> str:
    """Return the outcome in two or three sentences.

    They say the accuracy and the place of the method in focus, which method is best, how many points the others are apart, and
    whether that may be chance.
    """
    methods = by_method([r for r in runs if r.summary])
    scores = {m: Stat.of(field_of(r.summary, "personalized_accuracy", "mean") for r in group)
              for m, group in methods.items()}
    scores = {m: s for m, s in scores.items() if s}
    if not scores:
        shared = Stat.of(field_of(r.summary, "global_test_accuracy") for group in methods.values() for r in group)
        if shared is None:
            return "No run here has ended, so there is no outcome yet."
        return (f"The shared expert reaches {percent(shared)} % on the common test set. The clients' accuracies were not released: "
                "privacy.score_noise was off.")
    focus = focus_method(scores)
    own = scores[focus]
    text = f"{focus} reaches {percent(own)} % mean personalized accuracy"
    if perplexity := Stat.of(field_of(r.summary, "language", "perplexity") for r in methods[focus]):
        before = Stat.of(field_of(r.summary, "language", "perplexity_zero_shot") for r in methods[focus])
        text = (f"{focus} reaches a perplexity of {perplexity.mean:.1f}" + (f", zero-shot has {before.mean:.1f}" if before else "") +
                f"; {percent(own)} % of the tokens are the most probable ones")
    rivals = [m for m in scores if m != focus]
    if not rivals:
        gaps = {label: Stat.of(client_gap(r, "personalized", name) for r in methods[focus])
                for name, label in (("zero_shot", "zero-shot"), ("global", "its own global expert"))}
        parts = [f"{_points(gap.mean)} {'above' if gap.mean > 0 else 'below'} {label}"
                 for label, gap in gaps.items() if gap and not _is_zero(gap.mean)]
        single = len(methods[focus]) == 1
        return text + (", " + _listing(parts) if parts else "") + "." + (" " + ONE_SEED if single else "")
    best = max(rivals, key=lambda m: scores[m].mean)
    if len(rivals) > 1:
        place = 1 + sum(scores[m].mean > own.mean for m in rivals)
        text += f", {_ordinal(place)} of {len(scores)} methods"
        text += f"; {best} is best with {percent(scores[best])} %" if place > 1 else ""
    gaps = {m: paired_gap(methods[focus], methods[m]) or Stat(own.mean - scores[m].mean, None)  # no seed in common
            for m in rivals}
    groups: dict[str, list[str]] = {"behind ": [], "not clearly apart from ": [], "level with ": [], "ahead of ": []}
    for m in sorted(gaps, key=lambda m: gaps[m].mean):
        gap = gaps[m]
        if gap.may_be_zero:
            groups["not clearly apart from "].append(f"{m} ({signed(gap.mean)} ± {100 * gap.std:.1f})")
        elif _is_zero(gap.mean):
            groups["level with "].append(m)
        else:
            groups["ahead of " if gap.mean > 0 else "behind "].append(f"{m} ({signed(gap.mean)})")
    told = [words + _listing(_first(each, 2)) for words, each in groups.items() if each]
    single = any(gap.std is None for gap in gaps.values())
    return f"{text}. In points: {'; '.join(told)}." + (" " + ONE_SEED if single else "")


def statements(runs: Sequence[RunRecords]) -> list[str]:
    """What the runs guarantee their clients, each sentence once."""
    told = [field_of(r.summary, "privacy", "statement") for r in runs if r.summary]
    return list(dict.fromkeys(text for text in told if text))


def findings(runs: Sequence[RunRecords], notes: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return what a reader must not miss.

    Args:
        runs: The runs.
        notes: Notes on runs that could not be read.

    Returns:
        Findings as `{"kind": "good" | "bad" | "plain", "text": ...}`.
    """
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
    worst = Stat.of(field_of(r.summary, "personalized_accuracy", "worst10") for r in ended)
    if worst:
        say(f"On its worst 10 % of clients {focus} scores {percent(worst)} %.")
    below = Stat.of(below_local(r, runs) for r in ended)
    if below and focus != "local":
        share = f"{percent(below, 0)} % of the clients do" if below.mean > 0 else "No client does"
        say(f"{share} worse with {focus} than training alone.",
            "bad" if below.mean > 0.25 else "good" if below.mean == 0 else "plain")
    for text, kind in _gate_findings(ended):
        say(text, kind)
    arrives = Stat.of(field_of(r.summary, "unseen_accuracy", "as_it_arrives") for r in ended)
    after = Stat.of(field_of(r.summary, "unseen_accuracy", "after_training") for r in ended)
    if arrives:
        say(f"Unseen clients: {percent(arrives)} % with the global expert as it arrives"
            + (f", {percent(after)} % after training." if after else "."))
    for text in _depth_findings(ended):
        say(text)
    for run in runs:
        if idle := idle_visits(run):
            say(f"{run.method}, seed {run.seed}: {idle[0]} of {idle[1]} visits of stage 2 did not improve what the client had "
                "and were undone (stage2.keep = \"best\"): its validation loss is that of its visit before. A lower "
                "stage2.lr, a smaller stage2.batch or fewer rounds may help.", "bad")
    for run in runs:
        lost = [v for v in run.visits if v.get("status") not in ("ok", None)]
        if lost:
            reasons = sorted({str(v["reason"]) for v in lost if v.get("reason")})
            say(f"{run.method}, seed {run.seed}: {len(lost)} of {len(run.visits)} visits did not train"
                + (f" ({few(reasons, most=3)})." if reasons else "."), "bad")
        for note in (field_of(run.summary, "notes") or []):
            say((f"Seed {run.seed}: {note}" if len({r.seed for r in runs}) > 1 else note[:1].upper() + note[1:]) + ".")
        for note in run.notes:
            say(f"{run.path.name}: {note}.", "bad")
    for note in notes:
        say(note, "bad")
    if differing := differing_keys(runs):
        say("The runs differ in more than method and seed: " + ", ".join(differing) + ".", "bad")
    return found


def _gate_findings(ended: Sequence[RunRecords]) -> Iterable[tuple[str, str]]:
    mixed = [r for r in ended if field_of(r.summary, "gate")]
    if weight := Stat.of(field_of(r.summary, "gate", "mean") for r in mixed if not learned_gate(r)):
        yield f"No gate was trained; the mean weight on the local expert is {weight.mean:.2f}.", "plain"
    gated = [r for r in mixed if learned_gate(r)]
    if not gated:
        return
    gate = {name: Stat.of(field_of(r.summary, "gate", name) for r in gated)
            for name in ("mean", "std_clients", "std_samples", "entropy")}
    collapsed = [r for r in gated if field_of(r.summary, "gate", "collapsed")]
    numbers = [f"mean weight on the local expert {gate['mean'].mean:.2f}"] if gate["mean"] else []
    if gate["std_clients"] and gate["std_samples"]:
        numbers.append(f"standard deviation {gate['std_clients'].mean:.2f} over clients and "
                       f"{gate['std_samples'].mean:.2f} over a client's samples")
    if gate["entropy"]:
        numbers.append(f"entropy {gate['entropy'].mean:.2f} of at most 0.69 nats")
    if collapsed:
        side = "local" if statistics.fmean(field_of(r.summary, "gate", "mean") for r in collapsed) > 0.5 else "global"
        which = "" if len(collapsed) == len(gated) else f" in {len(collapsed)} of {len(gated)} seeds"
        yield f"The gate collapsed onto the {side} expert{which}: {', '.join(numbers)}.", "bad"
    elif gate["std_clients"] and gate["std_samples"] and max(gate["std_clients"].mean,
                                                             gate["std_samples"].mean) < GATE_CONSTANT:
        yield f"The gate acts as one constant weight, whatever the client or sample: {', '.join(numbers)}.", "plain"
    else:
        yield f"The gate did not collapse: {', '.join(numbers)}.", "good"
    gain = Stat.of(client_gap(r, "mixture", "half") for r in gated)
    half = Stat.of(client_mean(r, "half") for r in gated)
    if gain and half:
        text = f"A fixed half-and-half mix of the same experts scores {percent(half)} %, the learned gate "
        if _is_zero(gain.mean) and not gain.std:
            text += "the same"
        elif gain.std is None:
            text += (f"{_points(gain.mean)} {'more' if gain.mean > 0 else 'less'} "
                     "(one seed, so no spread to judge it by)")
        else:
            verdict = "not clearly different" if gain.may_be_zero else "clearly different"
            text += f"{signed(gain.mean)} ± {100 * gain.std:.1f} points, {verdict} over {gain.n} seeds"
        if oracle := Stat.of(client_mean(r, "oracle") for r in gated):
            text += f". Picking a right expert for every sample that has one would score {percent(oracle)} %"
        clear = gain.std is not None and not gain.may_be_zero
        yield text + ".", "plain" if not clear else "good" if gain.mean > 0 else "bad"


def _depth_findings(ended: Sequence[RunRecords]) -> Iterable[str]:
    """Say where activation ended, and which share of the parameters that is. Runs that agree share a sentence."""
    seeds: dict[str, list[str]] = defaultdict(list)
    for run in ended:
        depths = [(_stage(stage), depth) for stage in ("stage1", "stage2")
                  if (depth := field_of(run.summary, "final_depth", stage)) is not None]
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


def percent(value: Stat | float | None, digits: int = 1) -> str:
    """Return a fraction as percent without the sign, with the spread over seeds where there is one."""
    if value is None:
        return "–"
    if not isinstance(value, Stat):
        return f"{100 * value:.{digits}f}"
    spread = f" ± {100 * value.std:.{digits}f}" if value.std is not None else ""
    return f"{100 * value.mean:.{digits}f}{spread}"


def size(value: Optional[float]) -> str:
    """Return a number of bytes in decimal units."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: Optional[float]) -> str:
    """Return seconds in words, such as "3 min 05 s"; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _points(gap: float) -> str:
    return f"{abs(100 * gap):.1f} points"


def signed(gap: float) -> str:
    """Return a difference of shares in percentage points with its sign, such as "+0.2"."""
    return f"{100 * gap:+.1f}".replace("-", "−")


def interval(found: Interval) -> str:
    """Write half the width of an interval in points; a dash for a single seed, which has none."""
    return "–" if math.isinf(found.half) else f"± {100 * found.half:.1f}"


def p_value(p: float) -> str:
    """Return a p-value with two significant digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _is_zero(gap: float) -> bool:
    """Tell whether a gap shows as 0.0 points."""
    return abs(gap) < 0.0005


def _first(items: Sequence[str], count: int) -> list[str]:
    """Return the first items, and how many more there are; all of them where only one would be left out."""
    return list(items) if len(items) <= count + 1 else [*items[:count], f"{len(items) - count} more"]


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _stage(stage: str) -> str:
    return stage.replace("stage", "stage ")
