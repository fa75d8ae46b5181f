"""Schedules that decide when Sparsely Activated LoRA activates the next blocks.

A schedule is a pure function from a `SalState` and a round's score to the next `SalState`; the state is plain data and
goes into checkpoints. Depth d means the first d blocks of the activation order.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

from fedms.errors import ConfigError



@dataclass(frozen=True)
class SalState:
    """State of a schedule: the active depth, the number of rounds since the start, and the queue of recent scores."""

    depth: int
    rounds: int = 0
    queue: tuple[float, ...] = ()


class Schedule(Protocol):
    """Decides how many blocks are active in each round. All state is in `SalState`."""

    def start(self) -> SalState:
        """Return the state before the first round."""

    def advance(self, state: SalState, score: float | None) -> SalState:
        """Return the state after a round.

        Args:
            state: The state before the round.
            score: Weighted mean of the validation scores of the model that the clients received, higher is better; None if no
                client has validation samples.
        """

    def soonest(self, depth: int, rounds: int) -> SalState:
        """Return the state at a depth after so many rounds from which activation goes on soonest."""


@dataclass(frozen=True)
class Fixed:
    """`fixed(d)`: depth d throughout; `all` is `fixed(L)`."""

    depth: int

    def start(self) -> SalState:
        return SalState(self.depth)

    def advance(self, state: SalState, score: float | None) -> SalState:
        return replace(state, rounds=state.rounds + 1)

    def soonest(self, depth: int, rounds: int) -> SalState:
        return SalState(depth, rounds)


@dataclass(frozen=True)
class Every:
    """`every(n)`: `step` more blocks after every n rounds, up to `max_depth`."""

    n: int
    depth: int
    step: int
    max_depth: int

    def start(self) -> SalState:
        return SalState(self.depth)

    def advance(self, state: SalState, score: float | None) -> SalState:
        rounds = state.rounds + 1
        grown = min(state.depth + self.step, self.max_depth) if rounds % self.n == 0 else state.depth
        return replace(state, rounds=rounds, depth=grown)

    def soonest(self, depth: int, rounds: int) -> SalState:
        return SalState(depth, rounds)


@dataclass(frozen=True)
class CapabilityQueue:
    """`capability_queue(Q, tau, step)`: more blocks once the model has stopped improving at its present capability.

    Each round's score joins a queue of length Q. When the queue is full and the mean of its newer half exceeds the
    mean of its older half by less than tau, the next `step` blocks are activated, up to `max_depth`, and the queue is
    emptied; otherwise the oldest score falls out.
    """

    size: int
    tau: float
    depth: int
    step: int
    max_depth: int

    def start(self) -> SalState:
        return SalState(self.depth)

    def advance(self, state: SalState, score: float | None) -> SalState:
        state = replace(state, rounds=state.rounds + 1)
        if score is None or not math.isfinite(score):
            return state
        queue = (*state.queue, score)
        if len(queue) < self.size:
            return replace(state, queue=queue)
        half = self.size // 2
        gain = sum(queue[half:]) / half - sum(queue[:half]) / half
        if gain < self.tau and state.depth < self.max_depth:
            return replace(state, queue=(), depth=min(state.depth + self.step, self.max_depth))
        return replace(state, queue=queue[1:])

    def soonest(self, depth: int, rounds: int) -> SalState:
        used_up = -(-(depth - self.depth) // self.step) * self.size     # scores that earlier activations have cleared away
        return SalState(depth, rounds, (0.0,) * max(0, min(self.size - 1, rounds - used_up)))


def depths_ahead(schedule: Schedule, depth: int, rounds: int, left: int) -> tuple[int, ...]:
    """Return the depths to which a schedule can go on, ascending.

    Args:
        schedule: The schedule.
        depth: The present depth.
        rounds: Number of rounds since its start.
        left: Number of rounds after which it can still activate blocks.
    """
    state, reached = schedule.soonest(depth, rounds), {depth}
    for number in range(left):
        state = schedule.advance(state, -2.0 - number)      # lower every time, by more than scores in [0, 1] can fall
        reached.add(state.depth)
    return tuple(sorted(reached - {depth}))


def from_config(sal, blocks: int) -> Schedule:
    """Return the schedule of a run file's `[sal]` table for a model with this many blocks in its activation order.

    Raises:
        ConfigError: If a depth exceeds the number of blocks.
    """
    max_depth = blocks if sal.max_depth is None else sal.max_depth
    for key, depth in (("sal.depth", sal.depth), ("sal.max_depth", max_depth)):
        if depth > blocks:
            raise ConfigError(f"{key}: got {depth}; the model has {blocks} blocks to activate")
    if sal.schedule == "all":
        return Fixed(max_depth)
    if sal.schedule == "fixed":
        return Fixed(sal.depth)
    if sal.schedule == "every":
        return Every(sal.every, sal.depth, sal.step, max_depth)
    return CapabilityQueue(sal.queue, sal.tau, sal.depth, sal.step, max_depth)
