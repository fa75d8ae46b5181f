"""A client's data and its visits. Methods are composed of these functions, and engines carry the messages."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedms.config import RunConfig
from fedms.data import ClientSplit
from fedms.data.subset import Subset
from fedms.errors import FedMSError
from fedms.federated.devices import Device, Fitting, device_of
from fedms.federated.schema import REASON
from fedms.foreign import printable
from fedms.seeds import derive_seed
from fedms.tasks import Score
from fedms.tensors import Tensors
from fedms.training.device import peak, reset_peak, synchronize
from fedms.training.expert_model import ExpertModel
from fedms.training.flop_meter import Elsewhere

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
        elsewhere: How much of its duration did not pass in this run, as another one has made a part of it; None if it has no part
            that runs can share.
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
