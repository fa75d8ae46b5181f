"""What a run ended with, ready to predict: the shared tensors as they arrive at a client, and each client's own."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, TypeAdapter

from fedms import methods
from fedms.config import ConfigError, RunConfig, config_from_dict
from fedms.data import Dataset, ImageInputs, TextInputs, normal
from fedms.data.subset import Subset
from fedms.federated import encoding
from fedms.federated.client import Message, Private
from fedms.federated.server import Server
from fedms.foreign import conform, few
from fedms.methods import Prediction
from fedms.models import FoundationModel
from fedms.storage.checkpoint import CheckpointFolder, unpack_server
from fedms.storage.private_state import FolderError, find_private
from fedms.storage.records import RunFolderError, RunRecords
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel


@dataclass(frozen=True)
class Task:
    """What the tensors belong to. groups: name of each client's group, by id. fingerprint: of the foundation model."""

    config: RunConfig
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None
    groups: dict[int, str | None]
    fingerprint: str


@dataclass(frozen=True)
class TrainedRun:
    """The end of a run. final: what every client has in the end. private: what each keeps, by id. elsewhere: clients that
    keep something which is not at hand."""

    task: Task
    final: Message
    private: dict[int, Private] = field(default_factory=dict)
    elsewhere: frozenset[int] = frozenset()

    def client(self, name: str | int | None) -> int | None:
        """The id of a client; None: no client in particular.

        Args:
            name: an id, as an integer or as `id:3`; or a text, which is a client's name in the data if one has it, else an
                id.

        Raises:
            ConfigError: if there is no such client, the group has several, or what it keeps to itself is not at hand.
        """
        if name is None:
            return None
        found = _ids(name, self.task.groups)
        if len(found) == 1 and found[0] in self.elsewhere:
            raise ConfigError(f"client: what client {found[0]} keeps to itself is in a folder of its own, and was not at "
                              "hand; `fedms export RUN --states DIR` reads it there")
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"client: {name!r} is the name of several clients; give one of them by its id: "
                              f"{few(f'id:{i}' for i in found)}")
        names = few((str(i) if group is None else f"{i} ({group})" for i, group in self.task.groups.items()), most=20)
        raise ConfigError(f"client: there is no client {name!r}; clients are: {names}")

    def experts(self, model: ExpertModel) -> dict[str, Tensors]:
        """The applied pairs and the head of each expert, and the corrections that come with it: "global", and "client-ID" of
        every client with one of its own."""
        shared = {**self.final.tensors, **self.final.constants}
        # What never travels is what every client drew.
        start = {**model.initial(self.task.config.run.seed), **shared}
        found = {"global": _expert(start)} if any(name.startswith("expert/") for name in shared) else {}
        applied = set(model.order[:self.final.applied_depth])
        for client, private in sorted(self.private.items()):
            own = _expert(private.tensors)
            if own:
                found[f"client-{client}"] = _expert({**start, **own})
        return {name: {n: t for n, t in tensors.items() if model.block_of.get(n) in applied or n not in model.block_of}
                for name, tensors in found.items()}


def _ids(name: str | int, groups: Mapping[int, str | None]) -> list[int]:
    """Ids of the clients that a name or an id stands for. groups: each client's name."""
    text = normal(str(name))
    if isinstance(name, str) and (named := [i for i, group in groups.items() if group == text]):
        return named
    return [i for i in groups if text in (str(i), f"id:{i}")]


def _expert(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("expert/", "head/", "correction/"))}


def task_of(run: Path) -> Task:
    """The task of a run that has ended.

    Raises:
        RunFolderError: if it has not, or its records are not whole.
    """
    records = RunRecords.read(run)
    if records.summary is None:
        raise RunFolderError(f"{run}: the run has not ended; go on with it by --resume")
    if not records.summary.get("classes"):
        raise RunFolderError(f"{run}: its summary does not say its classes, so it was made by an older version; run it again")
    prompts = records.summary["prompts"]
    groups = {client["id"]: client["group"] for client in records.clients if not client["unseen"]}
    return Task(config_from_dict(records.config), tuple(records.summary["classes"]),
                None if prompts is None else tuple(tuple(texts) for texts in prompts), groups,
                records.summary["fingerprint"])


def trained_run_of(run: Path, task: Task, model: ExpertModel, states: Path | None = None) -> TrainedRun:
    """What the last checkpoint of a run that has ended holds.

    Args:
        states: of a run on Flower, where clients keep what is their own; None: where a simulation does.

    Raises:
        RunFolderError: if there is none, or a client's folder is damaged or not of this run.
        CheckpointError: if none is whole.
    """
    snapshot, _ = CheckpointFolder(run / "checkpoint").load()
    if snapshot is None:
        raise RunFolderError(f"{run}: holds no checkpoint, so what was trained is gone; run it again")
    try:
        nodes = conform(_NODES, snapshot.state)
    except ValueError as error:
        raise RunFolderError(f"{run}: its checkpoint is not what a run writes: {error}") from None
    server = Server(task.config, model.order, model.block_of, methods.create(task.config).broadcast_policy)
    state, _ = unpack_server(snapshot.state.get("server"), snapshot.tensors)
    message = server.message(state)
    tensors, constants = (encoding.unpack(encoding.pack(t, task.config.wire.dtype)) for t in (message.tensors, message.constants))
    private = {client: Private(tensors) for client, tensors in snapshot.private.items()}
    private |= _private_of_nodes(nodes, states or run / "clients")
    if states is not None and not private:
        raise RunFolderError(f"{states}: holds no private state of a client of {run}; expected the folder that a client's "
                             "node names as state=, or one of client-0, client-1, ...")
    return TrainedRun(task, replace(message, tensors=tensors, constants=constants), private,
                   frozenset(nodes.private_at) - private.keys())


class _Nodes(BaseModel):
    """Of a run on Flower: its id, the clients that keep something, and the hash of it by client."""

    run: Annotated[str, Field(pattern="^[0-9A-Za-z-]{1,64}$")] | None = None
    private_at: list[Annotated[int, Field(ge=0)]] = []
    kept: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None] = {}


_NODES = TypeAdapter(_Nodes)


def _private_of_nodes(nodes: _Nodes, root: Path) -> dict[int, Private]:
    """What clients of a run on Flower keep under this folder, as the server knows it."""
    found = {}
    for client in nodes.private_at:
        digest = nodes.kept.get(str(client))
        if nodes.run is None or digest is None:
            raise RunFolderError(f"client {client} is said to keep something, but not which run and what; run it again")
        try:
            private = find_private(root, nodes.run, client, digest)
        except FolderError as error:
            raise RunFolderError(str(error)) from None
        if private is not None:
            found[client] = private
    return found


def bind(foundation: FoundationModel, task: Task) -> ExpertModel:
    """A resident model without data: `predict` gives it some."""
    config = task.config
    uncached = config.model_copy(update={"sal": config.sal.model_copy(update={"cache": "off"})})
    return ExpertModel(foundation, _dataset(task, None, 0), uncached)


def predict(model: ExpertModel, outcome: TrainedRun, client: int | None, inputs: TextInputs | ImageInputs) -> Prediction:
    """What a client predicts for some inputs; without a client, what the shared expert does.

    Raises:
        ConfigError: without a client, if the method shares no expert.
    """
    model.dataset = _dataset(outcome.task, inputs, len(inputs))
    model.clear()
    private = Private() if client is None else outcome.private.get(client, Private())
    prediction = methods.create(outcome.task.config).predict(model, Subset(torch.arange(len(inputs))), private, outcome.final)
    if client is not None:
        return prediction
    if prediction.global_ is None:
        raise ConfigError(f"client: the method {outcome.task.config.run.method} shares no expert; give a client")
    return Prediction(prediction.global_, global_=prediction.global_)


def _dataset(task: Task, inputs: Any, count: int) -> Dataset:
    return Dataset("new", inputs, torch.zeros(count, dtype=torch.int64), task.classes, task.prompts, None, (), "")

