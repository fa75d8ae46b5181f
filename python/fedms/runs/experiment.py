"""Loading and building a run: the frozen model, the data, and which client has which part of it.

A process that plays a part in a run, as server, as client or as all of them, needs the same of these.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedms import data, methods, models
from fedms.config import CLIENTS, ConfigError, RunConfig, config_from_dict, registry
from fedms.data import Dataset, Partition, Shard, describe
from fedms.federated.client import Client
from fedms.federated.server import Server
from fedms.federated.shared_visits import SharedVisits, can_share
from fedms.federated.devices import Fitting
from fedms.federated.visit_costs import fitting_of
from fedms.federated.method import Method
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.training.device import choose
from fedms.training.expert_model import ExpertModel
from fedms.training.frozen import held_dtype
from fedms.training.memory import hand_back_large_blocks

if TYPE_CHECKING:
    from fedms.federated.private_server import PrivateServer


@dataclass(frozen=True)
class Experiment:
    """One run on a model and data that are loaded: a method, a seed, and who has which samples.

    Attributes:
        config: The run file, with the number of clients set.
        partition: Samples of each client, and the common test set.
        fitting: What fits the clients' devices.
        method: The algorithm.
        server: The server's side of it.
        clients: Participating clients of which this process has data.
        unseen: Clients that do not take part, and are evaluated at the end.
    """

    config: RunConfig
    partition: Partition
    fitting: Fitting
    method: Method
    server: Server
    clients: tuple[Client, ...]
    unseen: tuple[Client, ...]

    def client(self, id: int) -> Client:
        """Return a participating client. KeyError if this process has no data of it."""
        for client in self.clients:
            if client.id == id:
                return client
        raise KeyError(f"no data of client {id}; there is data of the clients {[c.id for c in self.clients]}")


class LoadedTask:
    """A frozen model with experts, and data: what runs that differ in method and seed alone have in common.

    Args:
        config: The run file.
        progress: Told of what is being loaded, and of what was found in the data.
        foundation: The foundation model as an object, in the place of the one that the run file names.
        dataset: The data set as an object, likewise.
        shard: The part of the data that this process has, if that is not all of it. It holds for its own run alone.

    Attributes:
        model: The resident model.
        dataset: The data set.
        given: Whether the model or the data were given as objects.
        device: Where the model computes, and why not elsewhere.

    Raises:
        ConfigError: If the run file does not fit the model, or its device is not there.
        ModelError: If the model cannot be loaded.
        DataError: If the data cannot be loaded.
    """

    def __init__(self, config: RunConfig, progress: Progress, foundation: FoundationModel | None = None,
                 dataset: Dataset | None = None, shard: Shard | None = None) -> None:
        hand_back_large_blocks()
        torch.set_num_threads(config.run.threads)
        self.given, self.shard = foundation is not None or dataset is not None, shard
        # Taken before the data are read: if they change meanwhile, this is not used for another run.
        self.basis = basis(config)
        self.device = choose(config.run.device, config.model.frozen)
        progress.phase(f"loading model {config.model.id}")
        self.foundation = foundation or models.load(config.model, config.task.kind)
        progress.phase(f"loading data {config.data.name}")
        self.dataset = shard.dataset if shard else dataset or data.load(config.data, self.foundation)
        if shard is None:
            progress.note(describe(self.dataset))
        for note in self.device.notes:
            progress.note(note)
        self.model = ExpertModel(self.foundation, self.dataset, config, device=self.device.device)

    def experiment(self, config: RunConfig, shared: Path | None = None) -> Experiment:
        """Build a run on this model and data.

        Args:
            config: Its run file, which may leave open how many clients there are.
            shared: Folder of the visits that it has in common with other runs, see `fedms.federated.shared_visits`; None to share none.

        Raises:
            ConfigError: If the number of clients that follows from the data does not fit the rest of the run file.
            DataError: If the data cannot be divided as it says.
        """
        torch.set_num_threads(config.run.threads)       # another run of this process may have set it meanwhile
        config = with_clients(config, self.dataset)
        method = methods.create(config)
        statistics = method.statistics(len(self.dataset.classes))
        if config.privacy.mode == "off":
            server = Server(config, self.model.order, self.model.block_of, method, statistics)
        else:
            server = _private_server(config)(config, self.model.order, self.model.block_of, method, statistics,
                                             lambda: method.initial(self.model).keys())
        if self.shard is None:
            partition = data.partition(self.dataset, config.data, config.clients, config.run.seed)
            fitting = fitting_of(self.model, method, config, partition)
        else:
            partition, fitting = self.shard.partition, Fitting(self.shard.fitting)
        visits = SharedVisits(shared, self.model, config) if shared is not None and can_share(config) else None
        clients = tuple(Client(split, config, fitting, visits) for split in partition.clients)
        unseen = tuple(Client(split, config, fitting) for split in partition.unseen)
        return Experiment(config, partition, fitting, method, server, clients, unseen)


def with_clients(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Return the configuration with `clients.count` set.

    A user's own data that say whose a sample is have as many clients as owners, but for the unseen ones; else there are
    `CLIENTS`.
    """
    if config.clients.count is not None:
        return config
    count = CLIENTS
    if dataset.groups is not None and dataset.name not in registry.data_sets() and config.data.partition in ("natural", "own"):
        count = max(1, len(dataset.group_names) - config.clients.unseen)
    tables = config.model_dump()
    return config_from_dict({**tables, "clients": {**tables["clients"], "count": count}})


def _private_server(config: RunConfig) -> type[PrivateServer]:
    try:
        from fedms.federated.private_server import PrivateServer
    except ModuleNotFoundError as error:
        raise ConfigError(f"privacy.mode: {config.privacy.mode!r} needs {error.name}, which is not installed: "
                          "pip install 'fedms[privacy]'") from None
    return PrivateServer


def data_mark(config: RunConfig, dataset: Dataset) -> str:
    """Return a hash, 64 hexadecimal digits, by which a run folder recognizes its data.

    With privacy it is keyed by the run's secret key: a plain hash would confirm a correct guess of the clients' data. A server of
    clients with their own data has no data to hash.

    Raises:
        ConfigError: If the key is missing, or other users can read it.
    """
    if config.privacy.mode == "off" or config.run.engine == "flower":
        return dataset.fingerprint
    from fedms.privacy.key_file import KeyFileError, derive, read_key

    try:
        return derive(read_key(Path(config.privacy.key)), "data", dataset.fingerprint).hex()
    except KeyFileError as error:
        raise ConfigError(str(error)) from None


def basis(config: RunConfig) -> tuple[object, ...]:
    """Return what a loaded task depends on: runs that agree in it can share one."""
    return (config.task, config.model, config.head, data.stamp(config.data), config.lora,
            config.run.model_dump(include={"threads", "device", "dtype"}), held_dtype(config),
            config.data.model_dump(exclude={"partition", "alpha", "classes_per_client", "split", "global_test"}),
            config.sal.model_dump(include={"order", "depth", "cache", "cache_dtype", "cache_bytes"}),
            config.gate.model_dump(include={"mixing", "features", "temperature", "bottleneck"}))


class LoadedTasks:
    """Loads model and data for one run after the other, and keeps them as long as the next run can share them."""

    def __init__(self) -> None:
        self.last: LoadedTask | None = None

    def of(self, config: RunConfig, progress: Progress) -> LoadedTask:
        """Return the loaded model and data of a run."""
        if self.last is None or self.last.basis != basis(config):
            self.last = None        # freed before the next one is loaded
            self.last = LoadedTask(config, progress)
        return self.last
