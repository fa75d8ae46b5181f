"""Joining a federation, on the client's own machine: read its data as the invitation says, look at what a round costs, and
make the folder that keeps its key, its samples and its expert. Nothing is sent to anybody."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from fedms import data, models
from fedms.config import RunConfig
from fedms.data import Dataset, Partition, Shard
from fedms.deployment import DeploymentError, check_name
from fedms.deployment.invitation import Invitation, read_invitation
from fedms.deployment.policy import default_policy, write_policy
from fedms.deployment.state import POLICY, ClientState, make_state
from fedms.errors import DataError
from fedms.foreign import few
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.runs.plan import Plan, plan

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Joining:
    """A client that is ready to join: its data and the measured costs. Nothing is written yet."""

    invitation: Invitation
    name: str
    model: str | None
    dataset: Dataset
    partition: Partition
    costs: Plan

    @property
    def samples(self) -> dict[str, int]:
        """Numbers of training, validation and test samples."""
        split = self.partition.clients[0]
        return {part: len(getattr(split, part)) for part in PARTS}


def prepare(invitation: Invitation, source: str, name: str, progress: Progress, model: str | None = None) -> Joining:
    """Read the client's data and measure a round.

    Args:
        invitation: The invitation.
        source: A table, a folder of images or a data set of the hub: any value of `data.name` in a run file.
        name: The client's name.
        progress: Shows the progress.
        model: Folder of the model on this machine, or None to load the invitation's `model.id`.

    Raises:
        DeploymentError: If the model or the preprocessing differs from the server's, or the name is not valid.
        DataError, ModelError: If the data or the model cannot be read. The message names the sample, column or file.
    """
    config = with_data(invitation.config, source, check_name(name), model)
    if config.model.trust_remote_code:
        raise DeploymentError("the invitation's model brings code of its own (model.trust_remote_code): it is not loaded")
    if Path(config.model.id).is_absolute() and not Path(config.model.id).exists():
        raise DeploymentError(f"model.id: {config.model.id} is a folder, which is not on this machine; name your own copy of the "
                              "model by --model FOLDER")
    progress.phase(f"loading model {config.model.id}")
    foundation = models.load(config.model.model_copy(update={"frozen": "fp32"}), config.task.kind)
    check_model(invitation, foundation)
    progress.phase(f"reading {source}")
    dataset = own_dataset(data.load(config.data, foundation), name)
    partition = alone(dataset, config)
    empty = [part for part in PARTS if not len(getattr(partition.clients[0], part))]
    if empty:
        raise DataError(f"{source}: its {data.counted(len(dataset), 'sample')} leave no {' and no '.join(empty)} sample at "
                        f"data.split = {list(config.data.split)}; bring more samples")
    costs = plan(config, foundation=foundation, dataset=dataset, progress=progress)
    return Joining(invitation, name, config.model.id if model else None, dataset, partition, costs)


def write(joining: Joining, folder: Path) -> ClientState:
    """Write the client's folder, whole or not at all."""
    state = make_state(folder, joining.name, joining.model, joining.invitation)
    try:
        data.write_shard(folder, Shard(joining.dataset, joining.partition, ()))
        write_policy(folder / POLICY, default_policy(joining.invitation.config))
    except BaseException:
        state.forget()
        raise
    return state


def with_data(config: RunConfig, source: str, name: str, model: str | None) -> RunConfig:
    """Return the invitation's run file, changed to a run on the data of this client only."""
    path = Path(source).expanduser()
    at = str(Path(model).expanduser().absolute()) if model else config.model.id
    return config.model_copy(update={
        "model": config.model.model_copy(update={"id": at}),
        "data": config.data.model_copy(update={"name": str(path.absolute()) if path.exists() else source}),
        "clients": config.clients.model_copy(update={"count": 1})})


def check_model(invitation: Invitation, foundation: FoundationModel) -> None:
    """Raise DeploymentError unless the model's weights and its preprocessing are those of the invitation."""
    config = invitation.config
    if foundation.fingerprint != invitation.model_sha256:
        raise DeploymentError(f"model.id {config.model.id}: the weights here ({foundation.fingerprint[:12]}) are not the "
                              f"server's ({invitation.model_sha256[:12]}); remove the cached model, and load it again")
    if data.preprocessing_fingerprint(config.data, foundation) != invitation.preprocessing_sha256:
        raise DeploymentError(f"model.id {config.model.id}: its tokenizer or image transform works otherwise here than at the "
                              "server; install the same releases of transformers and pillow")


def own_dataset(dataset: Dataset, name: str) -> Dataset:
    """Return the data set as one group, which belongs to this client, whatever groups it had."""
    return replace(dataset, groups=torch.zeros(len(dataset), dtype=torch.int64), group_names=(name,))


def alone(dataset: Dataset, config: RunConfig) -> Partition:
    """Divide the client's samples for training, validation and test, as a run with all clients in one process does."""
    return data.partition(dataset, config.data, SimpleNamespace(count=1, unseen=0), config.run.seed)


def told(joining: Joining, size: Callable[[int], str], duration: Callable[[float], str]) -> Sequence[str]:
    """Return lines that tell the owner what is trained, sent and kept, and what a round costs."""
    config, samples = joining.invitation.config, joining.samples
    sent = {
        "off": "the trained tensors of each round, numbers of samples, losses, accuracies, seconds, bytes of memory"
               + ("; once, how many training samples you have of each class" if config.method_row.sends_counts else ""),
        "central": "the change of the trained tensors of each round, clipped, and what privacy adds up of scores and classes; the "
                   "server sees it, and adds noise to the sum of all",
        "secure": "sums with the other clients, of which the server sees no single part",
        "distributed": "noised sums with the other clients, of which the server sees no single part"}[config.privacy.mode]
    first, last = joining.costs.options[0], joining.costs.options[-1]
    rounds = config.stage1.rounds + config.stage2.rounds
    return [
        f"data      {samples['train']:,} samples for training, {samples['validation']:,} for validation, {samples['test']:,} for testing"
        f"{_classes(joining.invitation.classes)}",
        f"trained   {config.run.method}: LoRA pairs of rank {config.lora.rank} beside {config.model.id}, whose weights stay as "
        f"they are; {config.stage1.rounds} + {config.stage2.rounds} rounds, {config.stage1.epochs} and {config.stage2.epochs} "
        "epochs a visit",
        f"sent      to {joining.invitation.address}: {sent}; never samples, their labels or what stays private",
        "kept      here alone: your key, the samples as the model reads them, your private expert",
        f"a round   up to {size(last.peak)} of memory beside {size(joining.costs.process)} for the process; "
        f"{duration(first.seconds)} to {duration(last.seconds)}; {size(last.work.bytes_up)} sent, "
        f"{size(last.work.bytes_down)} received; {rounds} rounds at most",
    ]


def _classes(classes: Sequence[str]) -> str:
    return f"; classes: {few(classes, 8)}" if classes else ""
