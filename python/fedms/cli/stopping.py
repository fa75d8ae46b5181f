"""How commands end: Ctrl-C once and twice, and an error as one readable block with its exit code."""
from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer

from fedms.errors import FAILED, INTERRUPTED, FedMSError, Interrupted
from fedms.foreign import LONGEST_NOTE, printable

from .terminal import errors, say

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that stop a run politely: Ctrl-C, kill, and a terminal that is closed."""


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Turn an error inside the block into a readable message and the exit code of its class."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Interrupted as error:
        say(f"{error.headline}: {error}")
        raise typer.Exit(error.exit_code) from None
    except FedMSError as error:
        _fail(error.headline, error, error.exit_code)
    except ModuleNotFoundError as error:
        _fail("a package is missing: pip install 'fedms[train]'", error, FAILED)
    except Exception as error:      # no error of ours, so a fault of the program or of one that it uses
        _fail(f"the run failed: {type(error).__name__}", error, FAILED)


def _fail(headline: str, error: Exception, code: int) -> None:
    if os.environ.get("FEDMS_DEBUG") == "1":
        traceback.print_exc()
    errors.print(headline, style="bold red", markup=False)
    for line in str(error).split("\n"):
        say(f"  {printable(line, LONGEST_NOTE)}")
    if code == FAILED and not isinstance(error, ModuleNotFoundError):
        errors.print("FEDMS_DEBUG=1 shows where it happened.")
    raise typer.Exit(code) from None


class Stop:
    """Asks a run to stop between two clients. Asked a second time, it stops the run at once; a third time, it ends the process."""

    def __init__(self) -> None:
        self.requested = self._interrupted = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __call__(self) -> bool:
        return self.requested

    def on_signal(self, number: int, frame: object) -> None:
        """Handle one of the signals of :data:`STOPPING`."""
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self._interrupted:       # on its way out already: what is on disk is whole at any time
            os._exit(INTERRUPTED)
        if self.requested:
            self._interrupted = True
            raise KeyboardInterrupt
        self.requested = True
        errors.print("\nstopping after this client; once more stops at once", markup=False)

    def end(self) -> None:
        """Let the next signal end the process: the block of :func:`polite_stop` is over."""
        self._interrupted = True

    def _leave_terminal(self) -> None:
        """Redirect output to nowhere: writing to a closed terminal would fail and end the run before its checkpoint."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def polite_stop() -> Iterator[Stop]:
    """Install a :class:`Stop` as handler of the stopping signals for the time of the block.

    Once it was asked to stop it remains in place: the process is about to end, and one more signal ends it without a traceback.
    """
    stop = Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in STOPPING
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}     # nohup ignores it
    try:
        yield stop
    finally:
        stop.end()
        for number, handler in before.items():
            if not stop.requested:
                signal.signal(number, handler)


@contextlib.contextmanager
def resume_hint(out: Path) -> Iterator[None]:
    """Say how to go on when the block is stopped or fails with an error that a run can be resumed after.

    Args:
        out: Folder of the run or the runs. Nothing is said if it does not exist.
    """
    try:
        yield
    except BaseException as error:
        resumable = isinstance(error, KeyboardInterrupt) or (isinstance(error, FedMSError) and error.resumable)
        if resumable and out.is_dir():
            words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
            words += ["--resume"] if words[:1] in (["run"], ["import-peft"]) else []      # others go on by themselves
            say(f"\nfedms report {out} shows what was recorded so far; go on with\n  {shlex.join(['fedms', *words])}")
        raise
