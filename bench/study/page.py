"""The page of the study, from its records: equal records give an equal page."""
from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.study.plan import ABLATED, ABLATIONS, COMMON, LABELS, PERSONALIZED, TUNED_ON, WITH_ALL_BLOCKS, Setting, StudyRun, tuning
from bench.study.records import key_of, read_records
from fedms import report
from fedms.config import registry
from fedms.errors import RunFolderError
from fedms.report.intervals import average_ranks, by_seed
from fedms.report.wording import p_value
from fedms.storage.durable import write_durably
from fedms.storage.records import RunRecords

CLAIM = """\
## The paper's claim

FedMS reports accuracy up to 55.25 % above its baselines (arXiv 2312.15926), its journal form FedFMSL up to 59.19 % (IEEE
TMC 2024), with models of CLIP's size and data that are not used here; of the papers only the abstracts were at hand. Those
figures are neither confirmed nor refuted by this page. What is compared is the method: the same two stages, mixture and
block-wise activation, on smaller models and on data that install without a hub. The largest margins of the row `fedms`
over another row here, by client and seed:
"""

READING = """\
Accuracies in %, mean ± standard deviation over seeds; each client counts the same. *Worst 10 %*: the mean of the worst
tenth of clients. *Below local*: the share of clients that would be better off alone. `fedms` is the method as defined,
`fedms_plus` with the pieces that `docs/method/fedms.md` explains. What a run costs lies in its training samples, what it says in
its test samples: so clients have more of the latter. Sentences cost several times what images do: they are cut to 32
tokens, which one in four exceeds, and have 6 + 3 rounds for 8 + 4. Cost is operations (TFLOP), not seconds: runs share the
machine. Differences are paired by client and averaged within a seed, in points, with a 95 % interval of the seeds' means, since
clients of one seed share an expert and a partition; where that interval holds 0 no difference is shown, marked by ~.

**What five seeds can show.** In the records of [the earlier laboratory](earlier_study.md) the difference of `fedms_plus` to other
personalized methods varied between seeds with a standard deviation of 0.6, 0.9, 1.3 and 1.7 points (median over methods;
Fashion-MNIST 0.1 and 0.5, sentiment by domain and by Dirichlet 0.3). With five seeds the interval reaches 1.24 times that to either
side, and a true difference of 1.7 times that, so of 1.1 to 2.9 points, is found four times in five. Smaller ones need more seeds:
`SEEDS` in `bench/study/plan.py`.
"""


def write_page(page: Path, planned: Sequence[StudyRun], records: Path) -> None:
    """Write the page, and its pictures into a folder of the page's name.

    Args:
        page: The file to write.
        planned: The runs of the study.
        records: The file with their records.

    Raises:
        RunFolderError: If the records are damaged, or a file cannot be written.
    """
    lines, folder = read_records(records), page.with_suffix("")
    text = render(planned, lines, str(records), folder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in _pictures(planned, lines).items():
            write_durably(folder / name, picture.encode())
        write_durably(page, text.encode())
    except OSError as error:
        raise RunFolderError(f"{page}: cannot be written: {error.strerror}") from error


def _pictures(planned: Sequence[StudyRun], lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a picture of each setting with records, by the name of its file: every client's accuracy, by method."""
    done, _ = _one_model(planned, {key_of(line): line for line in lines})
    found = {}
    with report.plain_style():
        for setting in dict.fromkeys(run.setting for run in planned):
            if figure := report.clients_figure([_as_run(line) for run, line in done
                                                if run.setting == setting and run.id in registry.methods()]):
                found[f"{setting.name}.svg"] = report.as_svg(figure, setting.name)
    return found


def render(planned: Sequence[StudyRun], lines: Sequence[Mapping[str, Any]], source: str, pictures: str) -> str:
    """Return the page as Markdown. Equal records give an equal page.

    Args:
        planned: The runs of the study.
        lines: Their records.
        source: The file of the records, as the page names it.
        pictures: The folder with a picture of each setting, as the page names it.
    """
    of_run = {key_of(line): line for line in lines}
    done, mixed = _one_model(planned, of_run)
    parts = ["# The study", f"{len(done)} of {len(planned)} runs are done. Made by `python -m bench.study --page-only` from `{source}`, "
             "one line a run with its command, commit, seed and every client's accuracy; `python -m bench.study` goes on where the "
             "records end.", READING]
    if left_out := len(lines) - len(done) - mixed:
        parts.append(f"{left_out} record{'s' * (left_out > 1)} of earlier settings "
                     f"{'are' if left_out > 1 else 'is'} left out.")
    if mixed:
        parts.append(f"{mixed} record{'s' * (mixed > 1)} with other weights of the pretrained model "
                     f"{'are' if mixed > 1 else 'is'} left out.")
    margins: list[tuple[float, str]] = []
    for setting in dict.fromkeys(run.setting for run in planned):
        here = [(run, line) for run, line in done if run.setting == setting and run.id in registry.methods()]
        missing = _missing([run for run in planned if run.setting == setting and run.id in registry.methods()], of_run)
        parts.append(f"## {setting.title}")
        parts += _setting_part(setting, here, margins) if here else ["No run is done yet."]
        if here:
            parts.append(f"![Personalized test accuracy of each client, by method]({pictures}/{setting.name}.svg)")
            parts.append("*One dot is a client and seed, the bar the mean, the tick the mean of the worst tenth.*")
            if missing:
                parts.append(f"Not run yet: {missing}.")
    parts += _ranks_part(done)
    parts += _all_blocks_part(done)
    parts += _ablation_part(done, planned, of_run)
    parts.append(CLAIM.rstrip())
    parts.append("\n".join(f"- {text}" for _, text in sorted(margins, reverse=True)[:4]) or "No two rows to compare yet.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


StudyRecord = tuple[StudyRun, Mapping[str, Any]]


def _one_model(planned: Sequence[StudyRun], of_run: Mapping[Any, Mapping[str, Any]]) -> tuple[list[StudyRecord], int]:
    """Return the runs with a record that were made with the same weights of the pretrained model.

    Pretraining on another machine may give other bits. In each setting the most frequent weights count.

    Returns:
        These runs with their records, and the number of runs that have other weights.
    """
    done = [(run, of_run[run.key]) for run in planned if run.key in of_run]
    found: dict[str, dict[str, int]] = {}
    for run, line in done:
        counts = found.setdefault(run.setting.name, {})
        counts[line["model_fingerprint"]] = counts.get(line["model_fingerprint"], 0) + 1
    usual = {name: max(counts, key=lambda f: (counts[f], f)) for name, counts in found.items()}
    kept = [(run, line) for run, line in done if line["model_fingerprint"] == usual[run.setting.name]]
    return kept, len(done) - len(kept)


def _missing(planned: Iterable[StudyRun], of_run: Mapping[Any, Any]) -> str:
    by_label: dict[str, list[str]] = {}
    for run in planned:
        if run.key not in of_run:
            by_label.setdefault(LABELS.get(run.id, run.id), []).append(str(run.config.run.seed))
    return "; ".join(f"{label} (seed {', '.join(seeds)})" for label, seeds in by_label.items())


def _setting_part(setting: Setting, done: Sequence[StudyRecord], margins: list[tuple[float, str]]) -> list[str]:
    runs = [_as_run(line) for _, line in done]
    rows = report.comparison(runs)
    header, cells = report.table(rows)
    seeds = [str(row["seeds"]) for row in rows]
    header, cells = [header[0], "seeds", *header[1:]], [[c[0], n, *c[1:]] for c, n in zip(cells, seeds)]
    parts = [_provenance(setting, done), _table(header, cells)]
    scores = {row["method"]: row["personalized"].mean for row in rows}
    sentences = []
    for ours in ("fedms", "fedms_plus"):
        best = max((m for m in PERSONALIZED if m in scores), key=scores.get, default=None)
        against = [m for m in ("fedavg", best, "local") if m in scores]
        if ours not in scores or not against:
            continue
        gaps = {m: _gap(runs, ours, m) for m in against}
        known = {m: gap for m, gap in gaps.items() if gap is not None}
        place = 1 + sum(scores[m] > scores[ours] for m in scores)
        sentences.append(f"- `{ours}` is number {place} of {len(scores)}: " + ", ".join(
            f"{_signed(gap)} against `{m}`" + (" (the best other personalized method)" if m == best else "")
            for m, gap in known.items()) + ".")
        if ours == "fedms":
            margins += [(gap[0], f"{_signed(gap)} points against `{m}` ({setting.title}; {100 * scores[ours]:.1f} against "
                         f"{100 * scores[m]:.1f} %, {100 * (scores[ours] / scores[m] - 1):+.1f} % relative)")
                        for m in scores if m not in ("fedms", "fedms_plus") and (gap := _gap(runs, ours, m)) is not None]
    sentences += [_gate(label, gates) for label in ("fedms", "fedms_plus")
                  if (gates := [line["gate"] for run, line in done if run.id == label and line.get("gate")])]
    return parts + (["\n".join(sentences)] if sentences else [])


def _gate(label: str, gates: Sequence[Mapping[str, float]]) -> str:
    """Say what a method's gate does in the mean over seeds, and what it could have gained."""
    weight, entropy, half, oracle = (statistics.fmean(gate[key] for gate in gates) for key in (
        "mean", "entropy", "half_mix_accuracy", "oracle_accuracy"))
    return (f"- The gate of `{label}` gives the local expert {100 * weight:.0f} % of the weight (entropy {entropy:.2f}, at most "
            f"{math.log(2):.2f}). Half and half would have {100 * half:.1f} %; the right expert for each sample, which no gate "
            f"can know, {100 * oracle:.1f} %.")


def _provenance(setting: Setting, done: Sequence[StudyRecord]) -> str:
    commits, cpus, torches = ({line[key] for _, line in done} for key in ("commit", "cpu", "torch"))
    command = shlex.join(["fedms", "run", setting.source]
                         + [word for text in (*COMMON, *setting.sets) for word in ("--set", text)])
    return (f"`{command} --method METHOD --seed SEED`; seeds {', '.join(sorted({str(line['seed']) for _, line in done}))}; "
            f"commit {', '.join(sorted(commits))}; {', '.join(sorted(cpus))}, one thread a run; "
            f"PyTorch {', '.join(sorted(torches))}. " + _constants([run for run, _ in done]))


def _constants(runs: Sequence[StudyRun]) -> str:
    tuned = {run.id: run.tuned for run in runs}
    setting = next((each for each in TUNED_ON if each.source == runs[0].setting.source), None)
    if not any(tuned.values()):
        return ("All methods have the run file's constants: their learning rates are the same, and not tuned one by one"
                + (f" yet; `{tuning(setting)}` would." if setting else "."))
    rest = [label for label, is_tuned in tuned.items() if not is_tuned]
    return (f"Constants chosen by `{tuning(setting) if setting else 'fedms tune'}`"
            + (f", but for {', '.join(rest)}." if rest else "."))


def _ranks_part(done: Sequence[StudyRecord]) -> list[str]:
    blocks: dict[tuple[str, int], dict[str, float]] = {}
    for run, line in done:
        if run.id in registry.methods():
            blocks.setdefault((run.setting.name, line["seed"]), {})[run.id] = line["personalized_accuracy"]["mean"]
    ranks = average_ranks(list(blocks.values()))
    if ranks is None:
        return []
    best = next(iter(ranks.mean))
    alike = ", ".join(ranks.alike(best)) or "none"
    return ["## Average ranks",
            f"Ranks of the mean personalized accuracy in {ranks.blocks} settings and seeds, 1 being best. Friedman's test that all "
            f"methods are alike has the p-value {p_value(ranks.p)}. Methods closer than the critical difference, {ranks.critical:.1f} "
            f"(Nemenyi, 95 %), are not shown to differ; from the first one these are {alike}.",
            _table(["method", "average rank"], [[name, f"{rank:.1f}"] for name, rank in ranks.mean.items()])]


def _all_blocks_part(done: Sequence[StudyRecord]) -> list[str]:
    """Return the part that compares activating blocks one after the other with training all of them from the start."""
    rows = []
    for setting in dict.fromkeys(run.setting for run, _ in done):
        here = [line for run, line in done if run.setting == setting]
        runs = [_as_run(line) for line in here]
        for each in WITH_ALL_BLOCKS.values():
            pair = [[line for line in here if line["id"] == id] for id in (each.method, each.id)]
            if (gap := _gap(runs, each.method, each.id)) is not None:
                means, work = ([report.Stat.of(value(line) for line in lines) for lines in pair] for value in (
                    lambda line: line["personalized_accuracy"]["mean"], lambda line: line["flops"]))
                rows.append([setting.title, each.method, *map(report.percent, means), _signed(gap),
                             f"{work[0].mean / work[1].mean:.2f}"])
    return ["## Blocks one after the other, and all from the start",
            _table(["setting", "method", "progressive %", "all blocks %", "points", "share of the operations"], rows)] if rows else []


def _ablation_part(done: Sequence[StudyRecord], planned: Sequence[StudyRun], of_run: Mapping[Any, Any]) -> list[str]:
    wanted = [run for run in planned if run.id in ABLATIONS]
    if not wanted:
        return []
    parts = [f"## What the pieces are worth: {ABLATED.title}"]
    here = [line for run, line in done if run.setting == ABLATED]
    runs = [_as_run(line) for line in here]
    rows = []
    for ablation in ABLATIONS.values():
        own = [line for line in here if line["id"] == ablation.id]
        gap = _gap(runs, ablation.id, ablation.method if ablation.method == "fedms_plus" else "fedms")
        if own:
            mean, worst = (report.Stat.of(line["personalized_accuracy"][key] for line in own) for key in ("mean", "worst10"))
            rows.append([ablation.label, str(len(own)), report.percent(mean), report.percent(worst),
                         _signed(gap) if gap else "–"])
    if not rows:
        return [*parts, "No run is done yet."]
    parts.append(_table(["run", "seeds", "personalized %", "worst 10 % of clients %", "points against the whole method"], rows))
    if missing := _missing(wanted, of_run):
        parts.append(f"Not run yet: {missing}.")
    return parts


def _as_run(line: Mapping[str, Any]) -> RunRecords:
    """Return a record as reports read it, without its seconds: runs side by side slow each other down."""
    return RunRecords(Path(line["id"]), {"run": {"method": line["id"], "seed": line["seed"]}}, [], [],
                      list(line["clients"]), {**line, "seconds": None})


def _gap(runs: Sequence[RunRecords], ours: str, theirs: str) -> tuple[float, float] | None:
    """Return the mean difference of two methods' accuracies over clients and seeds.

    Returns:
        The mean over seeds, and half the width of its 95 % interval, infinite for a single seed; None without pairs.
    """
    def scores(method: str) -> dict[tuple[int, int], float]:
        return {(run.seed, client["id"]): client["accuracy"]["personalized"] for run in runs if run.method == method
                for client in run.clients if not client["unseen"] and "personalized" in client["accuracy"]}

    first, second = scores(ours), scores(theirs)
    found = by_seed({key: first[key] - second[key] for key in sorted(first.keys() & second.keys())})
    return None if found is None else (found.mean, found.half)


def _signed(gap: tuple[float, float]) -> str:
    mean, half = gap
    if math.isinf(half):
        return f"{100 * mean:+.1f} (one seed)"
    return f"{'~' if abs(mean) <= half else ''}{100 * mean:+.1f} ± {100 * half:.1f}"


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])
