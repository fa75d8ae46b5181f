"""A run with privacy: the server learns what its clients add up to, in the form of :mod:`fedms.privacy.sums`, and nothing else.

Both sides compute from the run file what a round's sum holds; so a server cannot ask for more, or for less noise.
"""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedms.config import RunConfig
from fedms.errors import AllClientsFailed, ConfigError
from fedms.federated.client import Message, Share
from fedms.federated.devices import device_of
from fedms.federated.method import BroadcastPolicy, Method
from fedms.federated.server import STAGES, RejectedReply, Server, ServerState
from fedms.privacy.accounting import combined, epsilon_of, multiplier_for
from fedms.privacy.clipping import Layout, within_bound
from fedms.privacy.key_file import KeyFileError, Stream, derive, read_key
from fedms.privacy.ledger import Ledger, Price, Release
from fedms.privacy.noise import LARGEST_SIGMA, draw
from fedms.privacy.secure_sum import Terms, threshold_of
from fedms.privacy.statement import statement
from fedms.privacy.sums import Means, Section, Sums
from fedms.tensors import Tensors


@dataclass(frozen=True)
class Noise:
    """The noise multipliers of a run's sums; None: the sum has no noise."""

    update: float | None
    score: float | None
    counts: float | None


class PrivateCollected:
    """What has arrived in a round so far.

    Args:
        sums: What the round adds up.
    """

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self.total = np.zeros(sums.size, np.int64)
        self.digests: list[str] = []            # of the vectors added, where the server sees them
        self.keys: dict[int, bytes] = {}        # public keys of the clients that will add theirs
        self.answered = 0
        self.means: Means | None = None
        self.epsilon: float | None = None       # spent, this round included

    def add(self, share: Share) -> None:
        """Add a client's share.

        Raises:
            RejectedReply: If it is not one that the round asked for.
        """
        if share.key is not None:
            self.keys[share.client] = share.key
        else:
            self._check(share.steps)
            self.total += share.steps
            self.digests.append(hashlib.sha256(np.ascontiguousarray(share.steps, "<i4").tobytes()).hexdigest())
        self.answered += 1

    def _check(self, steps: np.ndarray | None) -> None:
        if steps is None or steps.shape != (self.sums.size,):
            raise RejectedReply(f"its vector has {'no' if steps is None else len(steps)} values, expected {self.sums.size}")
        for part, values in self.sums.split(steps).items():
            if not within_bound(values, self.sums.bits):
                raise RejectedReply(f"the part {part} of its vector is longer than privacy.clip allows")

    # To and from plain data and tensors, for checkpoints

    def plain(self) -> dict[str, Any]:
        return {"digests": self.digests, "answered": self.answered}

    def tensors(self) -> Tensors:
        return {"total": torch.from_numpy(self.total)}

    def restore(self, plain: Mapping[str, Any], tensors: Tensors) -> PrivateCollected:
        self.digests, self.answered, self.total = list(plain["digests"]), plain["answered"], tensors["total"].numpy()
        return self


class PrivateServer(Server):
    """The server of a run with `[privacy] mode`.

    Args:
        config, order, block_of, method, statistics: See `Server`.
        names: Returns the names of all tensors that the server starts with.
    """

    def __init__(self, config: RunConfig, order: list[int], block_of: Mapping[str, int],
                 method: Method, sums: Mapping[str, torch.Tensor],
                 names: Callable[[], Collection[str]]) -> None:
        super().__init__(config, order, block_of, method, sums)
        self._names = names
        self.settings = config.privacy

    # What follows from the run file

    @property
    def first(self) -> str:
        """The first stage that has rounds."""
        return next(stage for stage in STAGES if getattr(self.config, stage).rounds)

    @cached_property
    def key(self) -> bytes:
        """The secret key. It is only read to draw noise or to sample clients.

        Raises:
            ConfigError: If there is no key, or other users can read it.
        """
        try:
            return read_key(Path(self.settings.key))
        except KeyFileError as error:
            raise ConfigError(str(error)) from None

    def check(self) -> None:
        """Check that the run can begin, before anything is written.

        Raises:
            ConfigError: If the key that this process needs is missing, or no noise keeps the run within its budget.
        """
        plays_clients = self.config.run.engine != "flower"
        if self.settings.mode == "central" or plays_clients:
            self.key        # noqa: B018
        self.noise          # noqa: B018

    @property
    def rate(self) -> float | None:
        """The probability of a client to be in a round, where that is secret."""
        return self.config.clients.fraction if self.settings.sampling == "poisson" else None

    @property
    def expected(self) -> float:
        """Clients of a round, on average."""
        clients = self.config.clients
        return clients.sampled if self.rate is None else self.rate * clients.count

    def planned(self) -> tuple[list[tuple[float | None, ...]], list[float]]:
        """Return what the run will release: for each round with updates, the noise multipliers of what is released with them; and
        the noise multipliers of rounds without updates.
        """
        names = self._names()
        with_update: list[tuple[float | None, ...]] = []
        beside: list[float] = []
        for stage in STAGES:
            updates = any(self.broadcast_policy(stage, name) is BroadcastPolicy.EVERY_ROUND for name in names)
            for round in range(1, getattr(self.config, stage).rounds + 1):
                others = (self._score_noise if self._asks_for_scores else None,
                          self._count_noise if (stage, round) == (self.first, 1) and self.statistics else None)
                if updates:
                    with_update.append(others)
                elif any(others):
                    beside.append(combined(*others))
        return with_update, [*beside, *([self._score_noise] if self._score_noise else [])]

    @cached_property
    def noise(self) -> Noise:
        """The noise multipliers of the run.

        Raises:
            ConfigError: If no noise keeps the run within `privacy.epsilon`.
        """
        settings = self.settings
        if not settings.adds_noise:
            return Noise(None, None, None)
        update = settings.noise
        with_update, beside = self.planned()
        if update is None and with_update:
            try:
                update = multiplier_for(settings.epsilon, with_update, settings.delta, settings.accountant, self.rate, beside)
            except ValueError as error:
                raise ConfigError(f"privacy.epsilon: {error}; raise it, or privacy.score_noise and privacy.count_noise, or "
                                  "plan fewer rounds") from None
        noise = Noise(update, self._score_noise, self._count_noise)
        largest = max((z for z in (noise.update, noise.score, noise.counts) if z is not None), default=0.0)
        limit = LARGEST_SIGMA if not settings.masks else min(LARGEST_SIGMA, 2**30 / 12)     # 12 standard deviations fit
        if largest * 2**settings.bits * (self.expected**0.5 if settings.masks else 1) > limit:
            raise ConfigError(f"privacy.bits: with {settings.bits} bits a noise multiplier of {largest:g} does not fit into the sum; "
                              "lower it, or the noise")
        return noise

    @property
    def _asks_for_scores(self) -> bool:
        return self.config.sal.schedule == "capability_queue"

    @property
    def _score_noise(self) -> float | None:
        return None if self.settings.score_noise == "off" else self.settings.score_noise

    @property
    def _count_noise(self) -> float | None:
        return None if self.settings.count_noise == "off" else self.settings.count_noise

    def sums_of(self, message: Message) -> Sums:
        """Return what the clients that get this message add up."""
        noise, trained = self.noise, set(self.order[:message.depth])
        shapes = () if message.stage == "done" else tuple(
            (name, tuple(tensor.shape)) for name, tensor in sorted(message.tensors.items())
            if self.block_of.get(name, None) in {None, *trained} and self.trainers(name))
        layout, parts = Layout(shapes), []
        if layout.size:
            parts.append(Section("update", layout.size, self.settings.clip, noise.update))
        if message.stage != "done" and self._asks_for_scores:
            parts.append(Section("score", 1, 1.0, noise.score))
        if (message.stage, message.round) == (self.first, 1) and self.statistics:
            # Once: later rounds would add noise and, with the clients of the first round, say nothing new.
            parts.append(Section("counts", sum(zeros.numel() for zeros in self.statistics.values()), 1.0, noise.counts))
        if message.stage == "done" and (noise.score is not None or not self.settings.adds_noise):
            parts.append(Section("accuracy", 1, 1.0, noise.score))
        return Sums(tuple(parts), layout, self.settings.bits)

    def trainers(self, name: str) -> float:
        """Return the number of a round's clients that are expected to train a tensor, by their budgets."""
        if name not in self.block_of:
            return self.expected
        place = self.order.index(self.block_of[name]) + 1
        able = sum(count for depth, count in self._depths.items() if depth is None or depth >= place)
        return self.expected * able / self.config.clients.count

    @cached_property
    def _depths(self) -> Counter[int | None]:
        """How many clients train at most so many blocks."""
        count = self.config.clients.count
        if not self.config.clients.budgets:
            return Counter({None: count})
        return Counter(device_of(self.config, client).max_depth for client in range(count))

    def terms(self, message: Message, attempt: int) -> Terms:
        """Return what the clients that get this message agree on before a secure sum."""
        least = threshold_of(self.config.clients.count if message.stage == "done" else self.config.clients.sampled)
        sections = self.sums_of(message).sections(least)
        return Terms(f"seed {self.config.run.seed}", message.stage, message.round, attempt, least, sections)

    def price(self, message: Message) -> Price | None:
        """Return what the sum of the clients that get this message costs each of them, or None if it has no noise."""
        if not self.settings.adds_noise:
            return None
        return Price(*self.sums_of(message).noise, self.settings.delta, self.settings.accountant, self.agreed_epsilon)

    @cached_property
    def agreed_epsilon(self) -> float:
        """The budget that a client agrees to: `privacy.epsilon`, or what the planned releases with `privacy.noise` cost."""
        if self.settings.epsilon is not None:
            return self.settings.epsilon
        with_update, beside = self.planned()
        planned = [*beside, *(combined(self.noise.update, *others) for others in with_update)]
        rounding = 1 + 1e-9         # the ledger adds up the same costs in another order
        return rounding * epsilon_of(planned, self.settings.delta, self.settings.accountant, self.rate)

    def sample(self, stage: str, round: int, busy: Collection[int] = ()) -> tuple[int, ...]:
        if self.rate is None:
            return super().sample(stage, round, busy)
        drawn = Stream(derive(self.key, "sample", stage, round)).words(self.config.clients.count) < np.uint64(
            min(int(self.rate * 2**64), 2**64 - 1))
        return tuple(np.flatnonzero(drawn).tolist())

    # A round

    def collect(self, state: ServerState | None = None) -> PrivateCollected:      # type: ignore[override]
        return PrivateCollected(self.sums_of(self.message(state)))

    def restore(self, state: ServerState, plain: Mapping[str, Any], tensors: Tensors) -> PrivateCollected:  # type: ignore[override]
        return self.collect(state).restore(plain, tensors)

    def ledger(self, folder: Path) -> Ledger | None:
        """The ledger of the run, or None for a run without noise."""
        if not self.settings.adds_noise:
            return None
        return Ledger(folder / "privacy.jsonl", self.settings.delta, self.settings.accountant, self.rate, self.settings.epsilon)

    def release(self, state: ServerState, collected: PrivateCollected, ledger: Ledger | None, tag: str | None = None,
                attempt: int = 0) -> None:
        """Decode a round's sum after its noise was added and it was written to the ledger.

        Args:
            tag: The tag of a secure sum, which has its noise already. None if the noise is added here.

        Raises:
            BudgetSpent: If the release would cost more than the budget.
        """
        sums, total = collected.sums, collected.total
        if ledger is not None and tag is None:
            # Fresh noise for any other set of vectors: two sums with the same noise would show their difference.
            seen = hashlib.sha256("".join(sorted(collected.digests)).encode()).hexdigest()
            names = (state.stage, state.round, seen, repr(sums.sections()))
            total = total + draw(derive(self.key, "noise", *names), sums.sections())
            tag = derive(self.key, "release", *names).hex()
        if ledger is not None and sums.parts:
            collected.epsilon = ledger.charge(Release(tag, state.stage, state.round, attempt, *sums.noise))
        clients = self.config.clients.count if state.stage == "done" else self.expected
        collected.means = sums.decode(total, {name: self.trainers(name) for name, _ in sums.layout.shapes}, clients)

    def step(self, state: ServerState, collected: PrivateCollected) -> tuple[ServerState, dict[str, Any]]:  # type: ignore[override]
        """Finish a round: apply what its sum says.

        Raises:
            AllClientsFailed: If fewer clients answered than `[clients] quorum` asks for. Who answers does not depend on data: a
                client whose training fails adds zeros.
        """
        means, asked = collected.means, len(self.sample(state.stage, state.round))
        if collected.answered < max(self.config.clients.quorum * asked, min(asked, 1)):
            raise AllClientsFailed(f"{state.stage}, round {state.round}: {collected.answered} of {asked} clients answered, fewer "
                                   f"than clients.quorum = {self.config.clients.quorum:g} asks for; see visits.jsonl")
        tensors = {name: (state.tensors[name].double() + torch.from_numpy(change)).float()
                   for name, change in means.changes.items()}
        last = state.round == getattr(self.config, state.stage).rounds
        after = replace(state, tensors={**state.tensors, **tensors}, statistics={**state.statistics, **self._counts(means)},
                        sal=state.sal if last else self.schedule.advance(state.sal, means.score))
        record = {"stage": state.stage, "round": state.round, "depth": state.sal.depth, "validation_accuracy": means.score,
                  "clients": collected.answered if self.rate is None else None, "event": self._event(state, after),
                  "epsilon": collected.epsilon}
        return self._next_round(after), record

    def _counts(self, means: Means) -> Tensors:
        """Return class counts as if each expected client had one sample of every class on average; a client's own counts are its
        share.
        """
        if means.classes is None:
            return {}
        (name,), classes = self.statistics, torch.from_numpy(means.classes)
        return {name: classes * self.expected * len(classes)}

    def summary(self, ledger: Ledger | None) -> dict[str, Any]:
        """Return what the summary of a run says about its privacy."""
        settings = self.settings
        told: dict[str, Any] = {"mode": settings.mode, "unit": "client", "clients": self.config.clients.count, "clip": settings.clip,
                                "bits": settings.bits, "threshold": threshold_of(self.config.clients.sampled) if settings.masks else None}
        if ledger is not None:
            told |= {"epsilon": ledger.epsilon, "delta": settings.delta, "accountant": settings.accountant,
                     "sampling": settings.sampling, "sampling_rate": self.rate, "noise": self.noise.update,
                     "score_noise": self.noise.score, "count_noise": self.noise.counts, "releases": len(ledger.releases)}
        return {**told, "statement": statement(told)}
