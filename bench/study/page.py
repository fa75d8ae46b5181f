"""The page of the study, from its records: equal records give an equal page."""
from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.study.costs import costs_part
from bench.study.diagram import ranks_figure
from bench.study.findings import GATED, StudyRecord, as_run, findings_part, gap_of, gate_line, power_part, ranks_of, str_gap, table
from bench.study.plan import ABLATIONS, COMMON, LABELS, SETTINGS, TUNED_ON, WITH_ALL_BLOCKS, Setting, StudyRun, tuning
from bench.study.records import key_of, read_records
from fedms import report
from fedms.config import registry
from fedms.errors import RunFolderError
from fedms.report.figures import accuracy_by_bytes_figure, accuracy_by_flops_figure
from fedms.report.numbers import OURS
from fedms.report.formats import p_value
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
tenth of clients. *Better off alone*: the share of clients whose own training would give more. `fedms` is the method as defined,
`fedms_plus` with the pieces that `docs/method/fedms.md` explains. Cost is operations (TFLOP), not seconds: runs share the
machine. They are as the commit of a run counted them. Those of `fedms` leave out the pass through the frozen blocks from which the
frozen expert's logits are computed: 12 % of its operations on the built-in digits. Differences are paired by client and averaged
within a seed, in points, with a 95 % interval of the seeds' means (Student's t), since clients of one seed share an expert and a
partition; where that interval holds 0 no difference is shown, marked by ~. Intervals are not corrected for their number: one in
twenty leaves out 0 by chance.
"""

OF_SIZE = {
    "small": """\
This is the small study: seven settings, the six methods that claims rest on, and two rivals that train a private expert in all
rounds, `ditto` and `apfl`; on settings that are cheap, three more relatives, `feddpa`, `flexlora` (all devices at full rank) and `fed_sb`
(at four times the rank). Where there are five seeds, `fedms_plus` runs once more with a learned gate. There are 700 images, 800
sentences, 800 solar cells or 900 digits a seed, half of them for testing, so that a client has 19 to 32 samples to train on. The
model of the digits is a small one that was pretrained on other digits; the other two are foundation models of 22 million parameters.
All methods have the same learning rates in the same stages, and none is tuned: methods are compared at equal rates, not each at its
best. The full study, `python -m bench.study --size full`, has 555 runs (seventeen methods, four settings,
tuned, with ablations) and has not been made.
""",
    "full": """\
What a run costs lies in its training samples, what it says in its test samples: so clients have more of the latter. Sentences cost
several times what images do: they are cut to 32 tokens, which one in four exceeds, and have 6 + 3 rounds for 8 + 4.
""",
    "quick": "One seed and short runs, to see that all works. Nothing can be read off it.\n",
}


# Of each setting, by the end of their names: the function that draws it, what it shows, and how it is read.
PICTURES: dict[str, tuple[Callable[[Sequence[RunRecords]], Any], str, str]] = {
    "": (report.clients_figure, "Personalized test accuracy of each client, by method",
         "One dot is a client and seed, the bar the mean, the tick the mean of the worst tenth."),
    "-operations": (accuracy_by_flops_figure, "Accuracy of each method over the operations of all clients",
                    "Equal rounds cost different numbers of operations. The dashed line joins methods that no other beats in both."),
    "-bytes": (accuracy_by_bytes_figure, "Accuracy of each method over the bytes of all clients",
               "The same over the bytes that all clients sent and received."),
}


def write_page(page: Path, planned: Sequence[StudyRun], records: Path, size: str = "full") -> None:
    """Write the page, and its pictures into a folder of the page's name.

    Args:
        page: The file to write.
        planned: The runs of the study.
        records: The file with their records.
        size: The size of the study, which the page explains.

    Raises:
        RunFolderError: If the records are damaged, or a file cannot be written.
    """
    lines, folder = read_records(records), page.with_suffix("")
    text = render(planned, lines, str(records), folder.name, size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in _pictures(planned, lines).items():
            write_durably(folder / name, picture.encode())
        write_durably(page, text.encode())
    except OSError as error:
        raise RunFolderError(f"{page}: cannot be written: {error.strerror}") from error


def _pictures(planned: Sequence[StudyRun], lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the pictures of each setting with records, by the names of their files, and the diagram of ranks."""
    done, _ = _one_model(planned, {key_of(line): line for line in lines})
    found = {}
    with report.plain_style():
        for setting in dict.fromkeys(run.setting for run in planned):
            runs = [as_run(line) for run, line in done if run.setting == setting and run.id in registry.methods()]
            for ending, (draw, _, _) in PICTURES.items():
                if figure := draw(runs):
                    name = f"{setting.name}{ending}"
                    found[f"{name}.svg"] = report.as_svg(figure, name)
        if (ranks := ranks_of(done)) is not None:
            found["ranks.svg"] = report.as_svg(ranks_figure(ranks), "ranks")
    return found


def render(planned: Sequence[StudyRun], lines: Sequence[Mapping[str, Any]], source: str, pictures: str,
           size: str = "full") -> str:
    """Return the page as Markdown. Equal records give an equal page.

    Args:
        planned: The runs of the study.
        lines: Their records.
        source: The file of the records, as the page names it.
        pictures: The folder with the pictures, as the page names it.
        size: The size of the study, which the page explains.
    """
    of_run = {key_of(line): line for line in lines}
    done, mixed = _one_model(planned, of_run)
    parts = ["# The study", f"{len(done)} of {len(planned)} runs are done. Made by `python -m bench.study --size {size} --page-only` "
             f"from `{source}`, one line a run with its command, commit, seed and every client's accuracy; without `--page-only` it goes "
             "on where the records end.", *findings_part(done), OF_SIZE[size], READING, *power_part(done)]
    if left_out := len(lines) - len(done) - mixed:
        parts.append(f"{left_out} record{'s' * (left_out > 1)} of other settings "
                     f"{'are' if left_out > 1 else 'is'} left out.")
    if mixed:
        parts.append(f"{mixed} record{'s' * (mixed > 1)} with other weights of the pretrained model "
                     f"{'are' if mixed > 1 else 'is'} left out.")
    margins: list[tuple[float, str]] = []
    for setting in dict.fromkeys(run.setting for run in planned):
        here = [(run, line) for run, line in done if run.setting == setting and run.id in registry.methods()]
        gates = [gate_line(id, found) for id in GATED if (
            found := [line for run, line in done if run.setting == setting and run.id == id and line.get("gate")])]
        missing = _missing([run for run in planned if run.setting == setting and run.id in registry.methods()], of_run)
        parts.append(f"## {setting.title}")
        parts += _setting_part(setting, here, margins) if here else ["No run is done yet."]
        if here:
            parts += ["\n".join(gates)] if gates else []
            runs = [as_run(line) for _, line in here]
            for ending, (draw, title, caption) in PICTURES.items():
                if draw(runs):
                    parts += [f"![{title}]({pictures}/{setting.name}{ending}.svg)", f"*{caption}*"]
            if missing:
                parts.append(f"Not run yet: {missing}.")
    parts += _ranks_part(done, pictures)
    parts += costs_part(done)
    parts += _all_blocks_part(done)
    parts += _ablation_part(done, planned, of_run)
    parts.append(CLAIM.rstrip())
    parts.append("\n".join(f"- {text}" for _, text in sorted(margins, reverse=True)[:4]) or "No two rows to compare yet.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


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
    return "; ".join(f"{label} (seed {', '.join(dict.fromkeys(seeds))})" for label, seeds in by_label.items())


def _setting_part(setting: Setting, done: Sequence[StudyRecord], margins: list[tuple[float, str]]) -> list[str]:
    runs = [as_run(line) for _, line in done]
    rows = report.comparison(runs)
    header, cells = report.table(rows)
    seeds = [str(row["seeds"]) for row in rows]
    header, cells = [header[0], "seeds", *header[1:]], [[c[0], n, *c[1:]] for c, n in zip(cells, seeds)]
    parts = [_provenance(setting, done), table(header, cells)]
    methods = [row["method"] for row in rows if row["method"] in registry.methods()]
    scores = {row["method"]: row["personalized"].mean for row in rows}
    gaps = {ours: {m: gap for m in methods if m != ours and (gap := gap_of(runs, ours, m)) is not None}
            for ours in OURS if ours in methods}
    if len(methods) > 1 and gaps:
        parts += ["Points ahead of the method of each row (behind it: negative):",
                  table(["against", *(f"`{ours}`" for ours in gaps)],
                         [[m, *(str_gap(of[m]) if m in of else "–" for of in gaps.values())] for m in methods])]
    margins += [(gap.mean, f"{str_gap(gap)} points against `{m}` ({setting.title}; {100 * scores['fedms']:.1f} against "
                 f"{100 * scores[m]:.1f} %, {100 * (scores['fedms'] / scores[m] - 1):+.1f} % relative)")
                for m, gap in gaps.get("fedms", {}).items() if m not in OURS]
    return parts


def _provenance(setting: Setting, done: Sequence[StudyRecord]) -> str:
    commits, cpus, torches = ({line[key] for _, line in done} for key in ("commit", "cpu", "torch"))
    command = shlex.join(["fedms", "run", setting.source]
                         + [word for text in (*COMMON, *setting.sets) for word in ("--set", text)])
    return (f"`{command} --method METHOD --seed SEED`; seeds {', '.join(sorted({str(line['seed']) for _, line in done}))}; "
            f"commit {', '.join(sorted(commits))}; {', '.join(sorted(cpus))}, one thread a run; "
            f"PyTorch {', '.join(sorted(torches))}. " + _constants([run for run, _ in done]))


def _constants(runs: Sequence[StudyRun]) -> str:
    tuned = {run.id: run.tuned for run in runs}
    setting = next((each for each in TUNED_ON if each.source == runs[0].setting.source and runs[0].setting in SETTINGS), None)
    if not any(tuned.values()):
        return ("All methods have the run file's constants: their learning rates are the same, and not tuned one by one"
                + (f" yet; `{tuning(setting)}` would." if setting else "."))
    rest = [label for label, is_tuned in tuned.items() if not is_tuned]
    return (f"Constants chosen by `{tuning(setting) if setting else 'fedms tune'}`"
            + (f", but for {', '.join(rest)}." if rest else "."))


def _ranks_part(done: Sequence[StudyRecord], pictures: str) -> list[str]:
    if (ranks := ranks_of(done)) is None:
        return []
    best = next(iter(ranks.mean))
    alike = ", ".join(ranks.alike(best)) or "none"
    return ["## Average ranks",
            f"Ranks of the mean personalized accuracy in {ranks.blocks} settings and seeds, 1 being best. Friedman's test that all "
            f"methods are alike has the p-value {p_value(ranks.p)}. Methods closer than the critical difference, {ranks.critical:.1f} "
            f"(Nemenyi, 95 %), are not shown to differ; from the first one these are {alike}.",
            f"![Critical-difference diagram: average rank of each method, and bars over those that are not shown to differ]"
            f"({pictures}/ranks.svg)",
            table(["method", "average rank"], [[name, f"{rank:.1f}"] for name, rank in ranks.mean.items()])]


def _all_blocks_part(done: Sequence[StudyRecord]) -> list[str]:
    """Return the part that compares activating blocks one after the other with training all of them from the start."""
    rows = []
    for setting in dict.fromkeys(run.setting for run, _ in done):
        here = [line for run, line in done if run.setting == setting]
        runs = [as_run(line) for line in here]
        for each in WITH_ALL_BLOCKS.values():
            pair = [[line for line in here if line["id"] == id] for id in (each.method, each.id)]
            if (gap := gap_of(runs, each.method, each.id)) is not None:
                means, work = ([report.Stat.of(value(line) for line in lines) for lines in pair] for value in (
                    lambda line: line["personalized_accuracy"]["mean"], lambda line: line["flops"]))
                rows.append([setting.title, each.method, *map(report.percent, means), str_gap(gap),
                             f"{work[0].mean / work[1].mean:.2f}"])
    return ["## Blocks one after the other, and all from the start",
            table(["setting", "method", "progressive %", "all blocks %", "points", "share of the operations"], rows)] if rows else []


def _ablation_part(done: Sequence[StudyRecord], planned: Sequence[StudyRun], of_run: Mapping[Any, Any]) -> list[str]:
    wanted = [run for run in planned if run.id in ABLATIONS]
    if not wanted:
        return []
    parts = ["## What the pieces are worth"]
    rows = []
    for setting in dict.fromkeys(run.setting for run in wanted):
        here = [line for run, line in done if run.setting == setting]
        runs = [as_run(line) for line in here]
        for ablation in ABLATIONS.values():
            own = [line for line in here if line["id"] == ablation.id]
            gap = gap_of(runs, ablation.id, ablation.method if ablation.method == "fedms_plus" else "fedms")
            if own:
                mean, worst = (report.Stat.of(line["personalized_accuracy"][key] for line in own) for key in ("mean", "worst10"))
                rows.append([setting.title, ablation.label, str(len(own)), report.percent(mean), report.percent(worst),
                             str_gap(gap) if gap else "–"])
    if not rows:
        return [*parts, "No run is done yet."]
    parts.append(table(["setting", "run", "seeds", "personalized %", "worst 10 % of clients %", "points against the whole method"], rows))
    if missing := _missing(wanted, of_run):
        parts.append(f"Not run yet: {missing}.")
    return parts
