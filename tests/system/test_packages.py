"""Wheel and source distribution, made by `make wheel` and installed in fresh environments, as a user has them. Minutes,
and the package index must be within reach: `make test-full` alone."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from pages import ROOT, check_predictions, run_page

pytestmark = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")
PAGE = ROOT / "docs/guide/models.md"


def call(*command, cwd) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """By suffix: .whl and .gz. The environment that runs the tests builds them, without being set up again."""
    folder = tmp_path_factory.mktemp("dist")
    call("make", "wheel", f"VENV={sys.prefix}", f"DIST={folder}", "-o", f"{sys.prefix}/.installed", cwd=ROOT)
    found = {path.suffix: path for path in folder.iterdir()}
    assert found.keys() == {".whl", ".gz"}
    return found


def environment(folder: Path) -> Path:
    """A fresh environment's interpreter."""
    call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin/python"


def test_the_wheel_holds_what_runs_and_nothing_else(packages):
    names = zipfile.ZipFile(packages[".whl"]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fedms", "fedms_ext"}, names
    assert {"fedms/py.typed", "fedms_ext/py.typed", "fedms/config/builtin/digits.toml", "fedms/report/report.html.j2",
            "fedms/report/report.css", "fedms/report/report.js"} <= {*names}
    assert [name for name in names if ".so" in name] == [f"fedms_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert any(name.endswith("licenses/LICENSE") for name in names) and "manylinux" in packages[".whl"].name


def test_the_source_distribution_holds_what_builds_and_tests(packages):
    names = {name.partition("/")[2] for name in tarfile.open(packages[".gz"]).getnames()}
    assert {"setup.py", "CMakeLists.txt", "csrc/python/module.cpp", "csrc/cpu/lora/forward.cpp", "csrc/cuda/gemm.cu",
            "tests/conftest.py", "docs/index.md", "examples/README.md", "LICENSE"} <= names
    assert not any(name.endswith((".so", ".pyc")) or ".venv" in name or "/trials/" in name for name in names)


def test_the_wheel_in_a_fresh_environment(packages, tmp_path):
    """All of its packages are its own. Then a new user's way, by the commands of the page alone."""
    python = environment(tmp_path / "env")
    release = torch.__version__.partition("+")[0]
    call(python, "-m", "pip", "install", f"torch=={release}", f"{packages['.whl']}[train]", cwd=tmp_path)
    first_run(python, tmp_path)
    (tmp_path / "page").mkdir()
    check_predictions(run_page(PAGE, tmp_path / "page", str(python)), tmp_path / "page")


def test_the_source_distribution_in_a_fresh_environment(packages, tmp_path):
    """It is built there; what it needs to run is taken from the environment of the tests, for the time it saves."""
    python = environment(tmp_path / "env")
    call(python, "-m", "pip", "install", "--no-deps", packages[".gz"], cwd=tmp_path)
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")      # an editable package is none of these
    first_run(python, tmp_path)


def first_run(python: Path, folder: Path) -> None:
    where, built = call(python, "-c", "import fedms_ext; print(fedms_ext.__file__, fedms_ext.build_info()['isa_used'])",
                        cwd=folder).split()
    assert Path(where).is_relative_to(folder / "env") and built
    call(python.with_name("fedms"), "run", "digits", "--out", "runs/first", cwd=folder)
    assert json.loads((folder / "runs/first/summary.json").read_text())["rounds"] == {"stage1": 4, "stage2": 2}
    assert (folder / "runs/first/report.html").is_file()
