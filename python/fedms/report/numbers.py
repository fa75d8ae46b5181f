"""Reading runs, and the numbers behind tables, words and pictures."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from fedms.config import registry
from fedms.errors import RunFolderError
from fedms.progress import perplexity
from fedms.report.intervals import Interval, half_width
from fedms.storage.records import RunRecords, find_runs

OURS = (registry.RECOMMENDED, "fedms")
"""Methods that reports speak of first and set in bold."""


@dataclass(frozen=True)
class Stat:
    """A number over seeds.

    Attributes:
        mean: Its mean.
        std: Its sample standard deviation, or None for a single seed.
        n: The number of seeds.
    """

    mean: float
    std: Optional[float]
    n: int = 1

    @classmethod
    def of(cls, values: Iterable[Optional[float]]) -> Optional[Stat]:
        """Return the number over seeds of the values that are known; None if none is."""
        known = [v for v in values if v is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the mean."""
        return Interval(self.mean, half_width(self.std, self.n), self.n)

    @property
    def may_be_zero(self) -> bool:
        """Whether 0 lies in the 95 % interval of the mean. False for a single seed."""
        return self.interval.shows == "no difference shown"


def read_runs(path: str | Path) -> tuple[list[RunRecords], list[str]]:
    """Read all runs in a folder, sorted by method and seed.

    Returns:
        The runs, and a note for each one that is damaged.

    Raises:
        RunFolderError: If not a single one can be read.
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
    """Group runs by method, in the order in which reports list methods."""
    grouped: dict[str, list[RunRecords]] = defaultdict(list)
    for run in runs:
        grouped[run.method].append(run)
    return {m: grouped[m] for m in sorted(grouped, key=_rank)}


def comparison(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Return one row for each method, zero-shot first, with a :class:`Stat` over seeds of each figure in the summaries.

    A figure that is unknown is None. `below_local` is the share of clients that do worse than in the `local` run of the same seed.
    """
    rows = []
    zero_shot = {r.seed: r for r in runs if client_values(r, "zero_shot")}
    if zero_shot:
        rows.append({
            "method": "zero-shot", "seeds": len(zero_shot), "unfinished": 0,
            "personalized": Stat.of(client_mean(r, "zero_shot") for r in zero_shot.values()),
            "worst10": Stat.of(worst_tenth(client_values(r, "zero_shot")) for r in zero_shot.values()),
            "perplexity": _perplexity(field_of(r.summary, "language", "nats_zero_shot") for r in zero_shot.values()),
            "choices": Stat.of(field_of(r.summary, "language", "choice_accuracy_zero_shot") for r in zero_shot.values()),
        })
    for method, group in by_method(runs).items():
        ended = [r for r in group if r.summary]
        row: dict[str, Any] = {"method": method, "seeds": len(ended), "unfinished": len(group) - len(ended)}
        for name, keys in {"personalized": ("personalized_accuracy", "mean"),
                           "worst10": ("personalized_accuracy", "worst10"), "macro_f1": ("macro_f1",),
                           "calibration_error": ("calibration_error",), "auroc": ("auroc",),
                           "global_test": ("global_test_accuracy",), "trainable_percent": ("trainable_percent",),
                           "unseen": ("unseen_accuracy", "after_training"), "bytes_up": ("bytes_up",),
                           "bytes_down": ("bytes_down",), "flops": ("flops",), "seconds": ("seconds",),
                           "peak_memory_bytes": ("peak_memory_bytes",), "bits_per_byte": ("language", "bits_per_byte"),
                           "choices": ("language", "choice_accuracy")}.items():
            row[name] = Stat.of(field_of(r.summary, *keys) for r in ended)
        row["perplexity"] = _perplexity(field_of(r.summary, "language", "nats") for r in ended)
        if method != "local":
            row["below_local"] = Stat.of(below_local(r, runs) for r in ended)
        rows.append(row)
    return rows


def _perplexity(nats: Iterable[Optional[float]]) -> Optional[Stat]:
    """Return the perplexity that a mean over seeds of nats a token stands for, without a spread; None where none is known."""
    stat = Stat.of(nats)
    return stat and Stat(perplexity(stat.mean), None, stat.n)


def worst_tenth(values: Sequence[float]) -> float:
    """Return the mean of the worst 10 % of values, of at least one."""
    return statistics.fmean(sorted(values)[:max(1, math.ceil(len(values) / 10))])


def focus_method(methods: Iterable[str]) -> str:
    """Return the method that a report speaks of first: the first of `OURS` that is present, else the last method."""
    methods = list(methods)
    return next((name for name in OURS if name in methods), methods[-1])


def _rank(method: str) -> tuple[int, str]:
    known = list(registry.methods())
    return (known.index(method) if method in known else len(known), method)


def field_of(values: Any, *keys: str) -> Any:
    """Return a value of nested dictionaries by its keys, or None where one of them is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def participants(run: RunRecords) -> list[dict[str, Any]]:
    """Return the records of the clients that took part in training."""
    return [c for c in run.clients if not c.get("unseen")]


def client_values(run: RunRecords, name: str) -> list[float]:
    """Return one accuracy of each participant that has it, by the name under `accuracy`."""
    return [v for c in participants(run) if (v := field_of(c, "accuracy", name)) is not None]


def client_mean(run: RunRecords, name: str) -> Optional[float]:
    """Return the mean of an accuracy over participants, or None if nobody has it."""
    values = client_values(run, name)
    return statistics.fmean(values) if values else None


def client_gap(run: RunRecords, name: str, other: str) -> Optional[float]:
    """Return the mean over clients of what one of their models is better by than another (see `merit`); None if no client has both."""
    gaps = [a - b for c in participants(run) if (a := merit(c, name)) is not None and (b := merit(c, other)) is not None]
    return statistics.fmean(gaps) if gaps else None


def learned_gate(run: RunRecords) -> bool:
    """Tell whether a run trained a gate.

    A fixed weight, one weight for each client (apfl) and similarities (feddpa) are none, and cannot collapse. Earlier versions
    recorded that a fixed weight could.
    """
    return run.config["gate"].get("weight") is None and field_of(run.summary, "gate", "collapsed") is not None


IDLE_SHARE = 0.1        # of the visits of stage 2, from which on undone ones are worth a word
SAME_LOSS = 1e-6        # the loss of a mixture moves a little with the gate, though the local expert does not


def idle_visits(run: RunRecords) -> Optional[tuple[int, int]]:
    """Return how many visits of stage 2 changed nothing, and of how many.

    Such a visit ends with the validation loss of the same client's visit before it. None where these are few, or the last expert
    is kept whatever it is worth.
    """
    if run.config["stage2"].get("keep") != "best":
        return None
    last: dict[int, float] = {}
    idle = total = 0
    for visit in run.visits:
        if visit["stage"] != "stage2" or (loss := visit["validation_loss"]) is None:
            continue
        total += 1
        idle += abs(last.get(visit["client"], float("inf")) - loss) <= SAME_LOSS
        last[visit["client"]] = loss
    return (idle, total) if idle and idle >= IDLE_SHARE * total else None


def local_only(run: RunRecords, runs: Iterable[RunRecords]) -> dict[int, float]:
    """Return how good the `local` method is by client in the run of the same seed (see `merit`); empty if there is none."""
    local = next((other for other in runs if other.method == "local" and other.seed == run.seed and other.clients), None)
    found = {client["id"]: merit(client) for client in (participants(local) if local else ())}
    return {number: value for number, value in found.items() if value is not None}


def merit(client: Mapping[str, Any], model: str = "personalized") -> Optional[float]:
    """Return the number by which a client's models are compared on its own test samples, the larger the better.

    It is the mean log-likelihood of a token for a language model, otherwise the accuracy.

    Args:
        client: A client's record.
        model: One of its models, by the name under `accuracy`.
    """
    if field_of(client, "language", "nats") is None:
        return field_of(client, "accuracy", model)
    nats = field_of(client, "language", "nats" if model == "personalized" else f"nats_{model}")
    return None if nats is None else -nats


def merits(run: RunRecords, model: str) -> list[float]:
    """Return how good a model of each participant is that has it (see `merit`)."""
    return [value for client in participants(run) if (value := merit(client, model)) is not None]


def below_local(run: RunRecords, runs: Iterable[RunRecords]) -> Optional[float]:
    """Return the share of clients that do worse than by training alone with the same seed (see `merit`), or None if that is unknown."""
    if run.method == "local":
        return None
    alone = local_only(run, runs)
    worse = [own < alone[client["id"]] for client in participants(run)
             if client["id"] in alone and (own := merit(client)) is not None]
    return statistics.fmean(worse) if worse else None


def paired_gap(ours: Sequence[RunRecords], theirs: Sequence[RunRecords],
               value: Callable[[RunRecords], Optional[float]]) -> Optional[Stat]:
    """Return mean and spread over seeds of the difference in a number of the runs, seed by seed; None without a seed in common."""
    other = {r.seed: value(r) for r in theirs}
    gaps = [own - its for r in ours if (own := value(r)) is not None and (its := other.get(r.seed)) is not None]
    return Stat.of(gaps)


def differing_keys(runs: Sequence[RunRecords]) -> list[str]:
    """Return the keys of the run file, but method and seed, in which these runs differ."""
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        return {f"{t}.{k}": v for t, keys in config.items() if isinstance(keys, dict) for k, v in keys.items()}

    configs = [(r.method, flat(r.config)) for r in runs]
    keys = sorted({k for _, c in configs for k in c} - {"run.method", "run.seed"})
    # The table of a method is compared among its own runs.
    return [k for k in keys if len({repr(c.get(k)) for method, c in configs
                                    if registry.method_of_table(k.partition(".")[0]) in (None, method)}) > 1]


def flops_by_round(run: RunRecords) -> list[Optional[float]]:
    """Return the floating-point operations of all clients in each round; None for a round without visits in the records."""
    sums: dict[tuple[str, int], float] = defaultdict(float)
    for visit in run.visits:
        sums[visit["stage"], visit["round"]] += visit.get("flops") or 0
    return [sums.get((line["stage"], line["round"])) for line in run.rounds]


def first_stage_rounds(runs: Iterable[RunRecords]) -> int:
    """Return the number of rounds of stage 1 in the run that has most of them."""
    return max((r["round"] for run in runs for r in run.rounds if r["stage"] == "stage1"), default=0)
