"""From a run file to a run: the one place that knows model, data, method and engine together."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedms.config import ConfigError, RunConfig, config_from_dict
from fedms.data import Dataset, Shard
from fedms.data.subset import Subset
from fedms.engines.base import Engine, Interrupted
from fedms.engines.local import LocalEngine
from fedms.federated.client import Client, Message
from fedms.federated.evaluation import evaluate_unseen, mean, shared_accuracy, summarize
from fedms.federated.server import STAGES, AllClientsFailed, Server
from fedms.foreign import few
from fedms.methods import Method
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.runs.experiment import Experiment, LoadedTask, LoadedTasks
from fedms.runs.workers import in_processes
from fedms.storage.records import CONFIG, RunFolder, RunRecords, check_same_config, check_same_data
from fedms.training.expert_model import ExpertModel

if TYPE_CHECKING:
    from flwr.serverapp import Grid

MOST_REASONS = 5        # of failed visits that the summary tells


def run(config: RunConfig, out: Path, *, overwrite: bool = False, resume: bool = False,
        progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
        foundation: FoundationModel | None = None, dataset: Dataset | None = None,
        grid: Grid | None = None, shard: Shard | None = None) -> dict[str, Any]:
    """Runs one method with one seed into the run folder `out`; returns its summary.

    Args:
        overwrite: replace an earlier run in the folder.
        resume: go on with the run in the folder where it stopped; begin it if there is none.
        stop: asked between clients whether to stop; the run can then be resumed.
        foundation, dataset: objects to use in the place of what the run file names (see `models.ModuleModel`,
            `models.wrap` and `data.make_dataset`). Experts are attached to the model, so it serves one run.
        grid, shard: for engine "flower", Flower's access to the clients' nodes and the server's own data.

    Raises:
        ConfigError, ModelError, DataError: before anything is written.
        RunFolderError: if the folder exists and neither `overwrite` nor `resume` is set, or cannot be written.
        CheckpointError: if a checkpoint cannot be written, or none can be read.
        AllClientsFailed: if no client of a round could train, or none could be evaluated.
        Interrupted: if `stop` said so.
    """
    progress = progress or Progress()
    try:
        session = LoadedTask(config, progress, foundation, dataset, shard)
        return _run(session, config, _opener(Path(out), overwrite, resume), progress, stop, grid)
    finally:
        progress.close()


@dataclass(frozen=True)
class Task:
    """One run among several. tested: whether test data are read in the end; without it there is no summary.
    beside: folders of runs that it will be compared with, which must be on the same data."""

    config: RunConfig
    out: Path
    tested: bool = True
    beside: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.config.run.method}, seed {self.config.run.seed}"

    @property
    def visits(self) -> int:
        return self.config.clients.sampled * sum(getattr(self.config, stage).rounds for stage in STAGES)

    def has_ended(self) -> bool:
        """Whether the folder holds this very run, and all of it.

        Raises:
            ConfigError: if the run there has other settings.
            RunFolderError: if it cannot be read.
        """
        if not (self.out / CONFIG).is_file():
            return False
        check_same_config(self.out, self.config)
        past = RunRecords.read(self.out)
        rounds = sum(getattr(self.config, stage).rounds for stage in STAGES)
        return past.summary is not None if self.tested else len(past.rounds) == rounds


def compare(config: RunConfig, names: Sequence[str], seeds: Sequence[int], out: Path, *, overwrite: bool = False,
            jobs: int = 1, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
            settings: Mapping[str, RunConfig] = MappingProxyType({})) -> None:
    """Runs every method with every seed into `out/METHOD-seedN/`, on the same model, data and partition; see `carry_out`.

    Args:
        settings: the configuration of a method, where it is not `config`.
    """
    carry_out([Task(with_run(settings.get(name, config), method=name, seed=seed), Path(out) / f"{name}-seed{seed}")
               for seed in seeds for name in names], overwrite=overwrite, jobs=jobs, progress=progress, stop=stop)


def carry_out(tasks: Sequence[Task], *, overwrite: bool = False, jobs: int = 1, progress: Progress | None = None,
              stop: Callable[[], bool] = lambda: False) -> None:
    """Carries out runs, `jobs` at a time; a run that agrees with the one before it in model and data shares them.

    Runs that have ended stay as they are, those that were stopped go on: a run is found again by its folder and the
    resolved configuration in it.

    Args:
        overwrite: replace earlier runs instead.

    Raises:
        ConfigError: if a folder holds a run with other settings.
        What `run` raises; and `jobs.WorkerDied` if a process died.
    """
    progress = progress or Progress()
    ended = [] if overwrite else [task for task in tasks if task.has_ended()]
    todo = [replace(task, beside=tuple(other.out for other in tasks if not overwrite and other is not task
                                       and (other.config.data, other.config.model) == (task.config.data, task.config.model)))
            for task in tasks if task not in ended]
    if len(todo) < len(tasks):
        progress.note(f"{len(tasks) - len(todo)} of {len(tasks)} runs have ended already and stay as they are")
    try:
        if min(jobs, len(todo)) < 2:
            for task in todo:
                carry_out_one(task, progress, stop, overwrite=overwrite)
            return
        progress.start(sum(task.visits for task in todo), f"{len(todo)} runs in {min(jobs, len(todo))} processes")
        done = 0
        for task, seconds in in_processes(partial(_in_a_worker, overwrite=overwrite), todo, jobs, progress, stop):
            done += 1
            progress.done(f"{task.title}: {seconds:.0f} s ({done} of {len(todo)})")
        if done < len(todo):
            raise Interrupted("the runs under way have stopped between two clients")
    finally:
        progress.close()


def _in_a_worker(task: Task, progress: Progress, stop: Callable[[], bool], *, overwrite: bool) -> float:
    """Returns the seconds that a run took."""
    started = time.perf_counter()
    carry_out_one(task, progress, stop, overwrite=overwrite)
    return time.perf_counter() - started


_sessions = LoadedTasks()      # of this process: most runs of many have model and data in common


def carry_out_one(task: Task, progress: Progress, stop: Callable[[], bool], *,
                  overwrite: bool = False) -> dict[str, Any] | None:
    """One run of many; returns its summary. It goes on where it stopped, unless an earlier one is to be replaced.

    Raises:
        What `run` raises.
    """
    opener = _opener(task.out, overwrite, resume=not overwrite)
    session = _sessions.of(task.config, progress)
    for other in task.beside:
        check_same_data(other, task.config.data.name, session.dataset.fingerprint)
    return _run(session, task.config, opener, progress, stop, tested=task.tested)


def _opener(out: Path, overwrite: bool, resume: bool) -> Callable[[RunConfig], RunFolder]:
    # Opened only once the model and the data are there: a run that cannot begin leaves no folder.
    if resume:
        return lambda config: RunFolder.resume(out, config)
    return lambda config: RunFolder.create(out, config, overwrite=overwrite)


def with_run(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with values of its [run] table replaced.

    Raises:
        ConfigError: if they do not fit the rest of it.
    """
    tables = config.model_dump()
    return config_from_dict({**tables, "run": {**tables["run"], **values}})


def _run(session: LoadedTask, config: RunConfig, open_folder: Callable[[RunConfig], RunFolder], progress: Progress,
         stop: Callable[[], bool], grid: Grid | None = None, tested: bool = True) -> dict[str, Any] | None:
    experiment = session.experiment(config)
    folder = open_folder(experiment.config)
    try:
        folder.keep_data(session.dataset.name, session.dataset.fingerprint)
        if (summary := folder.summary) is not None:
            return summary
        with _engine(folder, session, experiment, progress, stop, grid) as engine:
            return _run_on(engine, folder, session.model, experiment, progress, tested)
    finally:
        folder.close()


@contextmanager
def _engine(folder: RunFolder, session: LoadedTask, experiment: Experiment, progress: Progress, stop: Callable[[], bool],
            grid: Grid | None) -> Iterator[Engine]:
    config, model = experiment.config, session.model
    if config.run.engine == "local":
        yield LocalEngine(experiment.method, experiment.server, model, experiment.clients, Subset(experiment.partition.global_test), folder,
                          progress, stop)
        return
    if session.given:
        raise ConfigError(f"run.engine: {config.run.engine!r} cannot send a model or a data set that is an object of "
                          "this process; name them in the run file, or use engine \"local\"")
    try:
        from fedms.engines.flower.server import FlowerEngine
        from fedms.engines.flower.simulation import simulated_grid
        from fedms.runs.flower_app import simulation_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"run.engine: {config.run.engine!r} needs {error.name}, which is not installed: "
                          "pip install 'fedms[flower]'") from None
    if config.run.engine == "flower":
        yield FlowerEngine(experiment.server, model.fm_params, model.foundation.fingerprint, grid, experiment.fitting, {},
                           config.clients.round_timeout, folder, progress, stop)
        return
    progress.phase("starting Flower's simulation")
    clients = simulation_app(folder.path.absolute() / "clients", config)
    samples = {client.id: (client.n_train, client.n_validation) for client in experiment.clients}
    with simulated_grid(clients, config.clients.count, config.run.threads) as simulated:
        yield FlowerEngine(experiment.server, model.fm_params, model.foundation.fingerprint, simulated, experiment.fitting, samples,
                           None, folder, progress, stop)


def _run_on(engine: Engine, folder: RunFolder, model: ExpertModel, experiment: Experiment, progress: Progress,
            tested: bool) -> dict[str, Any] | None:
    started = time.perf_counter()
    config, method, partition = experiment.config, experiment.method, experiment.partition
    notes = [*partition.notes, *_augmented(config)]
    for note in notes:
        progress.note(note)
    progress.start(_visits(experiment.server, config), f"{method.name}, seed {config.run.seed}")

    model.start()
    common_test = Subset(partition.global_test)
    state = engine.run(method.initial(model))
    if not tested:
        return None

    progress.phase("evaluating")
    final = engine.final_message(state)
    shared = shared_accuracy(method, model, common_test, final)
    evaluations = list(engine.evaluate(final, on_common_test=shared is None and len(common_test) > 0))
    records = [evaluation.record for evaluation in evaluations]
    if not records:
        raise AllClientsFailed("all rounds are done, and no client could be evaluated; --resume asks them again")
    if (missing := config.clients.count - len(records)) > 0:
        notes.append(f"{missing} of {config.clients.count} clients could not be evaluated; the summary is of the others")
    arrives, trained = _evaluate_unseen(method, model, experiment.unseen, final, config.stage2.rounds)
    for record in (*records, *arrives):
        folder.append_client(record)
    past = RunRecords.read(folder.path)
    return folder.write_summary({
        "method": method.name, "model": config.model.id, "fingerprint": model.foundation.fingerprint,
        "dataset": config.data.name, "classes": model.dataset.classes, "prompts": model.dataset.prompts,
        "seed": config.run.seed,
        "rounds": {stage: getattr(config, stage).rounds for stage in STAGES},
        **summarize(records, method.learns_gate),
        "global_test_accuracy": mean([e.on_common_test for e in evaluations]) if shared is None else shared,
        "unseen_accuracy": None if not arrives else {
            "as_it_arrives": summarize(arrives)["personalized_accuracy"]["mean"],
            "after_training": summarize(trained)["personalized_accuracy"]["mean"] if trained else None},
        "final_depth": {stage: state.final_depth.get(stage) for stage in STAGES},
        "trainable_params": max((v["trained_params"] or 0 for v in past.visits), default=0),
        "trainable_percent": max((v["trained_percent"] or 0 for v in past.visits), default=0),
        "bytes_up": sum(v["bytes_up"] for v in past.visits), "bytes_down": sum(v["bytes_down"] for v in past.visits),
        "flops": sum(v["flops"] or 0 for v in past.visits),
        "seconds": engine.seconds_before + time.perf_counter() - started,
        "simulated_seconds": sum(r["simulated_seconds"] or 0 for r in past.rounds)
        if any(r["simulated_seconds"] is not None for r in past.rounds) else None,
        "peak_memory_bytes": max((v["peak_memory_bytes"] or 0 for v in past.visits), default=0),
        "notes": [*notes, *_unvisited(config, method, past.visits), *_failures(past.visits)],
    })


def _visits(server: Server, config: RunConfig) -> int:
    per_round = len(server.sample("stage1", 1))
    return per_round * sum(getattr(config, stage).rounds for stage in STAGES)


def _evaluate_unseen(method: Method, model: ExpertModel, clients: Sequence[Client], final: Message,
                     rounds: int) -> tuple[list[dict], list[dict]]:
    pairs = [evaluate_unseen(method, model, client, final, rounds) for client in clients]
    return [first for first, _ in pairs], [after for _, after in pairs if after is not None]


def _augmented(config: RunConfig) -> list[str]:
    """What a run says where it keeps less than it otherwise would."""
    how = " and ".join(config.data.augment)
    return [f"training images are augmented ({how}), so nothing that is computed of them is cached"] if how else []


def _failures(visits: list[dict[str, Any]]) -> list[str]:
    """A line for each reason for which clients failed, the most frequent ones first."""
    failed: dict[str, list[dict[str, Any]]] = {}
    for visit in visits:
        if visit["status"] == "failed":
            failed.setdefault(str(visit["reason"]), []).append(visit)
    lines = []
    for reason, each in sorted(failed.items(), key=lambda item: -len(item[1])):
        clients = sorted({visit["client"] for visit in each})
        lines.append(f"{len(each)} visits failed, of client{'s' * (len(clients) > 1)} {few(clients)}; first in "
                     f"{each[0]['stage']}, round {each[0]['round']}: {reason}")
    return lines if len(lines) <= MOST_REASONS else [
        *lines[:MOST_REASONS], f"visits failed for {len(lines) - MOST_REASONS:,} more reasons, which visits.jsonl names"]


def _unvisited(config: RunConfig, method: Method, visits: list[dict[str, Any]]) -> list[str]:
    """Says how many clients were never chosen in the stages in which the method trains what is a client's own."""
    stages = [stage for stage in method.personal if getattr(config, stage).rounds]
    if not stages:
        return []
    trained = {visit["client"] for visit in visits if visit["stage"] in stages and visit["status"] == "ok"}
    missing = config.clients.count - len(trained)
    where = " and ".join(stage.replace("stage", "stage ") for stage in stages)
    return [f"{missing} of {config.clients.count} clients were never trained in {where}, so they have learned nothing of their "
            "own and answer with what all begin with; a larger clients.fraction or more rounds reach them"] if missing else []
