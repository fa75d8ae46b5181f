"""`fedms audit`: the attacks of :mod:`fedms.privacy.audit` on what the clients of a run send, under each mode of privacy.

The run's model, data and settings are used as they were; nothing is trained but one visit of some clients. What is attacked is
one release, the hardest one to protect: the attacker knows all vectors but that of the client with the longest one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from fedms.config import config_from_dict
from fedms.errors import ConfigError
from fedms.federated.client import Client, Message, Private
from fedms.federated.packing import pack_message, unpack_message
from fedms.federated.private_client import contribute
from fedms.federated.private_server import PrivateServer
from fedms.federated.server import STAGES, ServerState
from fedms.privacy import secure_sum
from fedms.privacy.accounting import epsilon_of
from fedms.privacy.audit import Distinguished, Inverted, distinguish, invert, trials
from fedms.privacy.clipping import dequantize
from fedms.privacy.key_file import derive
from fedms.privacy.noise import draw
from fedms.privacy.sums import Sums
from fedms.progress import Progress
from fedms.runs.experiment import Experiment, LoadedTask
from fedms.runs.privacy_plan import private_settings, with_settings
from fedms.storage.final import has_final, read_final
from fedms.storage.records import RunRecords

CLIENTS = 6             # that make a visit: the attacked one and those beside it
MOST_DRAWS = 2 * 10**8  # noise values of one attack; longer vectors get fewer trials
LAYERS = {"stage1": "head/weight", "stage2": "gate/down.weight"}        # linear layers whose inputs are the model's features


@dataclass(frozen=True)
class Finding:
    """What came of the attacks on one stage under one mode.

    Attributes:
        stage: The stage.
        mode: The mode of privacy.
        attacker: "server" or "reader" (somebody who has what leaves the server).
        claimed: Epsilon of one release, as the accountant has it; None: no claim.
        told_apart: Whether the client took part.
        inverted: Which samples it has; None where the stage sends no layer to invert.
    """

    stage: str
    mode: str
    attacker: str
    claimed: float | None
    told_apart: Distinguished
    inverted: Inverted | None


def audit(folder: str | Path, *, epsilon: float = 8.0, count: int = 1000, progress: Progress | None = None) -> list[Finding]:
    """Attack what the clients of a run send.

    Args:
        folder: The run folder.
        epsilon: The budget whose noise is attacked, for a run without noise; a run with noise is attacked with its own.
        count: Trials of each attack with the client and as many without it.
        progress: Told of what is being attacked.

    Returns:
        A finding for each stage, mode and attacker.

    Raises:
        ConfigError: If the run's settings cannot be used with privacy.
        RunFolderError: If the folder holds no run.
    """
    progress = progress or Progress()
    folder, records = Path(folder), RunRecords.read(folder)
    config = config_from_dict(records.config)
    if not config.privacy.adds_noise:
        config = with_settings(config, {**private_settings(config, epsilon), "privacy.mode": "central"})
    config = config_from_dict({**config.model_dump(), "run": {**config.run.model_dump(), "engine": "local"}})
    task = LoadedTask(config, progress)
    experiment = task.experiment(config)
    server = cast(PrivateServer, experiment.server)
    found: list[Finding] = []
    for stage in STAGES:
        state = _state(folder, task, experiment, server, stage)
        if getattr(config, stage).rounds and state is not None:
            progress.phase(f"attacking {stage}")
            found += _attack(task, experiment, server, server.message(state), count)
    if not found:
        raise ConfigError(f"run.method: {config.run.method} sends no updates, or a visit changes nothing, so there is nothing to attack")
    return found


def _state(folder: Path, task: LoadedTask, experiment: Experiment, server: PrivateServer, stage: str) -> ServerState | None:
    """Before the first round of stage 1, or of stage 2 with what the run ended with; None if that is not there."""
    state = server.start(experiment.method.initial(task.model))
    if stage == "stage1":
        return replace(state, stage=stage)
    if not has_final(folder):
        return None
    final = read_final(folder)
    return replace(state, stage=stage, tensors={**state.tensors, **final.constants, **final.tensors},
                   applied_depth=final.applied_depth, statistics=final.statistics)


def _attack(task: LoadedTask, experiment: Experiment, server: PrivateServer, message: Message, count: int) -> Iterator[Finding]:
    sums = server.sums_of(message)
    if not sums.layout.size:
        return
    message = unpack_message(pack_message(message, server.config.wire.dtype))
    clients = [client for client in experiment.clients if client.n_train][:CLIENTS]
    vectors = [contribute(server, experiment.method, task.model, client, Private(), message)[0].astype(np.int64)
               for client in clients]
    chosen = int(np.argmax([np.linalg.norm(vector) for vector in vectors]))
    if not vectors[chosen].any():       # a gate that saw two equal experts has not moved in a single step
        return
    target, total = vectors[chosen], np.sum(vectors, axis=0)
    count = max(20, min(count, MOST_DRAWS // (4 * len(target))))
    noise, shares = sums.sections(), sums.sections(3)
    multiplier = next(part.noise for part in sums.parts if part.name == "update")
    claimed = epsilon_of([multiplier], server.settings.delta)

    def noised(present: bool, trial: int) -> np.ndarray:
        return draw(derive(b"audit", present, trial), noise) + (target if present else 0)

    def noised_by_clients(present: bool, trial: int) -> np.ndarray:
        drawn = [draw(derive(b"audit", client, present, trial), shares) for client in range(3)]
        return np.sum(drawn, axis=0) + (target if present else 0)

    views = {("off", "server"): (lambda present, _: target * present, target),
             ("off", "reader"): (lambda present, _: target * present, total),
             ("central", "server"): (lambda present, _: target * present, target),
             ("central", "reader"): (noised, total + draw(derive(b"audit", "seen"), noise)),
             ("secure", "server"): (_masked(target), total),
             ("secure", "reader"): (lambda present, _: target * present, total),
             ("distributed", "server"): (noised_by_clients, total + draw(derive(b"audit", "seen"), noise)),
             ("distributed", "reader"): (noised_by_clients, total + draw(derive(b"audit", "seen"), noise))}
    for (mode, attacker), (release, seen) in views.items():
        told = distinguish(*trials(release, target.astype(float), count), server.settings.delta)
        private = mode in ("central", "distributed") and (mode, attacker) != ("central", "server")
        yield Finding(message.stage, mode, attacker, claimed if private else None, told,
                      _inverted(task, sums, message.stage, seen, clients, chosen))


def _masked(target: np.ndarray) -> Callable[[bool, int], np.ndarray]:
    """Return what the server gets from the client in a secure sum, as signed values: its vector, or zeros, under masks."""
    def release(present: bool, trial: int) -> np.ndarray:
        secrets = {client: derive(b"audit", "member", client, present, trial) for client in range(3)}
        identities = {client: secure_sum.identity_of(secret) for client, secret in secrets.items()}
        members = {client: secure_sum.Member(client, secret, identities) for client, secret in secrets.items()}
        terms = secure_sum.Terms("audit", "stage1", 1, 0, 3, ((len(target), 0),))
        vectors = {0: target * present, 1: np.zeros_like(target), 2: np.zeros_like(target)}
        roster = {client: secure_sum.advertise(member, terms, vectors[client]) for client, member in members.items()}
        promises = {client: secure_sum.Promises() for client in members}
        boxes = {client: secure_sum.share(member, terms, vectors[client], roster, promises[client])
                 for client, member in members.items()}
        inbox = {sender: boxes[sender][0] for sender in (1, 2)}
        masked = secure_sum.mask(members[0], terms, vectors[0], roster, inbox, promises[0])
        return masked[0].view(np.int32).astype(float)
    return release


def _inverted(task: LoadedTask, sums: Sums, stage: str, seen: np.ndarray, clients: Sequence[Client], chosen: int) -> Inverted | None:
    name = LAYERS[stage]
    if name not in sums.layout.slices:
        return None
    update = sums.split(seen)["update"]
    change = sums.layout.split(dequantize(update, _clip(sums), sums.bits))[name]
    features = [task.model.features(client.train).float().cpu().numpy().astype(float) for client in clients]
    return invert(change, features[chosen], np.concatenate([f for i, f in enumerate(features) if i != chosen]))


def _clip(sums: Sums) -> float:
    """The clip of the updates."""
    return next(part.bound for part in sums.parts if part.name == "update")
