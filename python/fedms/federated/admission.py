"""Which replies count, and why the others do not. `fedms.federated.schema` has seen to it that a reply is one; here it is compared with
what was asked: the tensors that were sent, the blocks that this client trains, what training can have changed, and what
the client told of itself before.
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
    """A reply that must not enter the average; the message says what is wrong with it."""


class Admission:
    """Judges replies one by one; keeps nothing.

    Args:
        config: the run file.
        order: block numbers in the order of their activation.
        block_of: block number of each tensor under `expert/`.
        method: says how far a visit can change a tensor.
        statistics: statistics that a client may send once a run, as zeros; each counts samples by class.
    """

    def __init__(self, config: RunConfig, order: list[int], block_of: Mapping[str, int], method: Method,
                 statistics: Mapping[str, Tensor]) -> None:
        self.config, self.order, self.block_of, self.method, self.statistics = config, order, block_of, method, statistics

    def check(self, reply: Reply, message: Message, participant: Participant, counted: Collection[int]) -> None:
        """Raises RejectedReply unless this client can have given this reply to this message.

        Args:
            counted: clients whose statistics have been added up already.
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
        """Tensor by tensor: what is small beside the rest could otherwise be replaced."""
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
    """About the largest norm of a tensor's change that a visit's training can reach.

    AdamW moves an element by about its learning rate at most, whatever the gradients are, besides the decay of weights;
    so the bound is the learning rate times the visit's steps times the root of the number of elements. Honest clients stay
    below it, the closer the fewer steps they make; it grows with a client's samples as its weight in the mean does.

    Args:
        norm: of the tensor as it was sent.
    """
    stages = (method.config.stage1, method.config.stage2)
    lr, epochs = method.most_training(name)
    samples, batch = max(participant.n_train, participant.n_validation), min(stage.batch for stage in stages)
    way = lr * max(epochs * math.ceil(samples / batch), *(stage.steps or 0 for stage in stages))
    return way * math.sqrt(elements) + (way * max(stage.weight_decay for stage in stages) + ROUNDING) * norm


def plausible_validation(config: RunConfig, n_train: int) -> int:
    """Most validation samples of a client with so many training samples, generously: both are shares of the same data."""
    train, validation, _ = config.data.split
    return 10 + math.ceil(2 * (n_train + 1) * validation / train)


def _check_form(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise RejectedReply(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.dtype != expected.dtype:
        raise RejectedReply(f"{name}: {tensor.dtype}, expected {expected.dtype}")


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> list[float]:
    """Of each. They are many and small: one operation on all of them takes as long as on one."""
    return torch.stack(torch._foreach_norm(list(tensors))).tolist() if tensors else []
