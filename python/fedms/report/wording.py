"""The findings in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fedms.foreign import few
from fedms.report.formats import is_zero, percent, points, signed
from fedms.report.measures import measure_of
from fedms.report.numbers import (Stat, below_local, by_method, client_gap, client_mean, differing_keys, field_of,
                                  focus_method, idle_visits, learned_gate)
from fedms.storage.records import RunRecords

GATE_CONSTANT = 0.01  # a gate whose weights spread by less than this mixes as a constant would


def statements(runs: Sequence[RunRecords]) -> list[str]:
    """Return what the runs guarantee their clients, each sentence once."""
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
    measure = measure_of(runs)
    worst = Stat.of(map(measure.of_worst, ended))
    if worst:
        say(f"On its worst 10 % of clients {focus} {measure.worst_clients.format(measure.value(worst))}.")
    below = Stat.of(below_local(r, runs) for r in ended)
    if below and focus != "local":
        share = f"{percent(below, 0)} % of the clients are" if below.mean > 0 else "No client is"
        say(f"{share} better off training alone than with {focus}.",
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
    for text, kind in _idle_findings(runs):
        say(text, kind)
    for run in runs:
        lost = [v for v in run.visits if v.get("status") not in ("ok", None)]
        if lost:
            reasons = sorted({str(v["reason"]) for v in lost if v.get("reason")})
            say(f"{run.method}, seed {run.seed}: {len(lost)} of {len(run.visits)} visits did not train"
                + (f" ({few(reasons, most=3)})." if reasons else "."), "bad")
        for note in run.notes:
            say(f"{run.path.name}: {note}.", "bad")
    for text in _own_notes(runs):
        say(text)
    for note in notes:
        say(note, "bad")
    if differing := differing_keys(runs):
        say("The runs differ in more than method and seed: " + ", ".join(differing) + ".", "bad")
    return found


def _own_notes(runs: Sequence[RunRecords]) -> Iterable[str]:
    """Yield what runs say of themselves, and of which seeds unless it is all."""
    seeds_of: dict[str, set[int]] = {}
    for run in runs:
        for note in (field_of(run.summary, "notes") or []):
            seeds_of.setdefault(note, set()).add(run.seed)
    for note, seeds in seeds_of.items():
        if seeds == {run.seed for run in runs}:
            yield f"{_sentence(note)}."
        else:
            yield f"{'Seed' if len(seeds) == 1 else 'Seeds'} {few(sorted(seeds))}: {note}."


def _idle_findings(runs: Sequence[RunRecords]) -> Iterable[tuple[str, str]]:
    """Yield one sentence on the visits of stage 2 that changed nothing; alarming if a run had more of these than of others."""
    idle = [(run, *visits) for run in runs if (visits := idle_visits(run))]
    if idle:
        each = few([f"{undone} of {total} with {run.method}, seed {run.seed}" for run, undone, total in idle], most=6)
        yield ("Visits of stage 2 that did not lower a client's validation loss were undone (stage2.keep = \"best\"): "
               f"{each}. A lower stage2.lr, a smaller stage2.batch or fewer rounds may help.",
               "bad" if any(2 * undone > total for _, undone, total in idle) else "plain")


def _gate_findings(ended: Sequence[RunRecords]) -> Iterable[tuple[str, str]]:
    mixed = [r for r in ended if field_of(r.summary, "gate")]
    if weight := Stat.of(field_of(r.summary, "gate", "mean") for r in mixed if not learned_gate(r)):
        yield f"No gate was trained; the weight of the local expert is {100 * weight.mean:.0f} % on average.", "plain"
    gated = [r for r in mixed if learned_gate(r)]
    if not gated:
        return
    gate = {name: Stat.of(field_of(r.summary, "gate", name) for r in gated)
            for name in ("mean", "std_clients", "std_samples")}
    collapsed = [r for r in gated if field_of(r.summary, "gate", "collapsed")]
    share = f"{100 * gate['mean'].mean:.0f} % local on average" if gate["mean"] else "its mean weight is unknown"
    spread = ""
    if gate["std_clients"] and gate["std_samples"]:
        spread = (f"; it differs by {100 * gate['std_clients'].mean:.0f} % between clients and by "
                  f"{100 * gate['std_samples'].mean:.0f} % between a client's samples (standard deviations)")
    if collapsed:
        side = "local" if statistics.fmean(field_of(r.summary, "gate", "mean") for r in collapsed) > 0.5 else "global"
        which = "" if len(collapsed) == len(gated) else f" in {len(collapsed)} of {len(gated)} seeds"
        yield f"The gate collapsed onto the {side} expert{which}: {share}{spread}. It hardly mixes any more.", "bad"
    elif gate["std_clients"] and gate["std_samples"] and max(gate["std_clients"].mean,
                                                             gate["std_samples"].mean) < GATE_CONSTANT:
        yield f"The gate acts as one constant weight, whatever the client or sample: {share}{spread}.", "plain"
    else:
        yield f"The gate still mixes: {share} (0 % is the global expert alone){spread}.", "good"
    gain = Stat.of(client_gap(r, "mixture", "half") for r in gated)
    half = Stat.of(client_mean(r, "half") for r in gated)
    if gain and half:
        text = f"A fixed half-and-half mix of the same experts scores {percent(half)} %, the learned gate "
        if is_zero(gain.mean) and not gain.std:
            text += "the same"
        elif gain.std is None:
            text += (f"{points(gain.mean)} {'more' if gain.mean > 0 else 'less'} "
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
        yield (f"Seed {', '.join(which)}: {text}." if len(seeds) > 1 else f"{_sentence(text)}.")


def _how_far(run: RunRecords) -> str:
    if run.rounds:
        last = run.rounds[-1]
        return f"the last round recorded is {_stage(last['stage'])}, round {last['round']}"
    return f"no round was completed, {len(run.visits)} visits are recorded"


def _stage(stage: str) -> str:
    return stage.replace("stage", "stage ")


def _sentence(note: str) -> str:
    """Return a note with a capital first letter, unless it begins with the name of a file, which is shown as it is."""
    return note if note.partition(" ")[0].endswith(":") else note[:1].upper() + note[1:]
