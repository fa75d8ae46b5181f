"""Files of Debian packages, fetched without installing anything."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def unpack_packages(packages: Sequence[str], folder: Path) -> None:
    """Download packages with apt-get, which any user may do, and unpack them into a folder with dpkg.

    Raises:
        OSError: If a command fails.
    """
    run(["apt-get", "download", *packages], folder)
    found = sorted(folder.glob("*.deb"))
    if len(found) < len(packages):
        raise OSError(f"apt-get download {' '.join(packages)} left {len(found)} packages, expected {len(packages)}")
    for package in found:
        run(["dpkg", "-x", str(package), str(folder)], folder)


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        OSError: If the command is missing, fails, or takes over ten minutes; the message ends with its last lines of output.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} gave no answer within 600 seconds") from None
    if done.returncode:
        last = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise OSError(f"{' '.join(command[:2])} failed: {last}")
