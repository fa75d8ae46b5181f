"""Errors know how they are reported, and the page about them says the same."""
from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import fedms
from fedms import errors
from fedms.errors import EXIT_CODES, FedMSError

PAGE = (Path(__file__).parents[2] / "docs/reference/errors.md").read_text(encoding="utf-8")


def modules():
    for module in pkgutil.walk_packages(fedms.__path__, "fedms."):
        if not module.name.endswith("__main__"):
            try:
                yield importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                assert not error.name.startswith("fedms"), error     # an extra is not installed


def test_every_error_of_the_project_is_one_of_a_kind():
    found = {kind for module in modules() for _, kind in inspect.getmembers(module, inspect.isclass)
             if issubclass(kind, Exception) and kind.__module__.startswith("fedms.") and not kind.__name__.startswith("_")}
    assert len(found) > 12 and [kind.__name__ for kind in found if not issubclass(kind, FedMSError)] == []
    for kind in errors.all_errors():
        assert kind.exit_code in EXIT_CODES and kind.title and isinstance(kind.resumable, bool) and kind.__doc__, kind


@pytest.mark.parametrize("code", EXIT_CODES)
def test_the_page_explains_every_exit_code(code):
    assert f"| {code} | {EXIT_CODES[code]} |" in PAGE


def test_the_page_explains_every_error_that_users_meet():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)
             if issubclass(kind, FedMSError) and kind is not FedMSError]
    rows = [f"| `{kind.__name__}` | {kind.exit_code} | {'yes' if kind.resumable else 'no'} | "
            f"{' '.join(inspect.getdoc(kind).split(chr(10) * 2)[0].split())} |" for kind in kinds]
    assert [row for row in rows if row not in PAGE] == []
    assert set(re.findall(r"(?m)^\| `(\w+)` \| \d", PAGE)) == {kind.__name__ for kind in kinds}
    assert {kind.__name__ for kind in kinds} <= set(fedms.__all__)


def test_problems_are_counted():
    assert errors.ConfigError("x").headline == "configuration: 1 problem"
    assert errors.ConfigError(["x", "y"]).headline == "configuration: 2 problems" and str(errors.ConfigError(["x", "y"])) == "x\ny"
