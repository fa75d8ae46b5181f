"""Archives of Python packages, fetched without installing anything."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def fetch(package: str, archive: str, sha256: str, folder: Path, *, source: bool = False) -> Path:
    """Lets pip download a package's archive, without what it depends on.

    pip is told the checksum and refuses anything else before it looks inside; of a source distribution it runs the setup.py.

    Args:
        package: name and version, such as "vaderSentiment==3.3.2".
        archive: name of the wheel's or the source distribution's file.
        sha256: its checksum, hexadecimal.
        folder: where it is put.
        source: whether it is the source distribution.

    Returns:
        The archive's path in the folder.

    Raises:
        OSError: with the last lines of pip's output, if there is no archive then.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{sha256}\n")
    # Only this package as source: ":all:" would also build pip's own build requirements from source.
    kind = f"--no-binary={package.partition('==')[0]}" if source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps", kind,
               "--dest", str(folder), "-r", str(requirement)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        output = "pip gave no answer within 600 seconds"
    if not (folder / archive).exists():
        raise OSError(f"`pip download {package}` failed:\n  " + "\n  ".join(output.strip().splitlines()[-5:]))
    return folder / archive
