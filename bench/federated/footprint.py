"""What a client of a federation needs on its machine: `python -m bench.federated.footprint`, from the root of the project.

size    megabytes that extras of this package bring, without PyTorch and what only PyTorch brings, as installed in the environment
        that runs this: the files of every package that they require, directly or not.
memory  megabytes of the process of an idle client (`fedms client start`, once its modules are imported), beside a process with the
        modules of a server's rounds, PyTorch among them.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROCESSES = {"idle client": "fedms.deployment.node", "server with its rounds": "fedms.runs.run"}
LOOK = "import importlib, sys, psutil; importlib.import_module(sys.argv[1]); print(psutil.Process().memory_info().rss)"


def packages(requirement: str) -> set[str]:
    """Names of all installed packages that a requirement such as "fedms[client]" brings, itself included."""
    found: set[tuple[str, str]] = set()
    todo = [Requirement(requirement)]
    while todo:
        wanted = todo.pop()
        for extra in (*wanted.extras, ""):
            step = canonicalize_name(wanted.name), extra
            if step not in found:
                found.add(step)
                todo += _required(*step)
    return {name for name, _ in found}


def _required(name: str, extra: str) -> Iterator[Requirement]:
    if name == "fedms":         # by its own file: an environment may have been made of an older one
        project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
        lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    else:
        lines = metadata.requires(name) or []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def megabytes(names: Iterable[str]) -> float:
    """Bytes of all files of installed packages, in MB of 10^6."""
    files = (file for name in names for file in metadata.files(name) or ())
    return sum(path.stat().st_size for path in (file.locate() for file in files) if path.is_file()) / 1e6


def size(extras: Iterable[str]) -> dict[str, float]:
    """Megabytes that each combination of extras brings beside PyTorch, and each one's share of the last one."""
    without = packages("torch") | {"fedms"}
    found = {each: megabytes(packages(f"fedms[{each}]") - without) for each in extras}
    return {**found, **{f"{each} / {list(found)[-1]}": mb / found[list(found)[-1]] for each, mb in found.items()}}


def memory() -> dict[str, float]:
    """Resident megabytes of a process of each kind, in a fresh interpreter."""
    found = {}
    for what, module in PROCESSES.items():
        done = subprocess.run([sys.executable, "-c", LOOK, module], capture_output=True, text=True, check=True)
        found[what] = int(done.stdout) / 1e6
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("size", "memory"))
    parser.add_argument("extras", nargs="*", default=["client", "train,flower"], help="size: extras (client train,flower); shares are of "
                        "the last one")
    arguments = parser.parse_args()
    found = size(arguments.extras) if arguments.what == "size" else memory()
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
