"""`fedms tune`: the same number of trials for every method over its own main constants, judged on validation data.

Trials are points of a Sobol sequence (`scipy.stats.qmc`), not proposals of a sequential optimizer: with eight of them a
model of the results would have nothing to go by, and as each trial is known in advance they run side by side, and a
tuning that was killed goes on by its run folders. The first trial is the run file as it stands.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from scipy.stats import qmc

from fedms.config import METHODS, ConfigError, RunConfig, config_from_dict, read_tables
from fedms.progress import Progress
from fedms.runs.run import Task, carry_out, with_run
from fedms.storage.durable import write_durably
from fedms.storage.records import RunFolderError, RunRecords


@dataclass(frozen=True)
class Constant:
    """What is tuned: a key of the run file and its range; `log`: uniform in the logarithm; `whole`: integers."""

    key: str
    low: float
    high: float
    log: bool = True
    whole: bool = False

    def at(self, share: float) -> float | int:
        """The value at a share in [0, 1) of the range, to three significant digits."""
        if self.whole:
            return int(self.low + share * (self.high - self.low + 1))
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.3g}")


# Both rates: every method trains in both stages.
RATES = (Constant("stage1.lr", 1e-3, 2e-2), Constant("stage2.lr", 1e-4, 1e-2))
GATE = (Constant("gate.lr", 1e-4, 1e-2), Constant("stage2.own_loss", 0.0, 2.0, log=False))
OWN: dict[str, tuple[Constant, ...]] = {
    "fedprox": (Constant("fedprox.mu", 1e-3, 1.0),),
    "fedrep": (Constant("fedrep.head_epochs", 1, 3, whole=True),),
    "ditto": (Constant("ditto.pull", 1e-2, 10.0),),
    "apfl": (Constant("apfl.alpha", 0.1, 0.9, log=False),),
    "feddpa": (Constant("feddpa.scale", 0.25, 4.0),),
    "fedms": GATE,
    "fedms_plus": GATE,
}
SHARE_OF_ROUNDS = 0.25


def constants(method: str) -> tuple[Constant, ...]:
    """What is tuned of a method."""
    return (*RATES, *OWN.get(method, ()))


def trials(config: RunConfig, method: str, count: int) -> list[dict[str, Any]]:
    """The values of each trial by key; the first one those of the run file. Drawn from the run's seed."""
    tuned = constants(method)
    values = config.model_dump()
    first = {c.key: values[c.key.split(".")[0]][c.key.split(".")[1]] for c in tuned}
    sobol = qmc.Sobol(len(tuned), scramble=True, seed=config.run.seed)
    points = sobol.random_base2(max(0, math.ceil(math.log2(max(1, count - 1)))))[:count - 1]
    return [first, *({c.key: c.at(share) for c, share in zip(tuned, point.tolist())} for point in points)]


@dataclass(frozen=True)
class Trial:
    """values: by key. score: validation accuracy after the last round; loss: validation loss there."""

    method: str
    number: int
    values: dict[str, Any]
    folder: Path
    score: float | None = None
    loss: float | None = None

    @property
    def rank(self) -> tuple[float, float, int]:
        """Lower is better: accuracy first, then loss, then the earlier trial."""
        return (-(self.score or 0.0), math.inf if self.loss is None else self.loss, self.number)


def tune(config: RunConfig, names: Sequence[str], out: Path, *, count: int = 8, jobs: int = 1,
         overwrite: bool = False, progress: Progress | None = None,
         stop: Callable[[], bool] = lambda: False) -> list[Trial]:
    """Runs `count` trials of every method at a quarter of the rounds, and writes `out/METHOD.toml`, which holds the best
    one's values; returns all trials. No test label is read. Trials that have ended stay as they are.

    Args:
        out: trials lie in `out/trials/METHOD-N/`.

    Raises:
        What `run.carry_out` raises.
    """
    planned = [Trial(name, number, values, Path(out) / "trials" / f"{name}-{number}")
               for name in names for number, values in enumerate(trials(config, name, count))]
    carry_out([Task(trial_config(config, trial), trial.folder, tested=False) for trial in planned],
              overwrite=overwrite, jobs=jobs, progress=progress, stop=stop)
    found = [_judged(trial) for trial in planned]
    for name in names:
        best = min((trial for trial in found if trial.method == name), key=lambda trial: trial.rank)
        _write(Path(out) / f"{name}.toml", best, count, config)
    return found


def trial_config(config: RunConfig, trial: Trial) -> RunConfig:
    """The run of a trial: its values, at a quarter of the rounds."""
    short = {f"{stage}.rounds": math.ceil(SHARE_OF_ROUNDS * getattr(config, stage).rounds)
             for stage in ("stage1", "stage2")}
    return replaced(with_run(config, method=trial.method), {**short, **trial.values})


def replaced(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with other values, by dotted key.

    Raises:
        ConfigError: if they are not accepted.
    """
    tables = config.model_dump()
    for key, value in values.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return config_from_dict(tables)


def chosen(folder: Path, config: RunConfig) -> dict[str, RunConfig]:
    """The configurations of the methods that have a file in a folder that `tune` wrote: `config` with their values.

    Raises:
        ConfigError: if a file cannot be read, or holds what is no key.
        RunFolderError: if the folder holds no choice.
    """
    found = {}
    for name in METHODS:
        if (path := Path(folder) / f"{name}.toml").is_file():
            found[name] = replaced(config, _choice(path))
    if not found:
        raise RunFolderError(f"{folder}: holds no METHOD.toml; fedms tune writes them")
    return found


def _choice(path: Path) -> dict[str, Any]:
    """The values in a file of `tune`, by dotted key. It chooses constants alone: no data, no model, no code."""
    values = {}
    for table, keys in read_tables(path).items():
        for key, value in keys.items() if isinstance(keys, dict) else [("", keys)]:
            name = f"{table}.{key}"
            if type(value) not in (int, float) or table in ("model", "data", "run"):
                raise ConfigError(f"{path}: {name}: got {value!r}; accepted: numbers of the tables of a method, as fedms tune "
                                  "writes them")
            values[name] = value
    return values


def _judged(trial: Trial) -> Trial:
    last = RunRecords.read(trial.folder).rounds[-1]
    return Trial(trial.method, trial.number, trial.values, trial.folder, last["validation_accuracy"],
                 last["validation_loss"])


def _write(path: Path, best: Trial, count: int, config: RunConfig) -> None:
    tables: dict[str, dict[str, Any]] = {}
    for key, value in best.values.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    score = "unknown" if best.score is None else f"{100 * best.score:.1f} %"
    head = (f"# {best.method} on {config.data.name}: trial {best.number} of {count} (0 is the run file as it was), "
            f"validation accuracy {score}\n# at a quarter of the rounds. fedms compare --tuned reads this.\n\n")
    try:
        write_durably(path, (head + tomli_w.dumps(tables)).encode())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from error
