"""The model that a client has after its federation's run: the shared tensors, its own expert and the gate between them. The
client predicts with it on its own machine, without the server: `fedms export CLIENT --out DIR`, then `fedms predict DIR FILE`."""
from __future__ import annotations

from pathlib import Path

from fedms.data import read_shard
from fedms.deployment import DeploymentError
from fedms.deployment.state import PRIVATE, ClientState
from fedms.exports.trained_run import Task, TrainedRun, message_of
from fedms.federated.client import Private
from fedms.storage.private_state import FolderError, read_ended


def trained_at(folder: Path) -> TrainedRun:
    """Read what a federation trained, as this client has it.

    Args:
        folder: The client's folder.

    Raises:
        DeploymentError: If no run has ended here, or the folder is damaged.
        DataError: If the client's samples, which name the classes, cannot be read.
    """
    state = ClientState(folder)
    number, invitation = state.about.number, state.invitation
    try:
        ended = None if number is None else read_ended(folder / PRIVATE, number)
    except FolderError as error:
        raise DeploymentError(f"{error}; take part again to get it anew") from None
    if ended is None:
        raise DeploymentError(f"{folder}: no run has ended here: the final model comes with the server's last message, which "
                              "`fedms client start` waits for")
    final, own = ended
    config, dataset = invitation.config, read_shard(folder).dataset
    if state.about.model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"id": state.about.model})})
    task = Task(config, dataset.classes, dataset.prompts, {number: state.about.name}, invitation.model_sha256)
    return TrainedRun(task, message_of(final), {number: Private(own)})
