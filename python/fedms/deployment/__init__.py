"""A federation of independent participants: a server that sees no data or keys of clients, and clients that decide what they run.

`server` and `invitation` are the server's side; `join`, `policy`, `state` and `node` the client's. `page` shows a server's
state in a browser. The rounds themselves are the distributed engine's (`fedms.engines.flower`).
"""
from __future__ import annotations

import re

from fedms.errors import FedMSError
from fedms.federated.schema import FORMAT
from fedms.engines.flower.transport import release, release_of

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"       # of a client


class DeploymentError(FedMSError):
    """A server's or client's folder, an invitation or a client's line is missing, damaged or does not fit the federation."""

    title = "deployment"


def check_versions(theirs: str, their_format: int, whose: str) -> None:
    """Check that the other side has this machine's release and message format.

    Args:
        theirs: Release of the other side.
        their_format: Its message format.
        whose: A name for the other side in errors, such as "the server".

    Raises:
        DeploymentError: If they differ.
    """
    if their_format != FORMAT or release_of(theirs) != release_of(release()):
        raise DeploymentError(f"{whose} runs fedms {theirs} with messages of format {their_format}, this machine runs fedms "
                              f"{release()} with format {FORMAT}; install the same release on both")


def check_name(name: str) -> str:
    """Return a client's name, or raise DeploymentError if it is not valid."""
    if re.fullmatch(NAME, name, re.ASCII) is None:
        raise DeploymentError(f"--name {name!r}: expected up to 64 letters, digits and . _ -, the first a letter or a digit")
    return name
