"""What a federated method must answer: what travels, what a client does with a message, and how a client predicts.

All methods run the same two stages with the same rounds, local epochs and learning rates, so that they differ in what they
share and keep, and in nothing else.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Participant, Private, Reply
from fedms.tensors import Tensors
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class BroadcastPolicy(Enum):
    """How a tensor of the server goes to clients."""

    EVERY_ROUND = "with the message of every round"
    ONCE = "once a stage: a client keeps it"
    NEVER = "not at all"


@dataclass(frozen=True)
class Prediction:
    """What a client answers about samples with U units: see `fedms.tasks.Task`; of a classification, logits of n samples.

    personalized: (U, K) opinion that the method answers.
    global_, local: (U, K) opinions of the shared and of the private expert, where the method has them.
    weights: (U, 2) weights of the shared and of the private expert, where they are mixed.
    """

    personalized: Tensor
    global_: Tensor | None = None
    local: Tensor | None = None
    weights: Tensor | None = None


class Method(ABC):
    """Base of all methods. An instance holds settings alone: all state is in messages, replies and `Private`.

    A method answers three questions, in `broadcast_policy`, `client_step` and `predict`; the other members have defaults.
    `fedms.methods.steps` has the steps that most methods are composed of.

    Attributes:
        config: the run file.
        settings: the table of the method's own constants in it; None for a method without one.
        name: what run files call the method.
        personal: stages in whose visits a client trains something of its own. A client that is never visited in them answers
            as all others do, which the run's summary says.
    """

    personal: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: RunConfig) -> None:
        self.config, self.name = config, config.run.method
        self.settings: Any = config.settings

    @property
    def trains_gate(self) -> bool:
        """Whether the weights of the mixed experts come from a gate that is trained."""
        return False

    @property
    def restarts_depth(self) -> bool:
        """Whether activation begins again in stage 2, where it then says what of the private expert is trained, as what is shared
        has come to an end. Otherwise the depth that stage 1 reached stays, and goes on growing."""
        return self.config.method_row.two_stages

    def initial(self, model: ExpertModel) -> Tensors:
        """Returns all tensors that the server starts with, by name."""
        return model.initial(self.config.run.seed)

    @abstractmethod
    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        """Says how the server's tensor of this name goes to clients in a stage, "stage1" or "stage2"."""

    def statistics(self, classes: int) -> Tensors:
        """Returns the statistics that clients send for the server to add up, as zeros."""
        return {}

    def most_training(self, name: str) -> tuple[float, int]:
        """The highest learning rate, and the most epochs, that a visit trains a tensor with. The server refuses a reply in
        which a tensor has changed by more than such training can change it (`[clients] max_change`)."""
        stages = (self.config.stage1, self.config.stage2)
        lr = self.config.gate.lr if name.startswith("gate/") else max(stage.lr for stage in stages)
        return lr, max(stage.epochs for stage in stages)

    def received(self, name: str, tensor: Tensor, participant: Participant) -> Tensor:
        """Returns what a client begins to train from, of a tensor that was sent to it: all of it, unless it can train a part only."""
        return tensor

    def assembled(self, model: ExpertModel, tensors: Tensors) -> Tensors:
        """Returns the shared expert as a model holds it, of the tensors that travel: the same, unless what travels is less."""
        return tensors

    def own_shift(self, private: Private, final: Message) -> Tensor | None:
        """Returns what is added to the logits of a client's private expert in use, (K,), where the method adds something."""
        return None

    @abstractmethod
    def client_step(self, model: ExpertModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        """Carries out a client's visit.

        Args:
            model: the one model of this process; the method loads into it what the client has.
            client: its samples, device and seeds.
            private: what the client kept after its last visit; empty at the first one.
            message: what the server sent.

        Returns:
            What the client sends back, and what it keeps until its next visit.

        Raises:
            ClientFailure: if the client must be left out of this round.
        """

    @abstractmethod
    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        """Answers about samples once training is over.

        Args:
            part: the samples, in the model's data set.
            private: what the client kept; empty for one that was never visited.
            final: the server's last message, of the stage "done".
        """

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        """Loads what the client with this private state answers with, for tasks whose answers are generated."""
        raise NotImplementedError(f"{self.name} generates no answers")
