"""What `import fedms_ext` brings with it: the packages that torch and it need, and no others; and what its stub says."""
from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fedms_ext
from fedms_ext import _C, interface


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


def test_kernels_of_other_sources_are_refused():
    stub = ast.parse((Path(fedms_ext.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(stub) if isinstance(node, ast.FunctionDef)]
    said = [f"{node.name}({', '.join(a.arg for a in node.args.args)}) {len(node.args.defaults)}" for node in functions]
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    assert digest == interface.INTERFACE, f'the signatures have changed: set INTERFACE = "{digest}" in fedms_ext/interface.py, and rebuild'
    assert _C.INTERFACE == interface.INTERFACE
    kernels = ModuleType("_C")
    kernels.__file__ = "_C.so"
    with pytest.raises(ImportError, match="interface unknown"):     # older ones say nothing
        interface.check(kernels)
    kernels.INTERFACE = "0" * 16
    with pytest.raises(ImportError, match="_C.so: the kernels were compiled from other sources .*setup.py build_ext --inplace"):
        interface.check(kernels)
