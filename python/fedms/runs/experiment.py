"""What a process needs to play its part in a run, as server, as client, or as all of them: the frozen model, the data,
and who has which of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedms import data, methods, models
from fedms.config import CLIENTS, DATA, RunConfig, config_from_dict
from fedms.data import Dataset, Partition, Shard, describe
from fedms.federated.client import Client
from fedms.federated.server import Server
from fedms.federated.visit_costs import fitting_depths
from fedms.methods import Method
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.training.expert_model import ExpertModel
from fedms.training.memory import hand_back_large_blocks


@dataclass(frozen=True)
class Experiment:
    """One run of a session: a method and a seed. `fitting`: see `fedms.federated.devices.device_of`."""

    config: RunConfig
    partition: Partition
    fitting: Sequence[int | None]
    method: Method
    server: Server
    clients: tuple[Client, ...]
    unseen: tuple[Client, ...]

    def client(self, id: int) -> Client:
        """Raises KeyError if this process has no data of that client."""
        for client in self.clients:
            if client.id == id:
                return client
        raise KeyError(f"no data of client {id}; there is data of the clients {[c.id for c in self.clients]}")


class LoadedTask:
    """What runs that differ in method and seed alone have in common: the frozen model and the data.

    Args:
        foundation, dataset: objects to use in the place of what the run file names.
        shard: what this process has of the data, if that is not all of it; it holds for its own run alone.
    """

    def __init__(self, config: RunConfig, progress: Progress, foundation: FoundationModel | None = None,
                 dataset: Dataset | None = None, shard: Shard | None = None) -> None:
        hand_back_large_blocks()
        torch.set_num_threads(config.run.threads)
        self.given, self.shard = foundation is not None or dataset is not None, shard
        # Taken before the data are read: where they change meanwhile, the session is not used again.
        self.basis = basis(config)
        progress.phase(f"loading model {config.model.id}")
        self.foundation = foundation or models.load(config.model, config.task.kind)
        progress.phase(f"loading data {config.data.name}")
        self.dataset = shard.dataset if shard else dataset or data.load(config.data, self.foundation)
        if shard is None:
            progress.note(describe(self.dataset))
        self.model = ExpertModel(self.foundation, self.dataset, config)

    def experiment(self, config: RunConfig) -> Experiment:
        """The run `config` on this session's model and data; it may leave open how many clients there are.

        Raises:
            ConfigError: if a number of clients that follows from the data does not fit the rest of the run file.
            DataError: if the data cannot be divided as it says.
        """
        torch.set_num_threads(config.run.threads)       # another session of this process may have set it meanwhile
        config = with_clients(config, self.dataset)
        method = methods.create(config)
        server = Server(config, self.model.order, self.model.block_of, method.broadcast_policy,
                        method.statistics(len(self.dataset.classes)))
        if self.shard is None:
            partition = data.partition(self.dataset, config.data, config.clients, config.run.seed)
            fitting = fitting_depths(self.model, method, config, partition)
        else:
            partition, fitting = self.shard.partition, self.shard.fitting
        clients, unseen = (tuple(Client(split, config, fitting) for split in splits)
                           for splits in (partition.clients, partition.unseen))
        return Experiment(config, partition, fitting, method, server, clients, unseen)


def with_clients(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with `clients.count` set: as many as data of one's own name, without the unseen ones, else
    `CLIENTS`."""
    if config.clients.count is not None:
        return config
    count = CLIENTS
    if dataset.groups is not None and dataset.name not in DATA and config.data.partition == "natural":
        count = max(1, len(dataset.group_names) - config.clients.unseen)
    tables = config.model_dump()
    return config_from_dict({**tables, "clients": {**tables["clients"], "count": count}})


def basis(config: RunConfig) -> tuple[object, ...]:
    """What a session depends on: runs that agree in it can share one."""
    return (config.task, config.model, config.head, data.stamp(config.data), config.lora, config.run.threads,
            config.data.model_dump(exclude={"partition", "alpha", "classes_per_client", "split", "global_test"}),
            config.sal.model_dump(include={"order", "depth", "cache", "cache_dtype", "cache_bytes"}),
            config.gate.model_dump(include={"mixing", "features", "temperature", "bottleneck"}))


class LoadedTasks:
    """The session of one run after the other: kept as long as the next run can share it."""

    def __init__(self) -> None:
        self.last: LoadedTask | None = None

    def of(self, config: RunConfig, progress: Progress) -> LoadedTask:
        if self.last is None or self.last.basis != basis(config):
            self.last = None        # freed before the next one is loaded
            self.last = LoadedTask(config, progress)
        return self.last


def write_shards(config: RunConfig, folder: Path, progress: Progress) -> RunConfig:
    """Divides a run's data: `folder/client-N` gets what client N has, `folder/server` what no client has. The common test
    set goes to all. Returns the configuration with the number of clients set.

    Raises:
        ConfigError, ModelError, DataError: as where the run is begun; ShardError if a folder cannot be written.
    """
    session = LoadedTask(config, progress)
    experiment = session.experiment(config)
    config = experiment.config
    progress.phase(f"dividing the data among {config.clients.count} clients")
    parts = {f"client-{split.id}": replace(experiment.partition, clients=(split,), unseen=(), notes=())
             for split in experiment.partition.clients}
    for name, part in {"server": replace(experiment.partition, clients=()), **parts}.items():
        data.write_shard(folder / name, data.shard_of(session.dataset, part, experiment.fitting))
    return config
