"""One run in five steps: load, build, train, evaluate, summarize."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch

from fedms.config import RunConfig, with_run
from fedms.data import Dataset, Shard
from fedms.data.subset import Subset
from fedms.engines.base import Engine
from fedms.engines.local import LocalEngine
from fedms.engines.visitor import Visitor
from fedms.engines.workers import Workers
from fedms.errors import AllClientsFailed, ConfigError
from fedms.federated.client import Message
from fedms.federated.evaluation import evaluate_unseen, shared_accuracy
from fedms.federated.server import STAGES, ServerState
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.runs.experiment import Experiment, LoadedTask, data_mark
from fedms.runs.summary import accuracies, augmentation_note, mean, summarize
from fedms.storage.final import SharedTensors, has_final, write_final
from fedms.storage.provenance import provenance
from fedms.storage.run_folder import RunFolder
from fedms.storage.validation import write_validation
from fedms.training.device import one_gpu_each
from fedms_ext.reference import MASK_VERSION

SHARED = ("visits that several runs of the comparison have in common were made by one of them; all of them state the time and the "
          "memory that it took there")

OpenFolder = Callable[[RunConfig], RunFolder]
Members = Callable[[], Sequence[int]]


def run(config: RunConfig, out: str | Path, *, overwrite: bool = False, resume: bool = False,
        progress: Progress | None = None, stop: Callable[[], bool] = lambda: False,
        foundation: FoundationModel | None = None, dataset: Dataset | None = None,
        grid: Any = None, shard: Shard | None = None, members: Members | None = None) -> dict[str, Any]:
    """Train with one method and one seed, and write everything about it into a run folder.

    Args:
        config: The run file, see :func:`fedms.load_config`.
        out: The run folder. It is made once model and data are there, so that a run that cannot begin leaves none.
        overwrite: Replace an earlier run in the folder.
        resume: Go on with the run in the folder where it stopped, or begin it if there is none.
        progress: Told of each visit, round and phase.
        stop: Asked between clients whether to stop. The run can then be resumed.
        foundation: The foundation model as an object, in the place of the one that `model.id` names; see
            `fedms.ModuleModel`. Experts are attached to it, so it serves one run.
        dataset: The data set as an object, in the place of the one that `data.name` names; see
            `fedms.data.make_dataset`.
        grid: For engine "flower", access to the nodes of the clients (`fedms.engines.flower.link`).
        shard: For engine "flower", the data of the server itself.
        members: For engine "flower", asked before each round for the ids of the clients that take part; None for all of
            `clients.count`.

    Returns:
        The summary, as `summary.json` holds it: fields of :data:`fedms.storage.records.SUMMARY_FIELDS`.

    Raises:
        ConfigError: If the run file does not fit the model or the data. Like the next two, before anything is written.
        ModelError: If the model cannot be loaded.
        DataError: If the data cannot be loaded or divided.
        RunFolderError: If the folder exists and neither `overwrite` nor `resume` is set, or it cannot be written.
        CheckpointError: If a checkpoint cannot be written, or none can be read.
        AllClientsFailed: If too few clients of a round could be trained, or none could be evaluated.
        Interrupted: If `stop` said so.
    """
    progress = progress or Progress()
    try:
        task = LoadedTask(config, progress, foundation, dataset, shard)
        return run_on(task, config, opener(Path(out), overwrite, resume), progress, stop, grid, members)
    finally:
        progress.close()


def opener(out: Path, overwrite: bool, resume: bool) -> OpenFolder:
    """Return a function that opens the run folder `out` for a configuration: a new one, or an earlier one to go on with."""
    if resume:
        return lambda config: RunFolder.resume(out, config)
    return lambda config: RunFolder.create(out, config, overwrite=overwrite)


def run_on(task: LoadedTask, config: RunConfig, open_folder: OpenFolder, progress: Progress, stop: Callable[[], bool],
           grid: Any = None, members: Members | None = None, tested: bool = True, shared: Path | None = None) -> dict[str, Any] | None:
    """Carry out a run on a model and data that are loaded already: all steps of :func:`run` but the first.

    Args:
        task: The loaded model and data.
        config: The run file.
        open_folder: Opens the run folder, see :func:`opener`.
        progress: Told of each visit, round and phase.
        stop: Asked between clients whether to stop.
        grid: For engine "flower", access to the nodes.
        members: For engine "flower", who takes part, see :func:`run`.
        tested: Whether to evaluate on test data at the end; if not, on validation data, by engine "local" alone.
        shared: Folder of the visits that it has in common with other runs, see :meth:`LoadedTask.experiment`.

    Returns:
        The summary; None if the run is not tested. A run that has ended already is left as it is.

    Raises:
        FedMSError: See :func:`run`.
    """
    experiment = task.experiment(config, shared)
    experiment.server.check()
    folder = open_folder(experiment.config)
    try:
        device = task.device.device.type
        began = folder.keep_data(task.dataset.name, data_mark(experiment.config, task.dataset), device, MASK_VERSION)
        notes = list(task.device.notes)
        changes = []
        if began.device != device:
            changes.append(f"the run began on {began.device} and went on on {device}: the same within rounding, not bit for bit")
        if began.masks != MASK_VERSION and config.lora.dropout > 0:
            changes.append(f"the run began with dropout masks of version {began.masks} and went on with version {MASK_VERSION}: the "
                           "same seeds drop other values, so a run from its beginning gives other results")
        for change in changes:
            progress.note(change)
        notes += changes
        summary = folder.summary
        if summary is not None and has_final(folder.path):
            return summary
        folder.append_provenance(provenance())
        started = time.perf_counter()
        with open_engine(folder, task, experiment, progress, stop, grid, members) as engine:
            state = train(engine, task, experiment, progress)
            final = engine.final_message(state)
            if not tested:
                write_validation(folder.path, cast(LocalEngine, engine).validate(final))
                return None
            keep_final(folder, final)
            if summary is not None:     # of a version that did not keep the final tensors
                return summary
            outcome = evaluate(engine, state, final, folder, task, experiment, progress)
            notes += [] if engine.elsewhere is None else [SHARED]
            folder.write_outcome({**outcome, "notes": [*outcome["notes"], *notes],
                                  "final_depth": {stage: state.final_depth.get(stage) for stage in STAGES},
                                  "seconds": engine.seconds_before + time.perf_counter() - started + (engine.elsewhere or 0.0)})
        return folder.write_summary(summarize(folder.path))
    finally:
        folder.close()


@contextmanager
def open_engine(folder: RunFolder, task: LoadedTask, experiment: Experiment, progress: Progress,
                stop: Callable[[], bool], grid: Any, members: Members | None) -> Iterator[Engine]:
    """Open the engine that `run.engine` names, and close it at the end.

    Raises:
        ConfigError: If the engine is Flower and that is not installed, or other processes need a model or data that are objects of
            this one.
    """
    config, model = experiment.config, task.model
    if task.given and (config.run.engine != "local" or config.run.workers > 1):
        key, value = ("engine", config.run.engine) if config.run.engine != "local" else ("workers", config.run.workers)
        raise ConfigError(f"run.{key}: {value!r} cannot send a model or a data set that is an object of this process; name them "
                          'in the run file, or use engine "local" with one worker')
    if config.run.engine == "local":
        with _workers(config, task.device.device, progress) as workers:
            yield LocalEngine(experiment.method, experiment.server, model, experiment.clients,
                              Subset(experiment.partition.global_test), folder, progress, stop, workers)
        return
    try:
        from fedms.engines.flower.server import FlowerEngine
        from fedms.engines.flower.simulation import simulated_grid
        from fedms.runs.nodes import simulation_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"run.engine: {config.run.engine!r} needs {error.name}, which is not installed: "
                          "pip install 'fedms[flower]'") from None
    if config.run.engine == "flower":
        yield FlowerEngine(experiment.server, model.fm_params, model.foundation.fingerprint, grid, experiment.fitting, {},
                           config.clients.round_timeout, folder, progress, stop, members)
        return
    progress.phase("starting Flower's simulation")
    clients = simulation_app(folder.path.absolute() / "clients", _with_absolute_key(config))
    samples = {client.id: (client.n_train, client.n_validation) for client in experiment.clients}
    gpus = torch.cuda.device_count() if task.device.device.type == "cuda" else 0
    if gpus and config.run.device not in ("auto", "cuda"):
        raise ConfigError(f"run.device: got {config.run.device!r}, but the simulation deals out the GPUs itself; use \"cuda\" with "
                          "the environment variable CUDA_VISIBLE_DEVICES")
    with simulated_grid(clients, config.clients.count, config.run.threads, gpus) as simulated:
        yield FlowerEngine(experiment.server, model.fm_params, model.foundation.fingerprint, simulated, experiment.fitting,
                           samples, None, folder, progress, stop)


@contextmanager
def _workers(config: RunConfig, device: torch.device, progress: Progress) -> Iterator[Workers | None]:
    """Yield the processes of `[run] workers`, which end with the context, or None if this process visits the clients itself."""
    if config.run.workers == 1:
        yield None
        return
    # What "auto" is was decided by this process, for all: bits differ between a GPU and a CPU.
    asked = config.run.device if ":" in config.run.device else device.type
    gpus = one_gpu_each() if asked == "cuda" else ()
    workers = Workers(partial(_visitor, with_run(config, device=asked)), [*islice(cycle(gpus or [{}]), config.run.workers)])
    progress.note(f"{config.run.workers} worker processes visit the clients side by side"
                  + (f", on {min(len(gpus), config.run.workers)} GPUs" if gpus else ""))
    try:
        yield workers
    finally:
        workers.close()


def _visitor(config: RunConfig) -> Visitor:
    """Load model and data of a run in a worker process."""
    task = LoadedTask(config, Progress())
    experiment = task.experiment(config)
    return Visitor(experiment.method, experiment.server, task.model, experiment.clients, Subset(experiment.partition.global_test))


def _with_absolute_key(config: RunConfig) -> RunConfig:
    """Return the run file with the path of the key made absolute, for processes with another working folder."""
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"key": str(Path(config.privacy.key).absolute())})})


def train(engine: Engine, task: LoadedTask, experiment: Experiment, progress: Progress) -> ServerState:
    """Run all rounds, from the checkpoint in the run folder if there is one.

    Returns:
        The server's state after the last round.

    Raises:
        FedMSError: See :meth:`fedms.engines.base.Engine.run`.
    """
    config, method = experiment.config, experiment.method
    for note in (*_partition_notes(experiment), *augmentation_note(config)):
        progress.note(note)
    visits = config.clients.awaited * sum(getattr(config, stage).rounds for stage in STAGES)
    progress.start(visits, f"{method.name}, seed {config.run.seed}")
    task.model.start()
    return engine.run(method.initial(task.model))


def keep_final(folder: RunFolder, final: Message) -> None:
    """Write the shared tensors as every client has them in the end, for `fedms export`."""
    write_final(folder.path, SharedTensors(
        final.stage, final.round, final.depth, final.applied_depth, final.tensors, final.constants, final.statistics))


def _partition_notes(experiment: Experiment) -> Sequence[str]:
    """Return what the partition says about the clients' data; with privacy, nothing."""
    return experiment.partition.notes if experiment.config.privacy.mode == "off" else ()


def evaluate(engine: Engine, state: ServerState, final: Message, folder: RunFolder, task: LoadedTask, experiment: Experiment,
             progress: Progress) -> dict[str, Any]:
    """Evaluate all clients on their test data, and write their lines of `clients.jsonl`.

    Args:
        state: The server's state after the last round.
        final: What every client has in the end.

    Returns:
        What the summary says beyond the records, see :data:`fedms.storage.records.OUTCOME_FIELDS`; without
        `final_depth` and `seconds`.

    Raises:
        AllClientsFailed: If no client could be evaluated.
        Interrupted: If asked to stop.
    """
    progress.phase("evaluating")
    config, method, model = experiment.config, experiment.method, task.model
    common_test = Subset(experiment.partition.global_test)
    shared = shared_accuracy(method, model, common_test, final)
    about = {"fingerprint": model.foundation.fingerprint, "classes": model.dataset.classes, "prompts": model.dataset.prompts,
             "learns_gate": method.trains_gate, "personal_stages": method.personal, "notes": _partition_notes(experiment)}
    if engine.private_rounds is not None:       # nothing of a single client is recorded
        return {**about, "global_test_accuracy": shared, "privacy": engine.private_rounds.outcome(state)}
    evaluations = list(engine.evaluate(final, on_common_test=shared is None and len(common_test) > 0))
    if not evaluations:
        raise AllClientsFailed("all rounds are done, and no client could be evaluated; a run that goes on asks them again")
    unseen = [evaluate_unseen(method, model, client, final, config.stage2.rounds) for client in experiment.unseen]
    for record in (*(each.record for each in evaluations), *(as_it_arrives for as_it_arrives, _ in unseen)):
        folder.append_client(record)
    trained = [after for _, after in unseen if after is not None]
    return {
        **about,
        "global_test_accuracy": mean([each.on_common_test for each in evaluations]) if shared is None else shared,
        "unseen_after_training": accuracies(trained)["mean"] if trained else None,
    }
