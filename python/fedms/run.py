"""From a run file to a run: the one place that knows model, data, method and engine together."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedms import data, methods, models
from fedms.client import Client
from fedms.config import RunConfig
from fedms.costs import fitting_depths
from fedms.data import Dataset, Partition
from fedms.engine.local import Interrupted, LocalEngine
from fedms.evaluate import evaluate_client, evaluate_unseen, global_test_accuracy, summarise
from fedms.methods import Method
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.records import RunFolder, RunRecords
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


def compare(config: RunConfig, names: Sequence[str], seeds: Sequence[int], out: Path, *, overwrite: bool = False,
            resume: bool = False, progress: Progress | None = None,
            stop: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
    """Runs every method with every seed into `out/METHOD-seedN/`, on the same model, data, partition and cache;
    returns the summaries. Arguments and errors are those of `run`; on resume, runs that have ended stay as they are."""
    progress = progress or Progress()
    try:
        session = _Session(config, progress)
        summaries = []
        for seed in seeds:
            for name in names:
                one = with_run(config, method=name, seed=seed)
                opener = _opener(one, Path(out) / f"{name}-seed{seed}", overwrite, resume)
                summaries.append(_run(session, one, opener, progress, stop))
        return summaries
    finally:
        progress.close()


def _opener(config: RunConfig, out: Path, overwrite: bool, resume: bool) -> Callable[[], RunFolder]:
    # Opened only once the model and the data are there: a run that cannot begin leaves no folder.
    if resume:
        return lambda: RunFolder.resume(out, config)
    return lambda: RunFolder.create(out, config, overwrite=overwrite)


def with_run(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with values of its [run] table replaced."""
    return config.model_copy(update={"run": config.run.model_copy(update=values)})


class _Session:
    """What runs that differ in method and seed alone have in common."""

    def __init__(self, config: RunConfig, progress: Progress, foundation: FoundationModel | None = None,
                 dataset: Dataset | None = None) -> None:
        torch.set_num_threads(config.run.threads)
        progress.phase(f"loading model {config.model.id}")
        self.foundation = foundation or models.load(config.model)
        progress.phase(f"loading data {config.data.name}")
        self.dataset = dataset or data.load(config.data, self.foundation)
        self.model = ResidentModel(self.foundation, self.dataset, config)


def _run(session: _Session, config: RunConfig, open_folder: Callable[[], RunFolder], progress: Progress,
         stop: Callable[[], bool]) -> dict[str, Any]:
    partition = data.partition(session.dataset, config.data, config.clients, config.run.seed)
    method = methods.create(config)
    server = Server(config, session.model.order, session.model.block_of, method.carries)
    fitting = fitting_depths(session.model, method, config, partition)
    folder = open_folder()
    try:
        return folder.summary or _run_into(folder, session, config, partition, method, server, fitting, progress, stop)
    finally:
        folder.close()


def _run_into(folder: RunFolder, session: _Session, config: RunConfig, partition: Partition, method: Method,
              server: Server, fitting: Sequence[int | None], progress: Progress,
              stop: Callable[[], bool]) -> dict[str, Any]:
    started = time.perf_counter()
    seed = config.run.seed
    for note in partition.notes:
        progress.note(note)
    progress.start(_visits(server, config), f"{method.name}, seed {seed}")

    session.model.start()
    clients = [Client(split, config, fitting) for split in partition.clients]
    engine = LocalEngine(method, server, session.model, clients, folder, progress, stop)
    state = engine.run(method.initial(session.model))

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
