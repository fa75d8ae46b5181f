"""Files of Debian packages, fetched without installing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .programs import FetchError, run


def unpack_packages(packages: Sequence[str], folder: Path) -> None:
    """Download packages with apt-get, which any user may do, and unpack them into a folder with dpkg.

    Raises:
        FetchError: If a command is missing or fails.
        OSError: If the disk is full.
    """
    run(["apt-get", "download", *packages], folder, f"apt-get download {' '.join(packages)}")
    found = sorted(folder.glob("*.deb"))
    if len(found) < len(packages):
        raise FetchError(f"apt-get download {' '.join(packages)} left {len(found)} packages, expected {len(packages)}")
    for package in found:
        run(["dpkg", "-x", str(package), str(folder)], folder, f"dpkg -x {package.name}")
