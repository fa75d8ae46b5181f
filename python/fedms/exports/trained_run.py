"""What a run trained, read from its folder: the shared tensors as clients have them, and each client's own.

Neither a server nor a model is needed for it: `final/` holds what the server sent last, the checkpoint what simulated
clients keep to themselves, and the folders of Flower's nodes what these keep.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from fedms import methods
from fedms.config import RunConfig, config_from_dict
from fedms.data import normal
from fedms.errors import GO_ON, ConfigError, ModelError, RunFolderError
from fedms.federated.client import Message, Private
from fedms.foreign import conform, few
from fedms.models import FoundationModel
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.final import SharedTensors, read_final
from fedms.storage.private_state import FolderError, find_private
from fedms.storage.records import RunRecords
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel


@dataclass(frozen=True)
class Task:
    """What the tensors of a run belong to.

    Attributes:
        config: The run file.
        classes: Names of the classes, in the order of the logits.
        prompts: Class prompts of each class, or None.
        groups: Name of each client's group in the data, by client id.
        fingerprint: SHA-256 of the foundation model's weights.
    """

    config: RunConfig
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None
    groups: dict[int, str | None]
    fingerprint: str


@dataclass(frozen=True)
class TrainedRun:
    """What a run trained.

    Attributes:
        task: What the tensors belong to.
        final: What every client has in the end.
        private: What each client keeps to itself, by id.
        elsewhere: Clients that keep something which is not at hand.
    """

    task: Task
    final: Message
    private: dict[int, Private] = field(default_factory=dict)
    elsewhere: frozenset[int] = frozenset()

    def client(self, name: str | int | None) -> int | None:
        """Return the id of a client, or None for no client in particular.

        Args:
            name: An id, as an integer or as `id:3`; or a text, which is a client's name in the data if one has it, else an
                id.

        Raises:
            ConfigError: If there is no such client, several have that name, or what it keeps to itself is not at hand.
        """
        if name is None:
            return None
        found = _ids(name, self.task.groups)
        if len(found) == 1 and found[0] in self.elsewhere:
            private = self.task.config.privacy.mode != "off"
            raise ConfigError(f"client: the private expert of client {found[0]} is not in this export, as "
                              + ("privacy.mode does not protect it: it is the client's own" if private else
                                 "the client keeps it in a folder of its own")
                              + "; export the run again and name the client's folder by --states DIR")
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"client: {name!r} is the name of several clients; give one of them by its id: "
                              f"{few(f'id:{i}' for i in found)}")
        names = few((str(i) if group is None else f"{i} ({group})" for i, group in self.task.groups.items()), most=20)
        raise ConfigError(f"client: there is no client {name!r}; clients are: {names}")

    def experts(self, model: ExpertModel) -> dict[str, Tensors]:
        """Return the applied LoRA pairs, the head and the corrections of each expert.

        Args:
            model: The model that they belong to, which draws again what never travels as every client drew it.

        Returns:
            Tensors by name for "global", if the method shares an expert, and for "client-ID" of every client with one.
        """
        method = methods.create(self.task.config)
        shared = method.assembled(model, {**self.final.tensors, **self.final.constants})
        start = {**model.initial(self.task.config.run.seed), **shared}
        found = {"global": _expert(start)} if any(name.startswith("expert/") for name in shared) else {}
        applied = set(model.order[:self.final.applied_depth])
        for client, private in sorted(self.private.items()):
            own = _expert(private.tensors)
            if own:
                tensors = _expert({**start, **own})
                shift = method.own_shift(private, self.final)
                if shift is not None and "head/bias" in tensors:
                    tensors["head/bias"] = tensors["head/bias"] + shift
                found[f"client-{client}"] = tensors
        return {name: {n: t for n, t in tensors.items() if model.block_of.get(n) in applied or n not in model.block_of}
                for name, tensors in found.items()}


def _ids(name: str | int, groups: Mapping[int, str | None]) -> list[int]:
    """Return the ids of the clients that a name or an id stands for."""
    text = normal(str(name))
    if isinstance(name, str) and (named := [i for i, group in groups.items() if group == text]):
        return named
    return [i for i in groups if text in (str(i), f"id:{i}")]


def _expert(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("expert/", "head/", "correction/"))}


def read_trained_run(run: Path, states: Path | None = None) -> TrainedRun:
    """Read what a run that has ended trained.

    Args:
        run: Run folder.
        states: For a run on Flower, where its clients keep what is their own; None for where a simulation does. A run with
            privacy is read without it: one client's folder is for that client's own export.

    Raises:
        RunFolderError: If the run has not ended, something is missing or damaged, or a client's folder is not of this run.
        CheckpointError: If no checkpoint is whole.
    """
    task, final = read_task(run), read_final(run)
    snapshot, _ = CheckpointFolder(run / "checkpoint").load()
    if snapshot is None:
        raise RunFolderError(f"{run}: holds no checkpoint, so its clients' private experts are lost; run it again")
    try:
        nodes = conform(_NODES, snapshot.state)
    except ValueError as error:
        raise RunFolderError(f"{run}: its checkpoint is not what a run writes: {error}") from None
    private = {client: Private(tensors) for client, tensors in snapshot.private.items()}
    kept = frozenset(nodes.private_at)
    if task.config.privacy.mode != "off":       # what leaves a run is what was summed up; who keeps something, it does not say
        private, kept = {}, frozenset(task.groups) if kept or private else kept
    if task.config.privacy.mode == "off" or states is not None:
        private |= _private_of_nodes(nodes, states or run / "clients")
    if states is not None and not private:
        raise RunFolderError(f"{states}: holds no private state of a client of {run}; expected the folder that a client's "
                             "node names as state=, or one of client-0, client-1, ...")
    return TrainedRun(task, message_of(final), private, kept - private.keys())


def read_task(run: Path) -> Task:
    """Read what the tensors of a run that has ended belong to.

    Raises:
        RunFolderError: If it has not ended, or its records are damaged.
    """
    records = RunRecords.read(run)
    if records.summary is None:
        raise RunFolderError(f"{run}: the run has not ended; {GO_ON}")
    if not records.summary.get("classes"):
        raise RunFolderError(f"{run}: its summary does not say its classes, so it was made by an older version; run it again")
    prompts = records.summary["prompts"]
    config = config_from_dict(records.config)
    groups = {client["id"]: client["group"] for client in records.clients if not client["unseen"]}
    if config.privacy.mode != "off":        # the records name no client
        groups = dict.fromkeys(range(config.clients.count or 0))
    return Task(config, tuple(records.summary["classes"]),
                None if prompts is None else tuple(tuple(texts) for texts in prompts), groups,
                records.summary["fingerprint"])


def message_of(final: SharedTensors) -> Message:
    """Return the message to nobody in particular that brings a client what every client has in the end."""
    return Message(final.stage, final.round, (), final.depth, final.applied_depth, final.tensors, final.constants,
                   final.statistics)


def check_fingerprint(foundation: FoundationModel, task: Task) -> None:
    """Raise ModelError if the experts were trained on another model."""
    if foundation.fingerprint != task.fingerprint:
        raise ModelError(f"model.id: {foundation.name!r} is not the model that the experts were trained on: its weights "
                         f"have the fingerprint {foundation.fingerprint[:12]}..., expected {task.fingerprint[:12]}...")


class _Nodes(BaseModel):
    """The part of a checkpoint that says where the clients of a run on Flower keep what is their own.

    Attributes:
        run: Id of the run.
        private_at: Clients that keep something.
        kept: Hash of it, by client.
    """

    run: Annotated[str, Field(pattern="^[0-9A-Za-z-]{1,64}$")] | None = None
    private_at: list[Annotated[int, Field(ge=0)]] = []
    kept: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None] = {}


_NODES = TypeAdapter(_Nodes)


def _private_of_nodes(nodes: _Nodes, root: Path) -> dict[int, Private]:
    """Return what clients of a run on Flower keep under a folder, if it is what the server knows of."""
    found = {}
    for client in nodes.private_at:
        digest = nodes.kept.get(str(client))
        if nodes.run is None or digest is None:
            raise RunFolderError(f"the run's checkpoint says that client {client} keeps private tensors, but not under "
                                 "which hash; run it again")
        try:
            tensors = find_private(root, nodes.run, client, digest)
        except FolderError as error:
            raise RunFolderError(str(error)) from None
        if tensors is not None:
            found[client] = Private(tensors)
    return found
