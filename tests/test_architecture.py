"""The rooms of the two packages: a module imports only from its own room and from those below it.

The imports are read from the source, those inside of functions and for type checkers too, so nothing is loaded.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom. A room is a folder of the package, or a module beside them.
ROOMS = {
    "fedms": ("__init__", "__main__", "cli", "doctor", "deployment", "exports", "report", "runs", "engines", "methods", "federated",
              "privacy", "training", "models", "data", "tasks", "storage", "config", "foreign", "tensors", "seeds", "progress", "processes",
              "errors"),
    "fedms_ext": ("__init__", "accelerate", "profiling", "budget", "sparse", "token_loss", "graphs", "nn", "operators", "backends",
                  "quantization", "reference", "interface", "freed_memory", "_C"),
}
WHERE = {"fedms": "python/fedms", "fedms_ext": "fedms_ext"}

# Imports that point upwards, as (module, room), and why they are still there.
EXCEPTIONS = {
    ("fedms_ext.quantization.quantize", "nn"): "exchanges the layers of a model, which nn defines",
    ("fedms_ext.quantization.quantize", "sparse"): "finds the layers of a model as sparse does",
}

MOST_COLUMNS, MOST_LINES, MOST_OF_A_FUNCTION = 140, 400, 60
LONG_FUNCTIONS = {
    ("python/fedms/cli/init.py", "init"): "its parameters are the options of the command",
    ("fedms_ext/backends/triton/gemm.py", "gemm_pointer"): "a kernel of Triton is one function",
}

# What a room must not import although it is installed.
FORBIDDEN = {
    ("fedms", "config"): ("torch", "numpy", "transformers", "flwr"),
    ("fedms", "errors"): ("torch", "numpy", "transformers", "flwr"),
    ("fedms", "exports"): ("flwr", "ray"),
    ("fedms", "methods"): ("flwr", "ray"),
    ("fedms", "report"): ("flwr", "ray"),
    **{("fedms_ext", room): ("fedms", "flwr", "ray") for room in ROOMS["fedms_ext"]},
}


def module_of(package: str, file: Path, folder: Path) -> str:
    parts = [package, *file.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, module: str) -> Iterator[str]:
    """Full names of what a file imports, attributes of modules included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[:len(parents) - node.level + (file.name == "__init__.py")]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


def violations(root: Path, package: str) -> list[str]:
    """The imports of a package that point upwards or are forbidden; (module, room) of the exceptions are left out."""
    folder, rooms = root / WHERE[package], ROOMS[package]
    found = []
    for file in sorted(folder.rglob("*.py")):
        module = module_of(package, file, folder)
        room = module.split(".")[1] if "." in module else "__init__"
        if room not in rooms:
            found.append(f"{module}: the room {room!r} is not in the list ROOMS")
            continue
        for name in imports(file, module):
            first, *rest = name.split(".")
            if first in FORBIDDEN.get((package, room), ()):
                found.append(f"{module} imports {name}: {room} must not know {first}")
            if first != package or not rest:
                continue
            below = rest[0]
            if below not in rooms:
                below = "__init__"      # a public name of the package
            if rooms.index(below) < rooms.index(room) and (module, below) not in EXCEPTIONS:
                found.append(f"{module} imports {name}: {below} lies above {room}")
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_imports_go_down(package):
    assert violations(ROOT, package) == []


def test_engines_know_no_method_and_methods_no_engine():
    folder = ROOT / WHERE["fedms"]
    found = []
    for room, other in (("engines", "methods"), ("methods", "engines")):
        for file in sorted((folder / room).rglob("*.py")):
            module = module_of("fedms", file, folder)
            found += [f"{module} imports {name}" for name in imports(file, module)
                      if name.startswith(f"fedms.{other}") and (module, other) not in EXCEPTIONS]
    assert found == []


def test_exceptions_are_needed():
    """An exception whose import is gone must leave the list."""
    for module, room in EXCEPTIONS:
        package = module.split(".")[0]
        path = ROOT / WHERE[package] / Path(*module.split(".")[1:])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        assert any(name.startswith(f"{package}.{room}.") for name in imports(file, module)), f"{module}: {room}"


def test_the_kernels_know_neither_torch_nor_federated_learning():
    for file in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r'#include [<"](torch|ATen|c10)/', text), f"{file}: includes a header of torch"
        if file.parent.name != "python":
            assert "pybind11" not in text, f"{file}: only csrc/python knows pybind11"
    for file in sorted((ROOT / "fedms_ext").rglob("*.py")):
        assert not re.search(r"federated|\bclients?\b", file.read_text(encoding="utf-8"), re.I), f"{file}: says federated"


def too_large(path: Path, text: str) -> list[str]:
    """The lines, the file and the functions of a Python file or a page that are longer than CONTRIBUTING.md has them.

    Docstrings of functions are not counted, and tests may be long files.
    """
    lines = text.splitlines()
    found = [f"{path}:{number}: {len(line)} columns" for number, line in enumerate(lines, 1) if len(line) > MOST_COLUMNS]
    if path.suffix != ".py" or path.parts[0] == "tests":
        return found
    if len(lines) > MOST_LINES:
        found.append(f"{path}: {len(lines)} lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            doc = node.body[0] if ast.get_docstring(node) else None
            count = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc and doc.end_lineno else 0)
            if count > MOST_OF_A_FUNCTION and (str(path), node.name) not in LONG_FUNCTIONS:
                found.append(f"{path}:{node.lineno}: {node.name} has {count} lines")
    return found


def test_lines_files_and_functions_keep_to_their_size():
    files = [ROOT / "setup.py", *(file for folder in ("python", "fedms_ext", "bench", "tests", "docs", "examples")
                                  for kind in ("*.py", "*.html") for file in (ROOT / folder).rglob(kind))]
    assert [line for file in sorted(files) for line in too_large(file.relative_to(ROOT), file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("path, text, said", [
    ("python/fedms/a.py", "x = '" + "x" * 140 + "'\n", "a.py:1: 146 columns"),
    ("python/fedms/page.html", "x" * 141, "page.html:1: 141 columns"), ("tests/a.py", "x" * 141, "a.py:1: 141 columns"),
    ("bench/a.py", "x = 1\n" * 401, "a.py: 401 lines"),
    ("fedms_ext/a.py", "def f():\n    'What it is.'\n" + "    x = 1\n" * 60, "a.py:1: f has 61 lines")])
def test_what_is_too_large_is_found(path, text, said):
    [found] = too_large(Path(path), text)
    assert found.endswith(said)


@pytest.mark.parametrize("file, line, said", [
    ("python/fedms/data/cache.py", "from fedms.training import expert_model", "training lies above data"),
    ("python/fedms/config/__init__.py", "def late():\n    import torch", "config must not know torch"),
    ("python/fedms/methods/fedavg.py", "from fedms.engines.local import LocalEngine", "engines lies above methods"),
    ("python/fedms/exports/__init__.py", "import flwr.client", "exports must not know flwr"),
    ("fedms_ext/nn/frozen_linear.py", "from ..sparse import surgery", "sparse lies above nn"),
    ("fedms_ext/reference.py", "from fedms.seeds import generator", "reference must not know fedms"),
    ("fedms_ext/kitchen.py", "", "the room 'kitchen' is not in the list"),
])
def test_a_forbidden_import_is_found(tmp_path, file, line, said):
    copy = tmp_path / file
    copy.parent.mkdir(parents=True)
    source = ROOT / file
    copy.write_text((source.read_text(encoding="utf-8") if source.is_file() else "") + f"\n{line}\n", encoding="utf-8")
    found = violations(tmp_path, file.split("/")[0] if file.startswith("fedms_ext") else "fedms")
    assert len(found) == 1 and said in found[0]
