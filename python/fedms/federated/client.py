"""Define a client's data, its visits and local training. Methods are composed of these functions, and engines carry the messages."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedms.config import RunConfig, Stage
from fedms.data import ClientSplit
from fedms.data.subset import Subset
from fedms.errors import FedMSError
from fedms.federated.devices import Device, Fitting, device_of
from fedms.federated.schema import REASON
from fedms.foreign import printable
from fedms.seeds import derive_seed, generator
from fedms.tasks import Score
from fedms.tensors import Tensors
from fedms.training.device import peak, reset_peak, synchronize
from fedms.training.expert_model import ExpertModel
from fedms.training.flop_meter import Elsewhere
from fedms.training.losses import LossOn

if TYPE_CHECKING:
    from fedms.federated.shared_visits import SharedVisits


class ClientFailure(FedMSError):
    """A client's visit failed. The run continues without it, and the error message is recorded as the reason."""


@dataclass(frozen=True)
class Message:
    """A message from the server to the clients of a round.

    Attributes:
        stage: Name of the stage.
        round: Number of the round; rounds count from 1 in each stage.
        clients: Ids of the clients that are sampled for this round, in ascending order.
        depth: Number of blocks of the activation order that are trained.
        applied_depth: Number of blocks of the activation order whose LoRA pairs are applied. It is at least `depth`.
        tensors: Tensors that are sent in every round.
        constants: Tensors that no longer change. They are sent to a client once in each stage, and the client keeps them.
        statistics: Sums of the clients' statistics.
    """

    stage: str
    round: int
    clients: tuple[int, ...]
    depth: int
    applied_depth: int
    tensors: Tensors
    constants: Tensors = field(default_factory=dict)
    statistics: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A client's reply to a message.

    Attributes:
        client: Id of the client.
        tensors: Tensors to be averaged.
        n_train: Number of training samples.
        n_validation: Number of validation samples.
        score: Validation score of the received model in [0, 1], or None if the client has no validation samples.
        metrics: Numbers for the records, by name.
        statistics: Tensors to be added up.
    """

    client: int
    tensors: Tensors
    n_train: int
    n_validation: int
    score: float | None
    metrics: dict[str, float | None]
    statistics: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """A client's reply in a round with privacy.

    Args:
        client: Id of the client.
        steps: (size,) int32 vector, in central mode, in which the server adds the noise.
        key: Public key for the round (32 bytes), in the other modes, in which a masked vector follows.
    """

    client: int
    steps: np.ndarray | None = None
    key: bytes | None = None


@dataclass(frozen=True)
class Private:
    """The private state of a client between visits. It never leaves the client."""

    tensors: Tensors = field(default_factory=dict)

    @property
    def has_expert(self) -> bool:
        """Whether the client has trained an expert of its own."""
        return any(name.startswith("expert/") for name in self.tensors)


class Participant:
    """What the server knows about a client: its id, its numbers of training and validation samples, and its device."""

    id: int

    if TYPE_CHECKING:       # only to be read, so that properties will do
        @property
        def n_train(self) -> int: ...

        @property
        def n_validation(self) -> int: ...

        @property
        def device(self) -> Device: ...

    def trained_depth(self, message: Message) -> int:
        """Return how many blocks this client trains in a round: the active ones, or fewer if its device cannot afford as many. The
        remaining active blocks stay frozen at this client.
        """
        most = self.device.now(message.stage, message.round).depth
        return message.depth if most is None else min(message.depth, most)


class Client(Participant):
    """A client's data, device and settings.

    What only a visit needs is created at the first visit, because most of a hundred thousand registered clients may never be visited.

    Args:
        split: The client's samples for training, validation and testing.
        config: The run file.
        fitting: What the planner found about the model's memory and operations; see `device_of`.
        shared: Where visits are that other runs have in common with this one, or None.
    """

    n_train: int
    n_validation: int

    def __init__(self, split: ClientSplit, config: RunConfig, fitting: Fitting = Fitting(),
                 shared: SharedVisits | None = None) -> None:
        self.split, self.config, self.fitting, self.shared = split, config, fitting, shared
        self.id, self.group = split.id, split.group
        self.n_train, self.n_validation = len(split.train), len(split.validation)

    @cached_property
    def train(self) -> Subset:
        return Subset(self.split.train)

    @cached_property
    def validation(self) -> Subset:
        return Subset(self.split.validation)

    @cached_property
    def test(self) -> Subset:
        return Subset(self.split.test)

    @cached_property
    def device(self) -> Device:
        return device_of(self.config, self.id, self.fitting)

    def seed(self, message: Message, purpose: str) -> int:
        """Return the seed for a purpose, such as "shuffle", in one round of this client."""
        return derive_seed(self.config.run.seed, purpose, message.stage, message.round, self.id)


@dataclass(frozen=True)
class Visit:
    """The result of a visit as the client reports it.

    Attributes:
        reply: The reply, or None if the visit failed.
        reason: Why the visit failed, or None.
        flops: Floating-point operations of the visit.
        seconds: Its duration.
        peak_memory_bytes: The most memory in use during it.
        elsewhere: How much of its duration is that of a part that another run has made; None if it has no part that runs can
            share.
    """

    reply: Reply | None
    reason: str | None
    flops: int
    seconds: float
    peak_memory_bytes: int
    elsewhere: float | None = None


ClientStep = Callable[[ExpertModel, Client, Private, Message], tuple[Reply, Private]]


def visit(step: ClientStep, model: ExpertModel, client: Client, private: Private, message: Message,
          ahead: Sequence[int] | None = None) -> tuple[Visit, Private]:
    """Carry out a method's step and measure it. A client that fails keeps its previous private state.

    Args:
        step: The method's step.
        model: The model of this process.
        client, private: The client, and its private state before the visit.
        message: The server's message.
        ahead: See `Server.ahead`.
    """
    flops, started = model.meter.flops, time.perf_counter()
    reset_peak(model.device)
    model.clear(ahead)
    model.meter.elsewhere = None
    reply, after, reason = outcome_of(lambda: step(model, client, private, message), private)
    synchronize(model.device)
    elsewhere = model.meter.elsewhere or Elsewhere()
    return Visit(reply, reason, model.meter.flops - flops, time.perf_counter() - started + elsewhere.seconds,
                 max(peak(model.device), elsewhere.peak_memory_bytes), model.meter.elsewhere and elsewhere.seconds), after


def outcome_of(step: Callable[[], tuple[Reply, Private]], private: Private) -> tuple[Reply | None, Private, str | None]:
    """Carry out a step; return the reply, the private state after it, and None, or None, the state before it, and the reason why it
    failed."""
    try:
        with memory_errors():
            return (*step(), None)
    except ClientFailure as failure:
        return None, private, printable(str(failure), REASON)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an out-of-memory error into a ClientFailure, so that the run continues without the client."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:        # torch's CPU allocator raises a plain RuntimeError
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise ClientFailure("out of memory; a smaller batch, sal.max_depth or sal.cache_bytes may help") from error
        raise


def validate(model: ExpertModel, client: Client, expert: str) -> Score:
    """Return the validation score of an expert that is loaded in the model."""
    return model.task.score(model.opinions(expert, client.validation), model.targets(client.validation))


# In fp16 the loss is scaled, so that small gradients do not become zero. The scale starts at FIRST_SCALE and is halved whenever
# a gradient overflows. A visit fails after more than MOST_SKIPPED overflows in a row.
FIRST_SCALE, MOST_SKIPPED = 2.0**12, 12


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate.

    Attributes:
        params: The parameters, by the names under which their optimizer state is kept.
        lr: The learning rate.
    """

    params: Mapping[str, Tensor]
    lr: float


def train(model: ExpertModel, client: Client, message: Message, private: Private, groups: list[Group],
          loss_on: LossOn, part: Subset | None = None, rows: Tensor | None = None,
          epochs: int | None = None, after_epoch: Callable[[], None] | None = None) -> tuple[float, Tensors]:
    """Train the given parameters with AdamW on a subset of the client's samples.

    Args:
        model: The model, with the client's tensors loaded.
        client: The client.
        message: The message of the round.
        private: Holds the optimizer's state of the last visit if `[clients] optimizer = "kept"`.
        groups: The parameters and their learning rates.
        loss_on: Called once with the subset; with `[data] augment`, called in each step with the augmented images of the
            batch.
        part: The subset; the default is the training samples.
        rows: (n,) rows of the subset; the default is all.
        epochs: Number of epochs; the default is that of the stage.
        after_epoch: Called after each epoch, and at the end if the last epoch is incomplete.

    Returns:
        The mean training loss over all units, and the optimizer's state (empty if it is not kept).

    Raises:
        ClientFailure: If a loss or a gradient norm is NaN or infinite.
    """
    settings = getattr(client.config, message.stage)
    part = client.train if part is None else part
    rows = torch.arange(len(part)) if rows is None else rows
    named = {name: p for group in groups for name, p in group.params.items()}
    # Fused: one kernel for all pairs, of which there are many small ones.
    optimizer = torch.optim.AdamW([{"params": list(group.params.values()), "lr": group.lr} for group in groups
                                   if group.params], weight_decay=settings.weight_decay, fused=True)
    keeps = client.config.clients.optimizer == "kept"
    if keeps:
        load_moments(optimizer, named, private.tensors, message.stage)
    torch.manual_seed(client.seed(message, "dropout"))
    shuffle = generator(client.seed(message, "shuffle"))
    total, seen, done, skipped = 0.0, 0, 0, 0
    micro_batch = settings.micro_batch or settings.batch
    scaler = torch.amp.GradScaler(model.device.type, init_scale=FIRST_SCALE, enabled=client.config.run.dtype == "fp16")
    loss_of = None if client.config.data.augment else loss_on(part)
    for batch in batches_of(model, part, rows, settings, shuffle, epochs):
        if done and after_epoch is not None and done % len(rows) == 0:
            after_epoch()
        optimizer.zero_grad(set_to_none=True)
        if loss_of is not None:
            loss = accumulate(loss_of, batch, micro_batch, partial(model.count_units, part), scaler)
        else:
            with model.augmented_batches(part, batch) as images:
                loss = accumulate(loss_on(images), torch.arange(len(images)), micro_batch, scaler=scaler)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), settings.clip or float("inf"))
        finite = math.isfinite(loss) and bool(torch.isfinite(norm))
        skipped = 0 if finite else skipped + 1
        if not finite and (skipped > MOST_SKIPPED or not scaler.is_enabled()):
            raise diverged(message.stage, loss, float(norm), done)
        scaler.step(optimizer)      # in fp16 left out where a gradient is not finite
        scaler.update()
        if not finite:
            continue
        units = model.count_units(part, batch)
        total, seen, done = total + loss * units, seen + units, done + len(batch)
    if after_epoch is not None:
        after_epoch()
    return total / max(seen, 1), moments_of(optimizer, named, message.stage) if keeps else {}


def diverged(stage: str, loss: float, norm: float, samples: int) -> ClientFailure:
    """Return the failure of a client whose loss or gradient norm is NaN or infinite after training on `samples` samples."""
    return ClientFailure(f"training diverged: loss {loss:g}, gradient norm {norm:g} after {samples} samples; a lower {stage}.lr may help")


def batches_of(model: ExpertModel, part: Subset, rows: Tensor, settings: Stage, shuffle: torch.Generator,
               epochs: int | None) -> Iterator[Tensor]:
    """Yield the batches of a visit: those of `epochs` epochs, or `[stage] steps` batches. Every epoch has a new random order.

    With `[data] group_by_length` a batch holds samples of similar length, and the batches are in random order.
    """
    steps = settings.steps if epochs is None else None
    done = 0
    for _ in range(epochs or settings.epochs) if steps is None else count():
        order = rows[torch.randperm(len(rows), generator=shuffle)]
        batches = order.split(settings.batch)
        if model.config.data.group_by_length and model.task.per_token:
            lengths = model.dataset.inputs.lengths[part.indices[order]]
            batches = order[lengths.argsort(stable=True)].split(settings.batch)
            batches = [batches[i] for i in torch.randperm(len(batches), generator=shuffle).tolist()]
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return


def accumulate(loss_of: Callable[[Tensor], Tensor], batch: Tensor, micro_batch: int, units: Callable[[Tensor], int] = len,
               scaler: torch.amp.GradScaler | None = None) -> float:
    """Add the gradients of the mean loss of a batch (B,) to the parameters, in micro-batches of `micro_batch` samples.

    A micro-batch is weighted by its number of `units`, and the loss is scaled by `scaler` before the backward pass.

    Returns:
        The mean loss of the batch, unscaled.
    """
    total = 0.0
    for part in batch.split(micro_batch):
        loss = loss_of(part) * (units(part) / units(batch))
        (loss if scaler is None else scaler.scale(loss)).backward()
        total += float(loss.detach())
    return total


def moments_of(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], stage: str) -> Tensors:
    """Return copies, on the CPU, of the optimizer's state of the named parameters: `optimizer/STAGE/NAME/KIND`."""
    return {f"optimizer/{stage}/{name}/{kind}": value.to("cpu", copy=True)
            for name, p in named.items() for kind, value in optimizer.state.get(p, {}).items()}


def load_moments(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], kept: Tensors, stage: str) -> None:
    """Copy the state that `moments_of` returned at the last visit into the optimizer. A parameter without such a state starts anew."""
    for name, p in named.items():
        prefix = f"optimizer/{stage}/{name}"
        if f"{prefix}/step" in kept:      # a pair activated since the last visit has none yet
            optimizer.state[p] = {kind: kept[f"{prefix}/{kind}"].to(p.device, copy=True) for kind in ("step", "exp_avg", "exp_avg_sq")}
