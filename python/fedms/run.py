"""From a run file to a run: the one place that knows model, data, method and engine together."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fedms import data, methods, models
from fedms.client import Client
from fedms.config import RunConfig, config_from_dict
from fedms.costs import fitting_depths
from fedms.data import Dataset, Partition
from fedms.engine.local import Interrupted, LocalEngine
from fedms.evaluate import evaluate_client, evaluate_unseen, global_test_accuracy, summarise
from fedms.jobs import in_processes
from fedms.meter import hand_back_large_blocks
from fedms.methods import Method
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.records import CONFIG, RunFolder, RunRecords, check_same_config
from fedms.resident import Part, ResidentModel
from fedms.server import STAGES, Server


def run(config: RunConfig, out: Path, *, overwrite: bool = False, resume: bool = False,
        progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
        foundation: FoundationModel | None = None, dataset: Dataset | None = None) -> dict[str, Any]:
    """Runs one method with one seed into the run folder `out`; returns its summary.

    Args:
        overwrite: replace an earlier run in the folder.
        resume: go on with the run in the folder where it stopped; begin it if there is none.
        stop: asked between clients whether to stop; the run can then be resumed.
        foundation, dataset: objects to use in the place of what the run file names (see `models.ModuleModel`,
            `models.wrap` and `data.make_dataset`). Experts are attached to the model, so it serves one run.

    Raises:
        ConfigError, ModelError, DataError: before anything is written.
        RunFolderError: if the folder exists and neither `overwrite` nor `resume` is set, or cannot be written.
        CheckpointError: if a checkpoint cannot be written, or none can be read.
        AllClientsFailed: if no client of a round could train.
        Interrupted: if `stop` said so.
    """
    progress = progress or Progress()
    try:
        session = _Session(config, progress, foundation, dataset)
        return _run(session, config, _opener(config, Path(out), overwrite, resume), progress, stop)
    finally:
        progress.close()


@dataclass(frozen=True)
class Task:
    """One run among several. tested: whether test data are read in the end; without it there is no summary."""

    config: RunConfig
    out: Path
    tested: bool = True

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
    """Carries out runs that agree in model, data, experts and the gate's shape, `jobs` at a time.

    Runs that have ended stay as they are, those that were stopped go on: a run is found again by its folder and the
    resolved configuration in it.

    Args:
        overwrite: replace earlier runs instead.

    Raises:
        ConfigError: if a folder holds a run with other settings.
        What `run` raises; and `jobs.WorkerDied` if a process died.
    """
    progress = progress or Progress()
    todo = [task for task in tasks if overwrite or not task.has_ended()]
    if len(todo) < len(tasks):
        progress.note(f"{len(tasks) - len(todo)} of {len(tasks)} runs have ended already and stay as they are")
    try:
        if min(jobs, len(todo)) < 2:
            session: list[_Session] = []
            for task in todo:
                _carry_out(task, overwrite, session, progress, stop)
            return
        progress.start(sum(task.visits for task in todo), f"{len(todo)} runs in {min(jobs, len(todo))} processes")
        ended = 0
        for task, seconds in in_processes(partial(_in_a_worker, overwrite=overwrite), todo, jobs, progress, stop):
            ended += 1
            progress.done(f"{task.title}: {seconds:.0f} s ({ended} of {len(todo)})")
        if ended < len(todo):
            raise Interrupted("the runs under way have stopped between two clients")
    finally:
        progress.close()


_session_of_worker: list[_Session] = []


def _in_a_worker(task: Task, progress: Progress, stop: Callable[[], bool], *, overwrite: bool) -> float:
    """Carries out a run in a process that keeps its model for the next one; returns the seconds it took."""
    started = time.perf_counter()
    _carry_out(task, overwrite, _session_of_worker, progress, stop)
    return time.perf_counter() - started


def _carry_out(task: Task, overwrite: bool, session: list[_Session], progress: Progress,
               stop: Callable[[], bool]) -> None:
    """`session`: what is loaded already, if anything; filled here."""
    if not session:
        session.append(_Session(task.config, progress))
    opener = _opener(task.config, task.out, overwrite, resume=not overwrite)
    _run(session[0], task.config, opener, progress, stop, task.tested)


def _opener(config: RunConfig, out: Path, overwrite: bool, resume: bool) -> Callable[[], RunFolder]:
    # Opened only once the model and the data are there: a run that cannot begin leaves no folder.
    if resume:
        return lambda: RunFolder.resume(out, config)
    return lambda: RunFolder.create(out, config, overwrite=overwrite)


def with_run(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with values of its [run] table replaced.

    Raises:
        ConfigError: if they do not fit the rest of it.
    """
    tables = config.model_dump()
    return config_from_dict({**tables, "run": {**tables["run"], **values}})


class _Session:
    """What runs that differ in method and seed alone have in common."""

    def __init__(self, config: RunConfig, progress: Progress, foundation: FoundationModel | None = None,
                 dataset: Dataset | None = None) -> None:
        hand_back_large_blocks()
        torch.set_num_threads(config.run.threads)
        progress.phase(f"loading model {config.model.id}")
        self.foundation = foundation or models.load(config.model)
        progress.phase(f"loading data {config.data.name}")
        self.dataset = dataset or data.load(config.data, self.foundation)
        self.model = ResidentModel(self.foundation, self.dataset, config)


def _run(session: _Session, config: RunConfig, open_folder: Callable[[], RunFolder], progress: Progress,
         stop: Callable[[], bool], tested: bool = True) -> dict[str, Any] | None:
    partition = data.partition(session.dataset, config.data, config.clients, config.run.seed)
    method = methods.create(config)
    server = Server(config, session.model.order, session.model.block_of, method.carries)
    fitting = fitting_depths(session.model, method, config, partition)
    folder = open_folder()
    try:
        return folder.summary or _run_into(folder, session, config, partition, method, server, fitting, progress, stop,
                                           tested)
    finally:
        folder.close()


def _run_into(folder: RunFolder, session: _Session, config: RunConfig, partition: Partition, method: Method,
              server: Server, fitting: Sequence[int | None], progress: Progress,
              stop: Callable[[], bool], tested: bool) -> dict[str, Any] | None:
    started = time.perf_counter()
    seed = config.run.seed
    for note in partition.notes:
        progress.note(note)
    progress.start(_visits(server, config), f"{method.name}, seed {seed}")

    session.model.start()
    clients = [Client(split, config, fitting) for split in partition.clients]
    engine = LocalEngine(method, server, session.model, clients, folder, progress, stop)
    state = engine.run(method.initial(session.model))
    if not tested:
        return None

    progress.phase("evaluating")
    final = engine.final_message(state)
    records = []
    for client in clients:
        if stop():
            raise Interrupted("all rounds are done, evaluation is not")
        records.append(evaluate_client(method, session.model, client, engine.private[client.id], final))
    arrives, trained = _evaluate_unseen(method, session.model, partition, config, fitting, final)
    for record in (*records, *arrives):
        folder.append_client(record)
    past = RunRecords.read(folder.path)
    return folder.write_summary({
        "method": method.name, "model": config.model.id, "fingerprint": session.foundation.fingerprint,
        "dataset": config.data.name, "classes": session.dataset.classes, "prompts": session.dataset.prompts, "seed": seed,
        "rounds": {stage: getattr(config, stage).rounds for stage in STAGES},
        **summarise(records),
        "global_test_accuracy": global_test_accuracy(method, session.model, clients, Part(partition.global_test),
                                                     engine.private, final),
        "unseen_accuracy": None if not arrives else {
            "as_it_arrives": summarise(arrives)["personalised_accuracy"]["mean"],
            "after_training": summarise(trained)["personalised_accuracy"]["mean"] if trained else None},
        "final_depth": {stage: state.final_depth.get(stage) for stage in STAGES},
        "trainable_params": max((v["trained_params"] or 0 for v in past.visits), default=0),
        "trainable_percent": max((v["trained_percent"] or 0 for v in past.visits), default=0),
        "bytes_up": sum(v["bytes_up"] for v in past.visits), "bytes_down": sum(v["bytes_down"] for v in past.visits),
        "flops": sum(v["flops"] or 0 for v in past.visits),
        "seconds": engine.seconds_before + time.perf_counter() - started,
        "simulated_seconds": sum(r["simulated_seconds"] or 0 for r in past.rounds)
        if any(r["simulated_seconds"] is not None for r in past.rounds) else None,
        "peak_memory_bytes": max((v["peak_memory_bytes"] or 0 for v in past.visits), default=0),
        "notes": [*partition.notes, *_failures(past.visits)],
    })


def _visits(server: Server, config: RunConfig) -> int:
    per_round = len(server.sample("stage1", 1))
    return per_round * sum(getattr(config, stage).rounds for stage in STAGES)


def _evaluate_unseen(method, model: ResidentModel, partition: Partition, config: RunConfig,
                     fitting: Sequence[int | None], final) -> tuple[list[dict], list[dict]]:
    pairs = [evaluate_unseen(method, model, Client(split, config, fitting), final, config.stage2.rounds)
             for split in partition.unseen]
    return [first for first, _ in pairs], [after for _, after in pairs if after is not None]


def _failures(visits: list[dict[str, Any]]) -> list[str]:
    """One line for each client that failed."""
    failed: dict[int, list[dict[str, Any]]] = {}
    for visit in visits:
        if visit["status"] == "failed":
            failed.setdefault(visit["client"], []).append(visit)
    return [f"client {client} failed {len(each)} times; first in {each[0]['stage']}, round {each[0]['round']}: "
            f"{each[0]['reason']}" for client, each in sorted(failed.items())]
