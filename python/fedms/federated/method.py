"""The base class of federated methods.

A method defines which tensors are sent, what a client does with a message, and how a client predicts. All methods run the
same two stages with the same rounds, local epochs and learning rates, so that they differ only in what they share and keep.
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
from fedms.federated.lockstep import Visiting, alone
from fedms.tensors import Tensors
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class BroadcastPolicy(Enum):
    """How the server sends a tensor to clients."""

    EVERY_ROUND = "sent with the message of every round"
    ONCE = "sent once in each stage, and kept by the client"
    NEVER = "never sent"


@dataclass(frozen=True)
class Prediction:
    """A client's predictions for samples with U units; `fedms.tasks.Task` defines units and opinions.

    For classification a unit is a sample, and an opinion is its logits.

    Attributes:
        personalized: (U, K) opinion of the method.
        global_, local: (U, K) opinions of the shared and of the private expert, if the method has them.
        weights: (U, 2) weights of the shared and of the private expert, if the method mixes them.
    """

    personalized: Tensor
    global_: Tensor | None = None
    local: Tensor | None = None
    weights: Tensor | None = None


class Method(ABC):
    """Base class of all methods. An instance only holds settings; all state is in messages, replies and `Private`.

    A method implements `broadcast_policy`, `predict`, and either `visit` or `client_step`; the other members have defaults. Most
    methods are composed of the functions in `fedms.methods.steps`.

    Attributes:
        config: The run file.
        settings: The method's own table in the run file, or None.
        name: The method's name in run files.
        personal: Stages in which a visited client trains something of its own. The summary of a run counts the clients that
            were never visited in such a stage, since they predict with the shared tensors only.
    """

    personal: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: RunConfig) -> None:
        self.config, self.name = config, config.run.method
        self.settings: Any = config.settings

    @property
    def trains_gate(self) -> bool:
        """Whether the weights of the experts come from a trained gate."""
        return False

    @property
    def restarts_depth(self) -> bool:
        """Whether activation begins again in stage 2, where it then says what of the private expert is trained, as what is shared
        has come to an end. Otherwise the depth that stage 1 reached stays, and goes on growing."""
        return self.config.method_row.two_stages

    def initial(self, model: ExpertModel) -> Tensors:
        """Return the initial tensors of the server, by name."""
        return model.initial(self.config.run.seed)

    @abstractmethod
    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        """Return how the server sends the tensor of this name to clients in a stage, "stage1" or "stage2"."""

    def statistics(self, classes: int) -> Tensors:
        """Return the statistics that clients send to be added up, as zeros."""
        return {}

    def most_training(self, name: str) -> tuple[float, int]:
        """Return the highest learning rate and the largest number of epochs with which a visit trains a tensor.

        The server rejects a reply in which a tensor has changed by more than such training can change it (`[clients]
        max_change`).
        """
        stages = (self.config.stage1, self.config.stage2)
        lr = self.config.gate.lr if name.startswith("gate/") else max(stage.lr for stage in stages)
        return lr, max(stage.epochs for stage in stages)

    def received(self, name: str, tensor: Tensor, participant: Participant) -> Tensor:
        """Returns what a client begins to train from, of a tensor that was sent to it: all of it, unless it can train a part
        only."""
        return tensor

    def assembled(self, model: ExpertModel, tensors: Tensors) -> Tensors:
        """Returns the shared expert as a model holds it, of the tensors that travel: the same, unless what travels is less."""
        return tensors

    def own_shift(self, private: Private, final: Message) -> Tensor | None:
        """Returns what is added to the logits of a client's private expert in use, (K,), where the method adds something."""
        return None

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        """Begin a client's visit, which asks for its trainings instead of carrying them out; see `fedms.federated.lockstep`. So
        visits of several clients can be carried out side by side.

        Args:
            model: The model of this process. The method loads the client's tensors into it. While the visit waits for a training,
                other clients may use the model; when it goes on, its experts, shifts and gate are there again.
            client: Its samples, device and seeds.
            private: The client's private state after its last visit; empty at the first one.
            message: The server's message.

        Returns:
            A generator, which ends with the client's reply and its private state until its next visit. It raises a
            ClientFailure if the client has to be left out of this round.
        """
        raise NotImplementedError(f"{type(self).__name__} implements neither visit nor client_step")

    def client_step(self, model: ExpertModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        """Carry out a client's visit; the arguments are those of `visit`.

        Returns:
            The client's reply, and its private state until its next visit.

        Raises:
            ClientFailure: If the client has to be left out of this round.
        """
        return alone(self.visit(model, client, private, message), model, client, private)

    @property
    def asks_for_training(self) -> bool:
        """Whether the method has its visits in the form of `visit`."""
        first = next(kind for kind in type(self).__mro__ if not {"visit", "client_step"}.isdisjoint(vars(kind)))
        return first is not Method and "visit" in vars(first)

    @abstractmethod
    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        """Predict after training.

        Args:
            model: The model of this process.
            part: The samples, in the model's data set.
            private: The client's private state; empty if it was never visited.
            final: The server's last message, of the stage "done".
        """

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        """Load a client's tensors and return a generator of answers, for tasks whose answers are generated."""
        raise NotImplementedError(f"{self.name} generates no answers")
