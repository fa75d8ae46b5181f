"""`fedms tune`: the same number of trials for every method over its own main constants, judged on validation data.

Trials are points of a Sobol sequence (`scipy.stats.qmc`), not proposals of a sequential optimizer: with eight of them a
model of the results would have nothing to go by, and as each trial is known in advance they run side by side, and a
tuning that was killed goes on by its run folders. The first trial is the run file as it stands.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
from scipy.stats import qmc

from fedms.config import Constant, RunConfig, config_from_dict, read_tables, registry, with_run
from fedms.errors import ConfigError, RunFolderError
from fedms.progress import Progress, validation_words
from fedms.runs.batch import SHARED_VISITS, BatchRun, carry_out
from fedms.storage.durable import write_durably
from fedms.storage.validation import read_validation

# Every method trains in both stages. In stage 2 of a method that has stages a client trains alone, on few samples; the mean of
# many clients bears larger steps.
STAGE1_RATE = Constant("stage1.lr", 1e-3, 2e-2)
PRIVATE_RATE, SHARED_RATE = Constant("stage2.lr", 3e-4, 3e-3), Constant("stage2.lr", 3e-4, 1e-2)
SHARE_OF_ROUNDS = 0.25
LEAST_OF_STAGE2 = 2     # rounds: after a single one, a rate that fits too fast looks best


def constants(method: str) -> tuple[Constant, ...]:
    """Return the constants of a method that are tuned."""
    row = registry.methods()[method]
    return (STAGE1_RATE, PRIVATE_RATE if row.two_stages else SHARED_RATE, *row.tuned)


def trials(config: RunConfig, method: str, count: int) -> list[dict[str, Any]]:
    """Return the values of each trial by dotted key. The first trial is the run file; the others depend on its seed."""
    tuned = constants(method)
    values = config.model_dump()
    first = {c.key: values[c.key.split(".")[0]][c.key.split(".")[1]] for c in tuned}
    sobol = qmc.Sobol(len(tuned), scramble=True, seed=config.run.seed)
    points = sobol.random_base2(max(0, math.ceil(math.log2(max(1, count - 1)))))[:count - 1]
    return [first, *({c.key: c.at(share) for c, share in zip(tuned, point.tolist())} for point in points)]


@dataclass(frozen=True)
class Trial:
    """One trial of a method.

    Attributes:
        task: Kind of the run file's task.
        method: Name of the method.
        number: Number of the trial, from 0 on; 0 is the run file as it stands.
        values: Values of its constants, by dotted key.
        folder: Its run folder.
        score: Accuracy in [0, 1] of what the method answers in the end about validation samples; None before it has run, or
            without validation data.
        loss: Loss there.
    """

    task: str
    method: str
    number: int
    values: dict[str, Any]
    folder: Path
    score: float | None = None
    loss: float | None = None

    @property
    def rank(self) -> tuple[float, float, int]:
        """A key by which the best trial is the smallest: accuracy first, then loss, then the earlier trial.

        Language models are compared by their loss alone, as reports do.
        """
        accuracy = 0.0 if self.score is None or self.task == "causal_lm" else self.score
        return (-accuracy, math.inf if self.loss is None else self.loss, self.number)

    @property
    def words(self) -> str:
        """The result on validation samples: an accuracy, or a language model's perplexity."""
        return validation_words(self.task, {"validation_accuracy": self.score, "validation_loss": self.loss})


def tune(config: RunConfig, names: Sequence[str], out: Path, *, count: int = 8, jobs: int = 1,
         overwrite: bool = False, progress: Progress | None = None,
         stop: Callable[[], bool] = lambda: False) -> list[Trial]:
    """Run the same number of trials for every method, at a quarter of the rounds, and write down the best values.

    No test label is read. Trials that have ended already stay as they are.

    Args:
        config: The run file.
        names: Methods.
        out: Folder to write: `METHOD.toml` with the best values of each method, and `trials/METHOD-N/` for each trial.
        count: Number of trials of each method.
        jobs: Number of runs at a time.
        overwrite: Replace earlier trials instead of going on with them.
        progress: Told of the progress of all trials.
        stop: Asked between clients whether to stop.

    Returns:
        All trials.

    Raises:
        ConfigError: If the run file has privacy on.
        FedMSError: What :func:`fedms.runs.batch.carry_out` raises.
    """
    if config.privacy.mode != "off":
        raise ConfigError(f"privacy.mode: got {config.privacy.mode!r}; trials are judged by the clients' validation, each would be a "
                          "release, and no budget counts them together; tune on other data with privacy.mode off")
    planned = [Trial(config.task.kind, name, number, values, Path(out) / "trials" / f"{name}-{number}")
               for name in names for number, values in enumerate(trials(config, name, count))]
    carry_out([BatchRun(trial_config(config, trial), trial.folder, tested=False) for trial in planned],
              overwrite=overwrite, jobs=jobs, progress=progress, stop=stop, shared=Path(out) / SHARED_VISITS)
    found = [_judged(trial) for trial in planned]
    for name in names:
        best = min((trial for trial in found if trial.method == name), key=lambda trial: trial.rank)
        _write(Path(out) / f"{name}.toml", best, count, config)
    return found


def trial_config(config: RunConfig, trial: Trial) -> RunConfig:
    """Return the run file of a trial: its values, at a quarter of the rounds, but two of stage 2 at least.

    A trial runs in this process, whatever the engine: all of them give the same bits.
    """
    first, second = config.stage1.rounds, config.stage2.rounds
    short = {"stage1.rounds": math.ceil(SHARE_OF_ROUNDS * first),
             "stage2.rounds": min(second, max(LEAST_OF_STAGE2, math.ceil(SHARE_OF_ROUNDS * second)))}
    return replaced(with_run(config, method=trial.method, engine="local"), {**short, **trial.values})


def replaced(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Return the configuration with other values, given by dotted key. ConfigError if they are not accepted."""
    tables = config.model_dump()
    for key, value in values.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return config_from_dict(tables)


def chosen(folder: Path, config: RunConfig) -> dict[str, RunConfig]:
    """Return the run file of each method that has a file in a folder that :func:`tune` wrote.

    Args:
        folder: The folder with METHOD.toml files.
        config: The run file that their values are put into.

    Raises:
        ConfigError: If a file cannot be read, or holds anything but numbers of known keys.
        RunFolderError: If the folder holds no such file.
    """
    found = {}
    for name in registry.methods():
        if (path := Path(folder) / f"{name}.toml").is_file():
            found[name] = replaced(config, _choice(path))
    if not found:
        raise RunFolderError(f"{folder}: holds no file METHOD.toml of any method; `fedms tune SOURCE --out {folder}` "
                             "writes them")
    return found


def _choice(path: Path) -> dict[str, Any]:
    """Return the values in a file of :func:`tune`, by dotted key.

    Only numbers are accepted: such a file must not choose data, a model, or code.
    """
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
    score, loss = read_validation(trial.folder)
    return replace(trial, score=score, loss=loss)


def _write(path: Path, best: Trial, count: int, config: RunConfig) -> None:
    tables: dict[str, dict[str, Any]] = {}
    for key, value in best.values.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    head = (f"# {best.method} on {config.data.name}: trial {best.number} of {count} (0 is the run file as it was), "
            f"on validation samples {best.words}\n# at a quarter of the rounds. fedms compare --tuned reads this.\n\n")
    try:
        write_durably(path, (head + tomli_w.dumps(tables)).encode())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from error
