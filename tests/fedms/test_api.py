"""The names that other programs may use."""
from __future__ import annotations

import subprocess
import sys

import pytest

import fedms


@pytest.mark.parametrize("name", fedms.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(fedms, name).__doc__


def test_names_are_loaded_when_they_are_asked_for():
    code = ("import sys, fedms; dir(fedms); fedms.FedMSError; fedms.load_config('digits')\n"
            "print([name for name in ('torch', 'pandas', 'matplotlib') if name in sys.modules])\n"
            "fedms.export; import fedms.exports.mixture; print(callable(fedms.export), callable(fedms.run))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True True"], done.stderr


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'fedms' has no attribute 'exprot'"):
        fedms.exprot
