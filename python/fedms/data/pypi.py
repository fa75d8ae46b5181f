"""Archives of Python packages, fetched without installing anything."""
from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from .programs import FetchError, run


def fetch(package: str, archive: str, sha256: str, folder: Path, *, source: bool = False) -> Path:
    """Download an archive of a package with pip, without its dependencies.

    pip gets the checksum, and refuses another archive before it looks inside. For a source distribution it runs the setup.py.

    Args:
        package: Name and version, such as "vaderSentiment==3.3.2".
        archive: File name of the wheel or the source distribution.
        sha256: Its checksum, in hexadecimal.
        folder: Folder into which it is downloaded.
        source: Whether the archive is a source distribution.

    Returns:
        The path of the archive.

    Raises:
        FetchError: If pip did not download the whole archive.
        OSError: If the disk is full.
    """
    folder = folder.absolute()
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{sha256}\n")
    # Only this package as source: ":all:" would also build pip's own build requirements from source.
    kind = f"--no-binary={package.partition('==')[0]}" if source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps", kind,
               "--dest", str(folder), "-r", str(requirement)]
    failed = FetchError(f"`pip download {package}` left another file than {archive}")
    try:
        run(command, folder, f"pip download {package}")
    except FetchError as error:
        failed = error
    # pip copies the archive to its place last, and leaves a part of it there if the disk is full.
    if not (folder / archive).exists() or hashlib.sha256((folder / archive).read_bytes()).hexdigest() != sha256:
        raise failed
    return folder / archive
