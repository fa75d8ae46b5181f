"""The study: which runs it consists of, their records in one small file, and the page that is made from them.

A record is one line of JSON for each run: enough for every figure of the page, and small enough to be committed, so that
a study can go on elsewhere. A record counts only for the configuration it was made with, which it holds: that is compared
with the run as it is planned now, keys that are younger than the record having their defaults. Records of other settings
stay in the file, and are named and left out.
"""
from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedms.config import METHODS, ConfigError, RunConfig, config_from_dict, dump_toml, load_config, of_method, read_tables
from fedms.foreign import parse_json
from fedms.progress import Progress
from fedms.runs.workers import in_processes
from fedms.storage.durable import FolderLock, write_durably
from fedms.storage.records import RunFolderError, RunRecords, renamed

SEEDS = (0, 1, 2)
FIRST = ("fedms", "fedavg", "fedavg_ft", "fedavg_prior", "local", "fedms_plus")     # what the claims rest on
PERSONALIZED = ("fedavg_prior", "fedavg_ft", "fedper", "fedrep", "ditto", "apfl", "fedsa_lora", "feddpa")
REST = tuple(method for method in METHODS if method not in FIRST)

# Runs that follow each other in a process share its clients' constants; two processes run side by side on two cores.
# The bound of a reply's change is the one that the committed records were made with.
COMMON = ("run.threads=1", "clients.max_change=1000")


@dataclass(frozen=True)
class Setting:
    """A data set and how it is spread over clients. source: a built-in run file; sets: `--set` of its runs."""

    name: str
    title: str
    source: str
    sets: tuple[str, ...] = ()


# See `READING` for the reasons. A batch is padded to its longest sentence: cutting the one in four that is longer than 32
# tokens saves a third of the work.
IMAGES = ("data.max_samples=8000", "data.split=[0.3, 0.15, 0.55]")
SENTENCES = ("data.split=[0.4, 0.15, 0.45]", "data.max_tokens=32", "stage1.rounds=6", "stage2.rounds=3")

NATURAL = Setting("sentiment-natural", "Sentiment, four domains, 12 clients", "sentiment", SENTENCES)
FASHION_SKEWED = Setting("fashion-0.1", "Fashion-MNIST, Dirichlet 0.1, 20 clients", "fashion",
                         (*IMAGES, "data.alpha=0.1"))
FASHION = Setting("fashion-0.5", "Fashion-MNIST, Dirichlet 0.5, 20 clients", "fashion", (*IMAGES, "data.alpha=0.5"))
SENTIMENT_SKEWED = Setting("sentiment-0.3", "Sentiment, Dirichlet 0.3, 20 clients", "sentiment",
                           (*SENTENCES, "data.partition=dirichlet", "data.alpha=0.3", "clients.count=20"))
SETTINGS = (FASHION_SKEWED, NATURAL, FASHION, SENTIMENT_SKEWED)

# What one piece is worth: FedMS, and fedms_plus, with one setting changed. name -> (method, sets)
ABLATIONS = {
    "fedms, gate frozen (half and half)": ("fedms", ("gate.weight=0.5",)),
    "fedms, gate private": ("fedms", ("gate.training=private",)),
    "fedms, global expert only": ("fedms", ("gate.weight=0.0",)),
    "fedms, local expert only": ("fedms", ("gate.weight=1.0",)),
    "fedms, without its own loss": ("fedms", ("stage2.own_loss=0.0",)),
    "fedms, without early stopping": ("fedms", ("stage2.keep=last",)),
    "fedms, all blocks from the start": ("fedms", ("sal.schedule=all",)),
    "fedms, blocks bottom up": ("fedms", ("sal.order=bottom_up",)),
    "fedms, blocks in a random order": ("fedms", ("sal.order=[2, 4, 1, 3]",)),
    "fedavg_ft, doubled rank (as many parameters as two experts)": ("fedavg_ft", ("lora.rank=16", "lora.alpha=32.0")),
    "fedavg, as many bytes as fedms (no second stage)": ("fedavg", ("stage2.rounds=0",)),
    "fedms_plus, global expert fixed in stage 2": ("fedms_plus", ("plus.global_in_stage2=false",)),
    "fedms_plus, no class prior": ("fedms_plus", ("plus.prior=off",)),
    "fedms_plus, prior on the global expert only": ("fedms_plus", ("plus.prior=global",)),
    "fedms_plus, prior in stage 1 too": ("fedms_plus", ("plus.prior_in_stage1=true",)),
    "fedms_plus, gate on training samples": ("fedms_plus", ("plus.gate_on=training",)),
    "fedms_plus, gate on held-out training samples": ("fedms_plus", ("plus.gate_on=held_out",)),
    "fedms_plus, no confidences": ("fedms_plus", ("plus.confidences=false",)),
    "fedms_plus, half and half": ("fedms_plus", ("gate.weight=0.5",)),
}
ABLATED = FASHION
TUNED_ON = (FASHION, NATURAL)       # constants are chosen once for each data set


@dataclass(frozen=True)
class StudyRun:
    """One run. label: the method, or the ablation's name."""

    setting: Setting
    label: str
    config: RunConfig
    sets: tuple[str, ...]
    tuned: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Everything that the run depends on but the code."""
        return self.label, dump_toml(config_from_dict(self.values))

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as plain values, without the tables of other methods."""
        return of_method(self.config.model_dump(mode="json", exclude_none=True))

    @property
    def command(self) -> str:
        sets = [word for text in self.sets for word in ("--set", text)]
        return shlex.join(["fedms", "run", self.setting.source, *sets])

    @property
    def title(self) -> str:
        return f"{self.setting.name}, {self.label}, seed {self.config.run.seed}"


def plan(quick: bool = False, tuned: Path | None = None) -> list[StudyRun]:
    """All runs, in the order in which they tell most: every method on every setting with one seed, then the other seeds,
    then the ablations; in each part those first that the claims rest on.

    tuned: folder with SOURCE/METHOD.toml, as `fedms tune --out TUNED/SOURCE` writes them; a method without such a file has
    the run file's constants."""
    _planned = partial(_plan_one, tuned=tuned)
    if quick:
        short = ("stage1.rounds=4", "stage2.rounds=2")
        return [_planned(setting, method, method, 0, short) for setting in (FASHION_SKEWED, NATURAL) for method in FIRST]
    # Runs that follow each other share the model, the data and the clients' constants.
    runs = [_planned(setting, method, method, seed)
            for seed in SEEDS for setting in SETTINGS for method in (*FIRST, *REST)]
    return runs + [_planned(ABLATED, name, method, seed, sets)
                   for seed in SEEDS for name, (method, sets) in ABLATIONS.items()]


def within(planned: Sequence[StudyRun], settings: str) -> list[StudyRun]:
    """The runs of some settings, by their names with commas between them, or of all.

    Raises:
        ConfigError: for a name that none of the runs has.
    """
    names = list(dict.fromkeys(run.setting.name for run in planned))
    wanted = names if settings == "all" else settings.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"--settings: got {unknown[0]!r}; accepted: {', '.join(names)}, or all")
    return [run for run in planned if run.setting.name in wanted]


def _plan_one(setting: Setting, label: str, method: str, seed: int, sets: tuple[str, ...] = (), *,
              tuned: Path | None) -> StudyRun:
    chosen: tuple[str, ...] = ()
    if tuned is not None and (file := tuned / setting.source / f"{method}.toml").is_file():
        chosen = tuple(f"{table}.{key}={json.dumps(value)}" for table, keys in read_tables(file).items()
                       for key, value in keys.items())
    sets = (*COMMON, *setting.sets, *chosen, *sets, f"run.method={method}", f"run.seed={seed}")
    return StudyRun(setting, label, load_config(setting.source, sets), sets, tuned=bool(chosen))


def carry_out(planned: Sequence[StudyRun], records: Path, work: Path, *, jobs: int = 1,
              say: Callable[[str], None] = print, stop: Callable[[], bool] = lambda: False) -> int:
    """Runs what has no record yet, `jobs` runs at a time, and adds their records to the file one by one.

    Args:
        work: where run folders are kept; a run that was killed goes on from its last round.
        stop: asked between clients whether to stop; runs under way go on at the next call.

    Returns:
        The number of runs still to do: 0 when the study is whole.

    Raises:
        RunFolderError: if another process works on these records, or they cannot be read or written.
    """
    records.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(records.parent)
    except BlockingIOError as error:
        raise RunFolderError(f"{records.parent}: {error}, another study; wait for its end") from None
    try:
        lines = read_records(records)
        known = set(map(key_of, lines))
        todo = [run for run in planned if run.key not in known]
        say(f"{len(planned) - len(todo)} of {len(planned)} runs are recorded in {records}")
        left = len(todo)
        for run, line in _results(todo, work, jobs, stop):
            lines.append(line)
            text = "".join(json.dumps(each, sort_keys=True, ensure_ascii=False) + "\n" for each in lines)
            try:
                write_durably(records, text.encode())
            except OSError as error:
                raise RunFolderError(f"{records}: cannot be written: {error.strerror}") from error
            left -= 1
            say(f"{run.title}: {100 * line['personalized_accuracy']['mean']:.1f} % in {line['seconds']:.0f} s; "
                f"{left} runs to do")
        return left
    finally:
        lock.release()


def _results(todo: Sequence[StudyRun], work: Path, jobs: int,
             stop: Callable[[], bool]) -> Iterator[tuple[StudyRun, dict[str, Any]]]:
    from fedms.engines.base import Interrupted

    record = partial(_record, work=work)
    try:
        if jobs > 1 and todo:
            yield from in_processes(record, todo, jobs, Progress(), stop)
        else:
            yield from ((run, record(run, Progress(), stop)) for run in todo)
    except Interrupted:
        return


def _record(run: StudyRun, progress: Progress, stop: Callable[[], bool], *, work: Path) -> dict[str, Any]:
    """Carries out a run and makes its line."""
    from fedms.runs import run as runner

    folder = work / run.setting.name / f"{re.sub('[^a-z0-9_]+', '-', run.label)}-seed{run.config.run.seed}"
    go = partial(runner.carry_out_one, runner.Task(run.config, folder), progress, stop)
    try:
        summary = go()
    except ConfigError:                 # it holds a run with other settings
        summary = go(overwrite=True)
    assert summary is not None          # test data are read
    past = RunRecords.read(folder)
    keep = ("personalized_accuracy", "global_test_accuracy", "zero_shot_accuracy", "macro_f1", "unseen_accuracy", "gate",
            "final_depth", "trainable_percent", "bytes_up", "bytes_down", "flops", "seconds", "peak_memory_bytes")
    return {"config": run.values} | _rounded({
        "setting": run.setting.name, "label": run.label, "method": run.config.run.method, "seed": run.config.run.seed,
        "command": run.command, "model_fingerprint": summary["fingerprint"][:16],
        **machine(), **{key: summary[key] for key in keep},
        "clients": [{key: client[key] for key in ("id", "group", "unseen", "n_train", "n_test", "accuracy", "gate_mean")}
                    for client in past.clients],
        "validation": [line["validation_accuracy"] for line in past.rounds]})


def machine() -> dict[str, str]:
    """What a figure was made with: commit, PyTorch, CPU."""
    import torch

    from fedms.doctor import cpu_name

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(Path(__file__).parents[2]), *words], capture_output=True, text=True)
        return done.stdout.strip()

    # The study itself changes its records and its page; they are no part of what a figure was made with.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "python", "fedms_ext", "csrc")
    return {"commit": (git("rev-parse", "--short=7", "HEAD") or "unknown") + ("-dirty" if changed else ""),
            "torch": torch.__version__, "cpu": cpu_name()}


def key_of(line: Mapping[str, Any]) -> tuple[str, str] | None:
    """`StudyRun.key` of the run that a record is of; None if its configuration is one of the past."""
    try:
        return line["label"], dump_toml(config_from_dict(of_method(line["config"])))
    except ConfigError:
        return None


def _rounded(value: Any) -> Any:
    """Fractions to four digits: a hundredth of a percent."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items() if each is not None}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of records; none if there is no file. RunFolderError names a damaged line."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = renamed(parse_json(text))
            line["config"]["run"], line["label"], line["personalized_accuracy"]["mean"]
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"{path}, line {number}: not a record of the study ({error}); remove the line") from None
        lines.append(line)
    return lines


# The page

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
machine. Differences are paired by client and seed, in points, with a 95 % interval of their mean; those whose interval
holds 0 are marked by ~.
"""


def write_page(page: Path, planned: Sequence[StudyRun], records: Path) -> None:
    """Makes the page from the records of the planned runs, and its pictures in a folder of the page's name. RunFolderError
    if they cannot be written."""
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
    """By its file's name a picture of each setting with records: every client's accuracy, by method."""
    from fedms import report

    done, _ = _one_model(planned, {key_of(line): line for line in lines})
    found = {}
    with report.plain_style():
        for setting in dict.fromkeys(run.setting for run in planned):
            if figure := report.clients_figure([_as_run(line) for run, line in done
                                                if run.setting == setting and run.label in METHODS]):
                found[f"{setting.name}.svg"] = report.as_svg(figure, setting.name)
    return found


def render(planned: Sequence[StudyRun], lines: Sequence[Mapping[str, Any]], source: str, pictures: str) -> str:
    """The page as Markdown; equal records give an equal page. pictures: the folder with a picture of each setting, as the
    page names it."""
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
        here = [(run, line) for run, line in done if run.setting == setting and run.label in METHODS]
        missing = _missing([run for run in planned if run.setting == setting and run.label in METHODS], of_run)
        parts.append(f"## {setting.title}")
        parts += _setting_part(setting, here, margins) if here else ["No run is done yet."]
        if here:
            parts.append(f"![Personalized test accuracy of each client, by method]({pictures}/{setting.name}.svg)")
            parts.append("*One dot is a client and seed, the bar the mean, the tick the mean of the worst tenth.*")
            if missing:
                parts.append(f"Not run yet: {missing}.")
    parts += _ablation_part(done, planned, of_run)
    parts.append(CLAIM.rstrip())
    parts.append("\n".join(f"- {text}" for _, text in sorted(margins, reverse=True)[:4]) or "No two rows to compare yet.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


StudyRecord = tuple[StudyRun, Mapping[str, Any]]


def _one_model(planned: Sequence[StudyRun], of_run: Mapping[Any, Mapping[str, Any]]) -> tuple[list[StudyRecord], int]:
    """The planned runs with a record, where their setting was run with one set of model weights, the most frequent one; and
    how many have others: pretraining elsewhere may give other bits."""
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
            by_label.setdefault(run.label, []).append(str(run.config.run.seed))
    return "; ".join(f"{label} (seed {', '.join(seeds)})" for label, seeds in by_label.items())


def _setting_part(setting: Setting, done: Sequence[StudyRecord], margins: list[tuple[float, str]]) -> list[str]:
    from fedms import report

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
                  if (gates := [line["gate"] for run, line in done if run.label == label and line.get("gate")])]
    return parts + (["\n".join(sentences)] if sentences else [])


def _gate(label: str, gates: Sequence[Mapping[str, float]]) -> str:
    """What a method's gate does, in the mean over seeds, and what it could have gained."""
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
    tuned = {run.label: run.tuned for run in runs}
    setting = next((each for each in TUNED_ON if each.source == runs[0].setting.source), None)
    if not any(tuned.values()):
        return ("All methods have the run file's constants: their learning rates are the same, and not tuned one by one"
                + (f" yet; `{tuning(setting)}` would." if setting else "."))
    rest = [label for label, is_tuned in tuned.items() if not is_tuned]
    return (f"Constants chosen by `{tuning(setting) if setting else 'fedms tune'}`"
            + (f", but for {', '.join(rest)}." if rest else "."))


def tuning(setting: Setting) -> str:
    """The command that chooses the constants of all methods on a data set, where the study looks for them."""
    sets = [word for text in (*COMMON, *setting.sets) for word in ("--set", text)]
    return shlex.join(["fedms", "tune", setting.source, *sets, "--jobs", "2", "--out", f"bench/study/tuned/{setting.source}"])


def _ablation_part(done: Sequence[StudyRecord], planned: Sequence[StudyRun], of_run: Mapping[Any, Any]) -> list[str]:
    from fedms import report

    wanted = [run for run in planned if run.label not in METHODS]
    if not wanted:
        return []
    parts = [f"## What the pieces are worth: {ABLATED.title}"]
    here = [line for run, line in done if run.setting == ABLATED]
    runs = [_as_run(line) for line in here]
    rows = []
    for label, (method, _) in ABLATIONS.items():
        own = [line for line in here if line["label"] == label]
        gap = _gap(runs, label, method if method == "fedms_plus" else "fedms")
        if own:
            mean, worst = (report.Stat.of(line["personalized_accuracy"][key] for line in own) for key in ("mean", "worst10"))
            rows.append([label, str(len(own)), report.percent(mean), report.percent(worst),
                         _signed(gap) if gap else "–"])
    if not rows:
        return [*parts, "No run is done yet."]
    parts.append(_table(["run", "seeds", "personalized %", "worst 10 % of clients %", "points against the whole method"], rows))
    if missing := _missing(wanted, of_run):
        parts.append(f"Not run yet: {missing}.")
    return parts


def _as_run(line: Mapping[str, Any]) -> RunRecords:
    """A line in the form that reports are made of. Without its seconds: runs side by side slow each other down."""
    return RunRecords(Path(line["label"]), {"run": {"method": line["label"], "seed": line["seed"]}}, [], [],
                      list(line["clients"]), {**line, "seconds": None})


def _gap(runs: Sequence[RunRecords], ours: str, theirs: str) -> tuple[float, float] | None:
    """Mean over clients and seeds of the difference of their accuracies, and half the width of its 95 % interval."""
    def scores(method: str) -> dict[tuple[int, int], float]:
        return {(run.seed, client["id"]): client["accuracy"]["personalized"] for run in runs if run.method == method
                for client in run.clients if not client["unseen"] and "personalized" in client["accuracy"]}

    first, second = scores(ours), scores(theirs)
    gaps = [first[key] - second[key] for key in first.keys() & second.keys()]
    if len(gaps) < 2:
        return None
    return statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5


def _signed(gap: tuple[float, float]) -> str:
    mean, half = gap
    return f"{'~' if abs(mean) <= half else ''}{100 * mean:+.1f} ± {100 * half:.1f}"


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])
