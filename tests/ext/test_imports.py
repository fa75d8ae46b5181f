"""What `import fedms_ext` brings with it: the packages that torch and it need, and no others; and what its stub says."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import fedms_ext
from fedms_ext import _C


def test_nothing_heavy_comes_with_the_import():
    code = "import sys, torch; before = set(sys.modules); import fedms_ext; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # torch has imported numpy and the standard library's larger parts; triton comes with the first tensor on a GPU.
    assert {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) == {"fedms_ext"}


def test_the_stub_of_the_compiled_module_has_its_functions_and_their_arguments():
    stub = ast.parse((Path(fedms_ext.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))
    described = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    found = {
        name: re.findall(r"(\w+):", function.__doc__.splitlines()[0])
        for name, function in vars(_C).items() if callable(function) and not name.startswith("__")
    }
    assert described == found
