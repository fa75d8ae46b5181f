"""requirements.lock: what `make` and continuous integration install, each file by its hash."""
from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement

if __import__("sys").version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def locked() -> dict[str, str]:
    """The text of each locked requirement, with its hashes, by the package's name."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text(encoding="utf-8").strip())
    found: dict[str, str] = {}
    for entry in entries:
        name = Requirement(entry.partition(" \\\n")[0]).name
        found[name] = found.get(name, "") + entry
    return found


def test_each_package_has_one_version_and_hashes():
    for name, entry in locked().items():
        assert re.match(r"[\w.-]+==[\w.+!-]+", entry) and "--hash=sha256:" in entry, name


def test_all_that_the_extras_name_is_locked_and_no_build_of_pytorch_is():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, names = tables["project"]["optional-dependencies"], set()
    todo, seen = ["train", "flower", "test"], set()
    while todo:
        if (extra := todo.pop()) in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, extras[extra]):
            if requirement.name == "fedms":
                todo += requirement.extras
            else:
                names.add(re.sub("[-_.]+", "-", requirement.name).lower())
    found = locked()
    assert names - set(found) == set()
    assert not [name for name in found if name.startswith(("torch", "triton", "nvidia", "cuda"))]


def test_it_is_what_make_installs():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--no-deps --require-hashes --requirement requirements.lock" in recipe
