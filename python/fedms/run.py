"""From a run file to a run: the one place that knows model, data, method and engine together."""
from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedms import data, methods, models
from fedms.client import Client
from fedms.config import RunConfig
from fedms.data import Dataset, Partition
from fedms.engine.local import LocalEngine
from fedms.evaluate import evaluate_client, evaluate_unseen, global_test_accuracy, summarise
from fedms.progress import Progress
from fedms.records import RunFolder, RunRecords
from fedms.resident import Part, ResidentModel
from fedms.server import STAGES, Server


def run(config: RunConfig, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Runs one method with one seed into the run folder `out`; returns its summary.

    Raises:
        ConfigError, ModelError, DataError: before anything is written.
        RunFolderError: if the folder exists and `overwrite` is not set, or cannot be written.
        AllClientsFailed: if no client of a round could train.
    """
    progress = progress or Progress()
    try:
        return _run(_Session(config, progress), config, Path(out), overwrite, progress)
    finally:
        progress.close()


def compare(config: RunConfig, names: Sequence[str], seeds: Sequence[int], out: Path, *, overwrite: bool = False,
            progress: Progress | None = None) -> list[dict[str, Any]]:
    """Runs every method with every seed into `out/METHOD-seedN/`, on the same model, data, partition and cache;
    returns the summaries. Raises as `run` does."""
    progress = progress or Progress()
    try:
        session = _Session(config, progress)
        return [_run(session, with_run(config, method=name, seed=seed), Path(out) / f"{name}-seed{seed}", overwrite,
                     progress)
                for seed in seeds for name in names]
    finally:
        progress.close()


def with_run(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with values of its [run] table replaced."""
    return config.model_copy(update={"run": config.run.model_copy(update=values)})


class _Session:
    """What runs that differ in method and seed alone have in common."""

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        torch.set_num_threads(config.run.threads)
        progress.phase(f"loading model {config.model.id}")
        self.foundation = models.load(config.model)
        progress.phase(f"loading data {config.data.name}")
        self.dataset: Dataset = data.load(config.data, self.foundation)
        self.model = ResidentModel(self.foundation, self.dataset, config)


def _run(session: _Session, config: RunConfig, out: Path, overwrite: bool, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    seed = config.run.seed
    partition = data.partition(session.dataset, config.data, config.clients, seed)
    clients = [Client(split, config) for split in partition.clients]
    method = methods.create(config)
    server = Server(config, session.model.order, session.model.block_of, method.carries)
    folder = RunFolder.create(out, config, overwrite=overwrite)
    for note in partition.notes:
        progress.note(note)
    progress.start(_visits(server, config), f"{method.name}, seed {seed}")

    session.model.flops = 0
    engine = LocalEngine(method, server, session.model, clients, folder, progress)
    state = engine.run(server.start(session.model.initial(seed)))

    progress.phase("evaluating")
    final = server.message(state)
    records = [evaluate_client(method, session.model, client, engine.private[client.id], final)
               for client in clients]
    arrives, trained = _evaluate_unseen(method, session.model, partition, config, final)
    for record in (*records, *arrives):
        folder.append_client(record)
    visits = RunRecords.read(out).visits
    return folder.write_summary({
        "method": method.name, "model": config.model.id, "dataset": config.data.name, "seed": seed,
        "rounds": {stage: getattr(config, stage).rounds for stage in STAGES},
        **summarise(records),
        "global_test_accuracy": global_test_accuracy(method, session.model, clients, Part(partition.global_test),
                                                     engine.private, final),
        "unseen_accuracy": None if not arrives else {
            "as_it_arrives": summarise(arrives)["personalised_accuracy"]["mean"],
            "after_training": summarise(trained)["personalised_accuracy"]["mean"] if trained else None},
        "final_depth": {stage: state.final_depth.get(stage) for stage in STAGES},
        "trainable_params": max((v["trained_params"] or 0 for v in visits), default=0),
        "trainable_percent": max((v["trained_percent"] or 0 for v in visits), default=0),
        "bytes_up": sum(v["bytes_up"] for v in visits), "bytes_down": sum(v["bytes_down"] for v in visits),
        "flops": sum(v["flops"] or 0 for v in visits),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": max((v["peak_memory_bytes"] or 0 for v in visits), default=0),
        "notes": [*partition.notes, *_failures(visits)],
    })


def _visits(server: Server, config: RunConfig) -> int:
    per_round = len(server.sample("stage1", 1))
    return per_round * sum(getattr(config, stage).rounds for stage in STAGES)


def _evaluate_unseen(method, model: ResidentModel, partition: Partition, config: RunConfig,
                     final) -> tuple[list[dict], list[dict]]:
    pairs = [evaluate_unseen(method, model, Client(split, config), final, config.stage2.rounds)
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
