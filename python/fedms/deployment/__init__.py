"""A federation of strangers: a server that sees nobody's data or keys, and clients that know and decide what they run.

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
    """A server's or a client's folder, an invitation or a line of a client is not what it should be."""

    title = "deployment"


def check_versions(theirs: str, their_format: int, whose: str) -> None:
    """Raises DeploymentError unless the other side's release and message format are this one's.

    Args:
        whose: of the other side, such as "the server".
    """
    if their_format != FORMAT or release_of(theirs) != release_of(release()):
        raise DeploymentError(f"{whose} runs fedms {theirs} with messages of format {their_format}, this machine runs fedms "
                              f"{release()} with format {FORMAT}; install the same release on both")


def check_name(name: str) -> str:
    """A client's name. Raises DeploymentError if it cannot be one."""
    if re.fullmatch(NAME, name, re.ASCII) is None:
        raise DeploymentError(f"--name {name!r}: expected up to 64 letters, digits and . _ -, the first a letter or a digit")
    return name
