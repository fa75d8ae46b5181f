"""Programs of the system, such as pip and apt-get, that fetch files."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fedms.errors import DataError

SECONDS = 600       # that a program may take


class FetchError(DataError):
    """A program could not fetch what it was asked for. The message ends with the last lines of its output."""


def run(command: Sequence[str], folder: Path, title: str) -> None:
    """Run a program in a folder.

    Args:
        command: The program and its arguments.
        folder: Its working folder, and the one of its temporary files.
        title: The command in a few words, for errors.

    Raises:
        FetchError: If the program is missing, fails, or takes more than `SECONDS`.
        OSError: With the number ENOSPC, if it says that the disk is full.
    """
    place = {"LC_ALL": "C.UTF-8", "TMPDIR": str(folder.absolute())}
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **place})
    except subprocess.TimeoutExpired:
        raise FetchError(f"{title} gave no answer within {SECONDS} seconds") from None
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not installed") from None
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        if os.strerror(errno.ENOSPC) in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise FetchError(f"`{title}` failed:\n  " + "\n  ".join(output.splitlines()[-5:]))
