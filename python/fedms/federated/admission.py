"""Decide which replies are accepted. `fedms.federated.schema` has checked the form of a reply; here it is compared with the
message, the blocks that the client trains, the change that training can cause, and what the client reported before.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.errors import FedMSError
from fedms.federated.client import Message, Participant, Reply
from fedms.federated.method import Method
from fedms.federated.schema import shown
from fedms.tensors import Tensors

ROUNDING = 0.05     # share of a tensor's norm that its encoding may change (`[wire] dtype`)


class RejectedReply(FedMSError):
    """A reply was not accepted; the message is the reason."""


class Admission:
    """Checks replies. It has no state.

    Args:
        config: The run file.
        order: Block numbers in the order of activation.
        block_of: Block number of each tensor whose name begins with `expert/`.
        method: Determines how much a visit can change a tensor.
        statistics: The statistics that a client may send once in a run, as zeros. Each counts samples by class.
    """

    def __init__(self, config: RunConfig, order: list[int], block_of: Mapping[str, int], method: Method,
                 statistics: Mapping[str, Tensor]) -> None:
        self.config, self.order, self.block_of, self.method, self.statistics = config, order, block_of, method, statistics

    def check(self, reply: Reply, message: Message, participant: Participant, counted: Collection[int]) -> None:
        """Raise RejectedReply unless this client can have computed this reply from this message.

        Args:
            counted: Ids of the clients whose statistics have been added already.
        """
        if reply.client != participant.id:
            raise RejectedReply(f"it is client {reply.client}'s, expected client {participant.id}'s")
        for name, what in (("n_train", "training"), ("n_validation", "validation")):
            told, known = getattr(reply, name), getattr(participant, name)
            if told != known:
                raise RejectedReply(f"{name} {told}, but the client has {known} {what} samples")
        if reply.score is not None and not reply.n_validation:
            raise RejectedReply(f"score {reply.score:g} of a client without validation samples")
        self._check_names(reply.tensors, message, participant)
        self._check_change(reply.tensors, message, participant)
        self._check_sums(reply, counted)

    def _check_names(self, tensors: Tensors, message: Message, participant: Participant) -> None:
        trained = set(self.order[:participant.trained_depth(message)])
        for name, tensor in tensors.items():
            if name not in message.tensors:
                raise RejectedReply(f"{shown(name)[1:-1]}: was not sent to it")
            if name.startswith("correction/"):
                raise RejectedReply(f"{name}: is what the server adds to frozen weights; no client trains it")
            if self.block_of.get(name, None) not in {None, *trained}:
                raise RejectedReply(f"{name}: block {self.block_of[name]} is not trained by this client now")
            _check_form(name, tensor, message.tensors[name])

    def _check_change(self, tensors: Tensors, message: Message, participant: Participant) -> None:
        """Check the change of each tensor, since a bound on all of them would allow any change of a small tensor."""
        names = list(tensors)
        sent = [self.method.received(name, message.tensors[name], participant) for name in names]
        changes = _norms(torch._foreach_sub([tensors[name] for name in names], sent) if names else [])
        for name, change, norm in zip(names, changes, _norms(sent)):
            if not math.isfinite(change):
                raise RejectedReply(f"{name}: holds NaN or infinity")
            most = self.config.clients.max_change * farthest(self.method, participant, name, tensors[name].numel(), norm)
            if change > most:
                raise RejectedReply(f"{name}: its change has norm {change:g}; accepted: up to {most:g}, by clients.max_change")

    def _check_sums(self, reply: Reply, counted: Collection[int]) -> None:
        for name, tensor in reply.statistics.items():
            if name not in self.statistics:
                raise RejectedReply(f"{shown(name)[1:-1]}: is no statistic that was asked for")
            if reply.client in counted:
                raise RejectedReply(f"{name}: the client has told it before, and it is told once")
            _check_form(name, tensor, self.statistics[name])
            if not bool((torch.isfinite(tensor) & (tensor >= 0) & (tensor == tensor.round())).all()):
                raise RejectedReply(f"{name}: expected whole numbers from 0")
            if float(tensor.sum()) != reply.n_train:
                raise RejectedReply(f"{name}: adds up to {float(tensor.sum()):g}, but the client has {reply.n_train} training samples")


def farthest(method: Method, participant: Participant, name: str, elements: int, norm: float) -> float:
    """Return approximately the largest norm of the change of a tensor that training in a visit can cause.

    Besides weight decay, a step of AdamW changes an element by at most about the learning rate, whatever the gradients are.
    The bound therefore is the learning rate times the number of steps times the square root of the number of elements. Honest
    clients stay below it, and come closest with few steps. It grows with a client's samples, as does the client's weight in
    the mean.

    Args:
        method: The method, which gives the learning rate and the number of epochs.
        participant: The client.
        name: Name of the tensor.
        elements: Its number of elements.
        norm: Its norm in the message.
    """
    stages = (method.config.stage1, method.config.stage2)
    lr, epochs = method.most_training(name)
    samples, batch = max(participant.n_train, participant.n_validation), min(stage.batch for stage in stages)
    way = lr * max(epochs * math.ceil(samples / batch), *(stage.steps or 0 for stage in stages))
    return way * math.sqrt(elements) + (way * max(stage.weight_decay for stage in stages) + ROUNDING) * norm


def plausible_validation(config: RunConfig, n_train: int) -> int:
    """Return a generous upper bound for the validation samples of a client with this number of training samples."""
    train, validation, _ = config.data.split
    return 10 + math.ceil(2 * (n_train + 1) * validation / train)


def _check_form(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise RejectedReply(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.dtype != expected.dtype:
        raise RejectedReply(f"{name}: {tensor.dtype}, expected {expected.dtype}")


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> list[float]:
    """Return the norm of each tensor, computed in one operation, because the tensors are many and small."""
    return torch.stack(torch._foreach_norm(list(tensors))).tolist() if tensors else []
