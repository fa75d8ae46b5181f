"""privacy.jsonl: what a run has released, and what it has cost.

A line is on disk before the model that it tells of leaves the server. The file is never shortened when a run goes back to
a checkpoint: whoever received a model keeps it. A round that is repeated with the same replies releases the same model
once more, which costs nothing; with other replies it draws fresh noise and is another release.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedms.errors import FOLDER, FedMSError
from fedms.privacy.accounting import combined, epsilon_of

NAME = "privacy.jsonl"


class LedgerError(FedMSError):
    """The ledger cannot be read or written; the message names the file and the line."""

    exit_code = FOLDER
    title = "run folder"


class BudgetSpent(FedMSError):
    """The next release would cost more than the budget; nothing of it was released."""

    title = "the privacy budget is spent"


@dataclass(frozen=True)
class Release:
    """One noised sum that leaves the server.

    Attributes:
        tag: A hash of everything that was summed, in hexadecimal. It reveals nothing about it.
        stage, round, attempt: The round that the sum belongs to.
        update, score, counts: The noise multipliers of the parts of the sum; None for a part that it does not have.
    """

    tag: str
    stage: str
    round: int
    attempt: int
    update: float | None
    score: float | None = None
    counts: float | None = None

    @property
    def multiplier(self) -> float:
        """The noise multiplier of all parts together."""
        return combined(self.update, self.score, self.counts)


@dataclass(frozen=True)
class Price:
    """What one sum costs a client that helps to reveal it, and the budget that the client has agreed to.

    Attributes:
        update, score, counts: See `Release`.
        delta, accountant: See `fedms.privacy.accounting.epsilon_of`.
        budget: The epsilon that all sums together must not exceed.
    """

    update: float | None
    score: float | None
    counts: float | None
    delta: float
    accountant: str
    budget: float


class Ledger:
    """The releases of a run.

    Args:
        path: The file, which the first release creates.
        delta, accountant, rate: See `fedms.privacy.accounting.epsilon_of`.
        budget: The epsilon that must not be exceeded, or None for no limit.

    Raises:
        LedgerError: If the file exists and cannot be read.
    """

    def __init__(self, path: Path, delta: float, accountant: str, rate: float | None, budget: float | None) -> None:
        self.path, self.delta, self.accountant, self.rate, self.budget = path, delta, accountant, rate, budget
        self.releases = read_ledger(path)
        self.epsilon = self._epsilon(self.releases)

    def charge(self, release: Release) -> float:
        """Write a release to the file, durably, and return the epsilon spent so far. The release may leave once this returns.

        Raises:
            BudgetSpent: If it would exceed the budget. Then it is not written, and must not leave.
            LedgerError: If the file cannot be written.
        """
        if any(release.tag == earlier.tag for earlier in self.releases):
            return self.epsilon
        after = [*self.releases, release]
        epsilon = self._epsilon(after)
        if self.budget is not None and epsilon > self.budget:
            raise BudgetSpent(
                f"{release.stage}, round {release.round}: releasing it would bring epsilon to {epsilon:.4g}, above privacy.epsilon "
                f"= {self.budget:g}; {len(self.releases)} releases have spent {self.epsilon:.4g}. The models released so far "
                "stay valid; to train on, start a run with a larger epsilon or fewer rounds")
        self._append({**asdict(release), "epsilon": epsilon, "delta": self.delta, "accountant": self.accountant,
                      "sampling_rate": self.rate})
        self.releases, self.epsilon = after, epsilon
        return epsilon

    def _epsilon(self, releases: list[Release]) -> float:
        return epsilon_of((release.multiplier for release in releases), self.delta, self.accountant, self.rate)

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, sort_keys=True, allow_nan=False).encode() + b"\n"
        try:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with open(descriptor, "r+b") as file:
                # A crash may have left the beginning of a line, of a release that did not leave.
                file.truncate(end := _whole(file.read()))
                file.seek(end)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if new:
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be written: {error.strerror}; nothing was released") from error


def read_ledger(path: Path) -> list[Release]:
    """Return the releases in a ledger, in their order; none if there is no file.

    A last line that a crash cut off is left out, because its release did not leave.

    Raises:
        LedgerError: If a line is not a release. The message names the file and the line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from None
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(data[:_whole(data)].splitlines(), start=1)]


def _whole(data: bytes) -> int:
    """Length of the lines that are complete."""
    return data.rfind(b"\n") + 1


def _parse(line: bytes, where: str) -> Release:
    names = [field.name for field in fields(Release)]
    try:
        values = json.loads(line)
        release = Release(**{name: values[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{where}: not a release ({error}); the epsilon spent so far is unknown, so the run cannot go on") from None
    numbers = (release.update, release.score, release.counts)
    if not (isinstance(release.tag, str) and isinstance(release.stage, str)
            and all(type(n) is int and n >= 0 for n in (release.round, release.attempt))
            and all(z is None or type(z) in (int, float) and 0 < z < float("inf") for z in numbers)):
        raise LedgerError(f"{where}: not a release: a value has the wrong type; the epsilon spent so far is unknown, so the run "
                          "cannot go on")
    return release
