"""The errors that FedMS reports in words. Each class knows its exit code and the title under which it is shown.

Nothing here imports torch, so that the command line can report a mistake at once. An error that only one room raises is
defined in that room; those that several rooms raise are defined here.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

DONE, FAILED, USAGE, UNAVAILABLE, FOLDER, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES = {
    DONE: "The command did what it was asked to do.",
    FAILED: "The run failed, `doctor` found a problem, or no plan fits the limit.",
    USAGE: "An option or a key of the run file is wrong.",
    UNAVAILABLE: "The model or the data could not be loaded.",
    FOLDER: "A run folder exists already, or cannot be written or read.",
    INTERRUPTED: "The command was interrupted by Ctrl-C, SIGTERM or a closed terminal.",
}
"""What each exit code of the command line means."""

GO_ON = "go on with it by `fedms run` with --resume, or by `fedms server start` where a server carries it out"
"""What to do with a run that has not ended, for errors of commands that need one that has."""


class FedMSError(Exception):
    """An error that the command line reports in words, without a traceback.

    Attributes:
        exit_code: Exit code of a command that ends with this error, a key of :data:`EXIT_CODES`.
        title: A few words that are printed above the message.
        resumable: Whether the run can go on later from its last checkpoint.
    """

    exit_code: ClassVar[int] = FAILED
    title: ClassVar[str] = "the run failed"
    resumable: ClassVar[bool] = False

    @property
    def headline(self) -> str:
        """The title as it is printed for this very error."""
        return self.title


class ConfigError(FedMSError, ValueError):
    """An option, a key of a run file, or a combination of them cannot be used.

    Args:
        problems: One line for each problem, or a single line.

    Attributes:
        problems: The same lines, as a tuple. `str(error)` joins them with line breaks.
    """

    exit_code = USAGE
    title = "configuration"

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    @property
    def headline(self) -> str:
        count = len(self.problems)
        return f"{self.title}: 1 problem" if count == 1 else f"{self.title}: {count} problems"


class ModelError(FedMSError):
    """The foundation model cannot be loaded, does not fit the run, or cannot be exported."""

    exit_code = UNAVAILABLE
    title = "model"


class DataError(FedMSError):
    """The data set is missing, damaged, or cannot be divided among clients as the run file says."""

    exit_code = UNAVAILABLE
    title = "data"


class RunFolderError(FedMSError):
    """A run folder or an exported folder exists already, or cannot be written or read."""

    exit_code = FOLDER
    title = "run folder"
    resumable = True


class CheckpointError(FedMSError):
    """A checkpoint cannot be written or read."""

    exit_code = FOLDER
    title = "run folder"
    resumable = True


class Interrupted(FedMSError):
    """The run was asked to stop and did so between two clients. Its checkpoint holds everything that was done."""

    exit_code = INTERRUPTED
    title = "stopped"
    resumable = True


class WorkerDied(FedMSError):
    """A worker process ended without an error, as it does when the system kills it for lack of memory."""

    title = "a worker process died"
    resumable = True


class AllClientsFailed(FedMSError):
    """Too few clients could be trained in a round, or none could be evaluated at the end."""

    resumable = True


def all_errors() -> Iterator[type[FedMSError]]:
    """Yield every class of error that has been defined so far, sorted by name."""
    found, waiting = set(), [FedMSError]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += kind.__subclasses__()
    yield from sorted(found, key=lambda kind: kind.__name__)


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Turn a ValueError, within the context, into a ConfigError that names this key of the run file."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
