"""Many runs: the methods of a comparison, the trials of a tuning, one after the other or in several processes."""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedms.config import RunConfig, with_run
from fedms.errors import Interrupted
from fedms.federated.server import STAGES
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTasks, data_mark
from fedms.runs.run import opener, run_on
from fedms.runs.workers import Work, in_processes
from fedms.storage.records import CONFIG, RunRecords
from fedms.storage.run_folder import check_same_config, check_same_data
from fedms.storage.validation import VALIDATION
from fedms.training.device import one_gpu_each

SHARED_VISITS = ".shared-visits"        # beside the run folders


@dataclass(frozen=True)
class BatchRun:
    """One run among many.

    Attributes:
        config: Its run file.
        out: Its run folder.
        tested: Whether test data are read at the end. Without it there is no summary.
        beside: Folders of runs that it will be compared with, which must be on the same data.
    """

    config: RunConfig
    out: Path
    tested: bool = True
    beside: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """The run in words, for progress."""
        return f"{self.config.run.method}, seed {self.config.run.seed}"

    @property
    def visits(self) -> int:
        """Number of client visits that the run makes."""
        return self.config.clients.awaited * sum(getattr(self.config, stage).rounds for stage in STAGES)

    def has_ended(self) -> bool:
        """Tell whether the folder holds this very run, and all of it.

        Raises:
            ConfigError: If the run there has other settings.
            RunFolderError: If it cannot be read.
        """
        if not (self.out / CONFIG).is_file():
            return False
        check_same_config(self.out, self.config)
        return RunRecords.read(self.out).summary is not None if self.tested else (self.out / VALIDATION).is_file()


class BatchRunner:
    """Carries out runs one after the other. Runs that agree in model and data share them.

    Args:
        shared: Folder of the visits that runs have in common, of this process or others; None to share none.
    """

    def __init__(self, shared: Path | None = None) -> None:
        self._tasks, self._shared = LoadedTasks(), shared

    def __call__(self, run: BatchRun, progress: Progress, stop: Callable[[], bool], *,
                 overwrite: bool = False) -> dict[str, Any] | None:
        """Carry out one run, or go on with it where it stopped.

        Args:
            run: The run.
            progress: Told of its progress.
            stop: Asked between clients whether to stop.
            overwrite: Replace an earlier run in its folder, instead of going on with it.

        Returns:
            Its summary, or None for a run that is not tested.

        Raises:
            FedMSError: What :func:`fedms.runs.run.run` raises.
        """
        open_folder = opener(run.out, overwrite, resume=not overwrite)
        task = self._tasks.of(run.config, progress)
        for other in run.beside:
            check_same_data(other, run.config.data.name, data_mark(run.config, task.dataset))
        return run_on(task, run.config, open_folder, progress, stop, tested=run.tested, shared=self._shared)


def compare(config: RunConfig, names: Sequence[str], seeds: Sequence[int], out: Path, *, overwrite: bool = False,
            jobs: int = 1, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
            settings: Mapping[str, RunConfig] = MappingProxyType({}), share: bool = True) -> None:
    """Run every method with every seed into `out/METHOD-seedN/`, on the same model, data and partition.

    Runs that have ended already stay as they are, those that were stopped go on; see :func:`carry_out`.

    Args:
        config: The run file.
        names: Methods.
        seeds: Seeds.
        out: Folder of the run folders.
        overwrite: Replace earlier runs instead of going on with them.
        jobs: Number of runs at a time, each in a process of its own if there are several.
        progress: Told of the progress of all runs.
        stop: Asked between clients whether to stop; the runs can then be resumed.
        settings: The run file of a method, where it is not `config`.
        share: Whether a visit that several runs have in common is made by one of them alone.

    Raises:
        FedMSError: What :func:`carry_out` raises.
    """
    carry_out([BatchRun(with_run(settings.get(name, config), method=name, seed=seed), Path(out) / f"{name}-seed{seed}")
               for seed in seeds for name in names], overwrite=overwrite, jobs=jobs, progress=progress, stop=stop,
              shared=Path(out) / SHARED_VISITS if share else None)


def carry_out(runs: Sequence[BatchRun], *, overwrite: bool = False, jobs: int = 1, progress: Progress | None = None,
              stop: Callable[[], bool] = lambda: False, shared: Path | None = None) -> None:
    """Carry out many runs, `jobs` at a time.

    Runs that have ended stay as they are, those that were stopped go on. A run is found again by its folder and the
    resolved configuration in it.

    Args:
        runs: The runs.
        overwrite: Replace earlier runs instead.
        jobs: Number of processes.
        progress: Told of the progress of all runs.
        stop: Asked between clients whether to stop.
        shared: Folder of the visits that runs have in common, which goes when all runs have ended; None to share none.

    Raises:
        ConfigError: If a folder holds a run with other settings.
        Interrupted: If `stop` said so.
        WorkerDied: If a process died.
        FedMSError: What :func:`fedms.runs.run.run` raises.
    """
    progress = progress or Progress()
    ended = [] if overwrite else [run for run in runs if run.has_ended()]
    todo = [replace(run, beside=() if overwrite else _beside(run, runs)) for run in runs if run not in ended]
    if len(todo) < len(runs):
        progress.note(f"{len(runs) - len(todo)} of {len(runs)} runs have ended already and stay as they are")
    if shared is not None and overwrite:
        shutil.rmtree(shared, ignore_errors=True)
    try:
        _carry_out(todo, overwrite, jobs, progress, stop, shared)
    finally:
        progress.close()
    if shared is not None:
        shutil.rmtree(shared, ignore_errors=True)


def _carry_out(todo: Sequence[BatchRun], overwrite: bool, jobs: int, progress: Progress, stop: Callable[[], bool],
               shared: Path | None) -> None:
    """Carry out runs that have not ended yet. The arguments are those of `carry_out`."""
    if min(jobs, len(todo)) < 2:
        carry_out_one = BatchRunner(shared)
        for run in todo:
            carry_out_one(run, progress, stop, overwrite=overwrite)
        return
    progress.start(sum(run.visits for run in todo), f"{len(todo)} runs in {min(jobs, len(todo))} processes")
    done = 0
    with closing(in_processes(partial(_timed_runner, overwrite=overwrite, shared=shared), todo, jobs, progress, stop,
                              one_gpu_each(*(run.config.run.device for run in todo)))) as ended:
        for run, seconds in ended:
            done += 1
            progress.done(f"{run.title}: {seconds:.0f} s ({done} of {len(todo)})")
    if done < len(todo):
        raise Interrupted("the runs under way have stopped between two clients")


def _beside(run: BatchRun, runs: Sequence[BatchRun]) -> tuple[Path, ...]:
    """Return the folders of the other runs on the same model and data."""
    return tuple(other.out for other in runs if other is not run
                 and (other.config.data, other.config.model) == (run.config.data, run.config.model))


def _timed_runner(overwrite: bool, shared: Path | None) -> Work[BatchRun, float]:
    """Return what a worker process does with each run that it is given: it returns the seconds that the run took."""
    carry_out_one = BatchRunner(shared)

    def timed(run: BatchRun, progress: Progress, stop: Callable[[], bool]) -> float:
        started = time.perf_counter()
        carry_out_one(run, progress, stop, overwrite=overwrite)
        return time.perf_counter() - started

    return timed
