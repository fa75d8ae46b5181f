"""What made a run: the version and commit of this package, the machine, and the command."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import fedms


def provenance() -> dict[str, str | None]:
    """Return what works on a run from now on, with the fields of :data:`fedms.storage.records.PROVENANCE_FIELDS`."""
    program = Path(sys.argv[0])
    name = "fedms" if program.name == "__main__.py" and program.parent.name == "fedms" else program.name
    return {"began": datetime.now(timezone.utc).isoformat(timespec="seconds"), "version": _version("fedms"), "commit": _commit(),
            "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}", "python": platform.python_version(),
            "torch": _version("torch"), "command": shlex.join([name, *sys.argv[1:]])}


def processor() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the clone that this package lies in, with "-dirty" where files were changed; None outside of one."""
    root = Path(fedms.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True,
                              text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
