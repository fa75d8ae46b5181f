"""The server: it averages the replies of a round, decides which blocks are active, and makes the next message.

It works on plain data and needs no model.
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.errors import AllClientsFailed
from fedms.federated import schedule
from fedms.federated.admission import Admission, RejectedReply
from fedms.federated.aggregation import Residual, WeightedMean, krum, median, trimmed_mean
from fedms.federated.client import Message, Participant, Reply
from fedms.federated.method import BroadcastPolicy, Method
from fedms.seeds import generator
from fedms.tensors import Tensors, is_a, prefixed, under
from fedms_ext import LoRA

__all__ = ["STAGES", "AllClientsFailed", "Collected", "RejectedReply", "Server", "ServerState"]

STAGES = ("stage1", "stage2")
HEAVIEST = 10       # largest weight of a client in the score that activates blocks, in multiples of the median weight


@dataclass(frozen=True)
class ServerState:
    """The complete state of the server between two rounds.

    Attributes:
        stage, round: The next round. The stage is "done" after the last one.
        tensors: The current shared tensors: expert, head and gate.
        sal: State of the activation schedule in this stage.
        applied_depth: Number of blocks of the activation order whose pairs are applied.
        statistics: Sums of the clients' statistics.
        final_depth: Depth at the end of each finished stage.
        counted: Ids of the clients whose statistics are included in the sums.
    """

    stage: str
    round: int
    tensors: Tensors
    sal: schedule.SalState
    applied_depth: int
    statistics: Tensors = field(default_factory=dict)
    final_depth: Mapping[str, int] = field(default_factory=dict)
    counted: frozenset[int] = frozenset()


class Collected:
    """The replies of a round so far.

    Replies are added in ascending order of the clients' ids, so that all engines give the same bits.

    Args:
        weights: "samples" weights a reply by its number of training samples; "uniform" weights all replies equally.
        streams: Whether replies are added to a running mean. Otherwise all of them are kept until the round ends.
        counted: Ids of the clients whose statistics have been added, in this round or an earlier one.
    """

    def __init__(self, weights: str, streams: bool = True, counted: Iterable[int] = ()) -> None:
        self.weights, self.streams, self.counted = weights, streams, set(counted)
        self.mean, self.residual = WeightedMean(), Residual()
        self.replies: list[Tensors] = []
        self.statistics: Tensors = {}
        self.numbers: list[dict[str, float | None]] = []        # one dict for each reply

    def add(self, reply: Reply) -> None:
        weight = float(reply.n_train) if self.weights == "samples" else 1.0
        if self.streams:
            self.mean.add(reply.tensors, weight)
            self.residual.add(reply.tensors, weight)
        else:
            self.replies.append(reply.tensors)
        if reply.statistics:
            self.counted.add(reply.client)
        for name, tensor in reply.statistics.items():
            self.statistics[name] = self.statistics.get(name, 0) + tensor
        self.numbers.append({**reply.metrics, "score": reply.score, "n_train": reply.n_train,
                             "n_validation": reply.n_validation})

    def average(self, name: str, by: str = "n_validation") -> float | None:
        """Return the mean of one of the numbers over the clients that sent it, weighted by another number."""
        pairs = [(numbers[by], numbers[name]) for numbers in self.numbers if numbers.get(name) is not None]
        total = sum(weight for weight, _ in pairs)
        return sum(weight * value for weight, value in pairs) / total if total else None

    def score(self, robust: bool) -> float | None:
        """Return the validation score of the model that the clients received, or None if no client has validation samples.

        The activation schedule uses it.

        Args:
            robust: Take the median over clients. Otherwise take the mean, weighted like the replies: by validation samples,
                limited to HEAVIEST times the median of the clients, or uniformly.
        """
        told = [(n["n_validation"], n["score"]) for n in self.numbers if n["score"] is not None]
        if not told:
            return None
        if robust:
            return statistics.median(score for _, score in told)
        heaviest = HEAVIEST * statistics.median(weight for weight, _ in told)
        weights = [min(weight, heaviest) if self.weights == "samples" else 1 for weight, _ in told]
        total = sum(weights)
        return sum(weight * score for weight, (_, score) in zip(weights, told)) / total if total else None

    # To and from plain data and tensors, for checkpoints

    def plain(self) -> dict[str, Any]:
        return {"weights": self.weights, "streams": self.streams, "replies": len(self.replies),
                "counted": sorted(self.counted),
                "numbers": self.numbers, "mean_weights": self.mean.weights,
                "residual_weights": {layer: [w for _, _, w in pairs] for layer, pairs in self.residual.pairs.items()}}

    def tensors(self) -> Tensors:
        pairs = {f"residual/{layer}/{i}/{x}": t for layer, pairs in self.residual.pairs.items()
                 for i, pair in enumerate(pairs) for x, t in zip("ab", pair[:2])}
        replies = {f"replies/{i}/{n}": t for i, reply in enumerate(self.replies) for n, t in reply.items()}
        return {**prefixed("mean/", self.mean.sums), **prefixed("sums/", self.statistics), **pairs, **replies}

    @classmethod
    def restore(cls, plain: Mapping[str, Any], tensors: Tensors) -> Collected:
        self = cls(plain["weights"], plain["streams"], plain.get("counted", ()))
        self.numbers = list(plain["numbers"])
        self.mean.weights = dict(plain["mean_weights"])
        self.mean.sums = {name: tensors[f"mean/{name}"] for name in self.mean.weights}
        self.residual.pairs = {
            layer: [(tensors[f"residual/{layer}/{i}/a"], tensors[f"residual/{layer}/{i}/b"], weight)
                    for i, weight in enumerate(weights)]
            for layer, weights in plain["residual_weights"].items()}
        self.statistics = under("sums/", tensors)
        self.replies = [under(f"replies/{i}/", tensors) for i in range(plain["replies"])]
        return self


class Server:
    """The server of a run.

    Args:
        config: The run file.
        order: Block numbers in the order of activation.
        block_of: Block number of each tensor whose name begins with `expert/`.
        method: Determines how tensors are sent to clients, and how much a visit can change them.
        statistics: The statistics that clients send to be added up, as zeros.
    """

    def __init__(self, config: RunConfig, order: list[int], block_of: Mapping[str, int],
                 method: Method, statistics: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.config, self.order, self.block_of, self.method, self.statistics = config, order, block_of, method, statistics
        self.members: Sequence[int] = range(config.clients.count)     # ids from which the clients of a round are drawn
        self.schedule = schedule.from_config(config.sal, len(order))
        self.admission = Admission(config, order, block_of, method, statistics)

    def check(self) -> None:
        """Raise a ConfigError if the run cannot begin. Called before anything is written."""

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        """Return the method's policy for a tensor, except that a frozen A is never sent: every client draws the same A."""
        if self.config.aggregation == "freeze_a" and is_a(name):
            return BroadcastPolicy.NEVER
        return self.method.broadcast_policy(stage, name)

    @property
    def first_stage(self) -> str:
        """The first stage that has rounds."""
        return next(stage for stage in STAGES if getattr(self.config, stage).rounds)

    def start(self, tensors: Tensors) -> ServerState:
        """Return the state before the first round."""
        sal = self.schedule.start()
        # An expert that was trained before (`[lora] start`) is applied in every block where its B is not zero.
        active = [self.order.index(block) + 1 for name, block in self.block_of.items()
                  if self.config.lora.start is not None and name.endswith("lora_b") and tensors[name].any()]
        return ServerState(self.first_stage, 1, tensors, sal, max([sal.depth, *active]))

    def message(self, state: ServerState, busy: Collection[int] = ()) -> Message:
        """Return the message of the next round. After the last round it holds the final tensors, for evaluation, and names no
        clients. `busy`: see `sample`.
        """
        applied = set(self.order[:state.applied_depth])
        sent: dict[BroadcastPolicy, Tensors] = {policy: {} for policy in BroadcastPolicy}
        for name, tensor in state.tensors.items():
            if name not in self.block_of or self.block_of[name] in applied:
                sent[self.broadcast_policy(state.stage, name)][name] = tensor
        clients = self.sample(state.stage, state.round, busy) if state.stage in STAGES else ()
        return Message(state.stage, state.round, clients, state.sal.depth, state.applied_depth,
                       sent[BroadcastPolicy.EVERY_ROUND], sent[BroadcastPolicy.ONCE], state.statistics)

    def ahead(self, message: Message, participant: Participant) -> Sequence[int] | None:
        """Return the depths to which activation may go on in later rounds, ascending, for which a client's cache makes provision; None
        if it makes none: without `[sal] cache_ahead`, or if its device has no memory for that.
        """
        if message.stage not in STAGES or not self.config.sal.cache_ahead or not participant.device.keeps_ahead:
            return None
        return self.depths_ahead(message.stage, message.round, message.depth)

    def depths_ahead(self, stage: str, round: int, depth: int) -> Sequence[int]:
        """Return the depths to which activation can go on after a round that has this depth, ascending."""
        before, left = round - 1, getattr(self.config, stage).rounds - round
        if not self.method.restarts_depth:      # both stages are one for the schedule
            before += self.config.stage1.rounds if stage == "stage2" else 0
            left += self.config.stage2.rounds if stage == "stage1" else 0
        return schedule.depths_ahead(self.schedule, depth, before, left)

    def awaited(self) -> int:
        """Return the number of replies that a round waits for."""
        return self.config.clients.awaited_of(len(self.members))

    def admit(self, reply: Reply, message: Message, participant: Participant, collected: Collected,
              now: Message | None = None) -> None:
        """Add a reply to the round, if this client can have given it to this message.

        Args:
            now: In a buffered round, the message of the round to which the reply is added; None if it is the same message.

        Raises:
            RejectedReply: If the reply is refused. The message names what is wrong with it, and the round is unchanged.
        """
        self.admission.check(reply, message, participant, collected.counted)
        collected.add(reply if now is None else carried(reply, message, now))

    def step(self, state: ServerState, collected: Collected) -> tuple[ServerState, dict[str, Any]]:
        """Finish a round: average the replies of its clients.

        Returns:
            The next state, and the record of the round.

        Raises:
            AllClientsFailed: If there are fewer replies than `[clients] quorum` or the aggregation rule requires, or none.
        """
        count, sampled = len(collected.numbers), self.awaited()
        if not collected.numbers:
            raise AllClientsFailed(f"{state.stage}, round {state.round}: no client could train; see visits.jsonl")
        if count < self.config.clients.quorum * sampled:
            raise AllClientsFailed(f"{state.stage}, round {state.round}: {count} of {sampled} clients could train, fewer "
                                   f"than clients.quorum = {self.config.clients.quorum:g} asks for; see visits.jsonl")
        if count < (least := self._least_of_rule(sampled)):
            raise AllClientsFailed(f"{state.stage}, round {state.round}: {count} of {sampled} clients could train, fewer "
                                   f"than the {least} that aggregate.rule = {self.config.aggregation!r} needs to give any "
                                   "protection; see visits.jsonl")
        last = self._ends_activation(state)
        after = replace(state, tensors={**state.tensors, **self._combine(collected, state.tensors)},
                        statistics={**state.statistics, **{n: state.statistics.get(n, 0) + t for n, t in collected.statistics.items()}},
                        counted=frozenset(collected.counted),
                        sal=state.sal if last else self.schedule.advance(state.sal, collected.score(not self._streams)))
        record = {
            "stage": state.stage, "round": state.round, "depth": state.sal.depth, "clients": len(collected.numbers),
            **{name: collected.average(name, by="n_train") for name in ("loss", "gate_mean", "gate_entropy")},
            **{name: collected.average(name) for name in ("validation_accuracy", "validation_loss")},
            "residual_norm": collected.residual.norm(),
            "event": self._event(state, after),
        }
        return self._next_round(after), record

    def _event(self, before: ServerState, after: ServerState) -> str | None:
        """Return the text in a round's record about the blocks that were activated after it, or None."""
        activated = [str(block) for block in self.order[before.sal.depth:after.sal.depth]]
        return f"activated block{'s' * (len(activated) > 1)} {', '.join(activated)}" if activated else None

    def _ends_activation(self, state: ServerState) -> bool:
        """Return whether no round follows in which blocks that are activated after this one would be trained."""
        goes_on = state.stage == "stage1" and self.config.stage2.rounds and not self.method.restarts_depth
        return not goes_on and state.round == getattr(self.config, state.stage).rounds

    def _least_of_rule(self, sampled: int) -> int:
        """Return the number of replies that a robust rule needs to be robust: the bound of Krum, or the number from which
        a trimmed mean trims at least one value, if it would trim any with the replies of all sampled clients."""
        settings = self.config.aggregate
        if self.config.aggregation == "krum":
            return 2 * settings.byzantine + 3
        if self.config.aggregation == "trimmed_mean" and settings.trim * sampled >= 1:
            return math.ceil(1 / settings.trim)
        return 1

    def collect(self, state: ServerState | None = None) -> Collected:
        """Return an empty round that follows this state."""
        return Collected(self.config.aggregate.weights, self._streams, state.counted if state else ())

    def restore(self, state: ServerState, plain: Mapping[str, Any], tensors: Tensors) -> Collected:
        """Return an unfinished round from a checkpoint."""
        return Collected.restore(plain, tensors)

    @property
    def _streams(self) -> bool:
        """Whether the rule is a mean. The robust rules need all replies at once."""
        return self.config.aggregation in ("mean", "exact", "freeze_a", "svd")

    def _combine(self, collected: Collected, current: Tensors) -> Tensors:
        """Aggregate the tensors of the replies by `[aggregate] rule`."""
        rule, settings = self.config.aggregation, self.config.aggregate
        if rule == "median":
            return median(collected.replies)
        if rule == "trimmed_mean":
            return trimmed_mean(collected.replies, settings.trim)
        if rule == "krum":
            return krum(collected.replies, current, settings.byzantine)
        means = collected.mean.result()
        if rule == "svd":
            return {**means, **collected.residual.factored()}
        if rule != "exact":
            return means
        lora = self.config.lora
        lost = collected.residual.corrections(means, LoRA(lora.rank, lora.alpha, lora.dropout, lora.rslora).scale)
        return {**means, **{name: (current.get(name, 0) + more).float() for name, more in lost.items()}}

    def _next_round(self, state: ServerState) -> ServerState:
        state = replace(state, round=state.round + 1, applied_depth=max(state.applied_depth, state.sal.depth))
        if state.round <= getattr(self.config, state.stage).rounds:
            return state
        final_depth = {**state.final_depth, state.stage: state.sal.depth}
        if state.stage == "stage1" and self.config.stage2.rounds:
            # What stage 1 activated stays applied in any case.
            sal = self.schedule.start() if self.method.restarts_depth else state.sal
            return replace(state, stage="stage2", round=1, sal=sal, final_depth=final_depth)
        return replace(state, stage="done", final_depth=final_depth)

    def sample(self, stage: str, round: int, busy: Collection[int] = ()) -> tuple[int, ...]:
        """Return the ids of the clients of a round, ascending.

        Args:
            busy: Clients still at work for an earlier round. They keep their seats, and the others are drawn for the rest.
        """
        drawn = torch.randperm(len(self.members), generator=generator(self.config.run.seed, "sample-clients", stage, round))
        free = [member for i in drawn.tolist() if (member := self.members[i]) not in busy]
        return tuple(sorted(free[:max(0, self.config.clients.sampled_of(len(self.members)) - len(busy))]))


def carried(reply: Reply, message: Message, now: Message) -> Reply:
    """Return a reply to an older message as if it were a reply to the current one.

    A weighted mean of such replies moves the current tensors by the weighted mean of the changes: x' = now + (x - sent) / sqrt(1 +
    s), where s is the number of rounds since the older message. The weight is that of Nguyen et al., "Federated Learning with
    Buffered Asynchronous Aggregation", 2022. The mean is weighted by samples, as in other rounds, which is our choice; the paper
    divides by the size of the buffer.

    A reply to the current message is returned unchanged, bit for bit.
    """
    gone_by = now.round - message.round
    if not gone_by:
        return reply
    weight = 1 / math.sqrt(1 + gone_by)
    return replace(reply, tensors={
        name: (now.tensors[name].float() + weight * (tensor.float() - message.tensors[name].float())).to(tensor.dtype)
        for name, tensor in reply.tensors.items()})

