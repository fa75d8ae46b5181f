"""The Triton kernels without a GPU. Each part runs in a process of its own: the interpreter replaces the compiler for
all kernels that a process defines, and the compiler is asked to compile for a GPU that is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(file: str) -> str:
    # An environment made for a GPU must not steer these: they force their backends themselves.
    environment = {name: value for name, value in os.environ.items() if name not in ("FEDMS_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_token_loss.py"])
def test_numerics_under_the_interpreter(record_property, file):
    said = run(file)
    record_property("shown", f"Triton's interpreter: {said.strip().splitlines()[-1]}")


def test_machine_code(record_property):
    said = run("compiled.py")
    print(said)
    record_property("shown", "\n".join(line for line in said.splitlines() if re.match(r"sm_\d+: ", line)))
