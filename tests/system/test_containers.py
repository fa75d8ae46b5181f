"""The Dockerfiles, as far as they can be looked at without an engine: what they copy, install and start is there."""
from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from fedms.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(name, rest) of each, comments and line breaks taken out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines())]


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_dockerfile_installs_an_extra_and_starts_a_command_that_there_is(side):
    found = instructions(ROOT / f"docker/{side}.Dockerfile")
    (start,) = (json.loads(rest) for name, rest in found if name == "ENTRYPOINT")
    assert start == ["fedms", side] and side in {group.name for group in app.registered_groups}
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    extras = re.findall(r"\[([a-z,]+)\]", " ".join(installs))
    assert len(extras) == 1 and set(extras[0].split(",")) <= set(PROJECT["optional-dependencies"])
    for name, rest in found:
        assert name in {"FROM", "RUN", "COPY", "ARG", "USER", "WORKDIR", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
        if name == "RUN":
            shlex.split(rest)       # quotes are closed
    assert [rest for name, rest in found if name == "USER"] == ["1000"]      # not root


def test_a_build_is_given_all_that_a_wheel_is_made_of():
    """`.dockerignore` lets in what setup reads, and each of its names is there."""
    given = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in given)
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "csrc", "fedms_ext", "python", PROJECT["readme"], "LICENSE"} <= given
