"""Python projects, one client each: a function is to be completed from its signature and docstring.

The source code is that of packages that are installed beside this one, and is read, not imported. `data.path` names a folder
instead: each folder in it is a project.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from fedms.errors import DataError

from .conversations import Exchange

# What this package and PyTorch bring with them.
NAMES = ("jinja2", "networkx", "pandas", "scipy", "sklearn", "sympy")
PER_PROJECT = 120
MOST_OF_A_FILE = 8     # so that one file does not make a project
SHORTEST, LONGEST = 200, 600


def read(path: str | None, max_samples: int | None, seed: int) -> tuple[list[Exchange], list[str]]:
    """Read exchanges, and the project of each: equally many of each project, drawn with a seed.

    The prompt is a function up to the end of its docstring, and the answer is the rest of the function.

    Args:
        path: As `data.path`.
        max_samples: Number of samples of all projects together, or None for 120 of each. A small project gives fewer.
        seed: Seed of the draw.
    """
    folders = _installed() if path is None else {folder.name: folder for folder in sorted(Path(path).glob("*"))
                                                 if folder.is_dir() and not folder.name.startswith(".")}
    if not folders:
        raise DataError(f"data.path: {path} holds no folder of a Python project")
    wanted = PER_PROJECT if max_samples is None else max(1, max_samples // len(folders))
    exchanges: list[Exchange] = []
    owners: list[str] = []
    for name, folder in folders.items():
        files = sorted(path for path in folder.rglob("*.py") if "test" not in str(path.relative_to(folder)))
        random.Random(f"{seed} {name}").shuffle(files)      # and no more are parsed than are needed
        found = list(islice(_distinct(chain.from_iterable(functions(file, MOST_OF_A_FILE) for file in files)), wanted))
        if not found:
            raise DataError(f"{folder}: no Python function with a docstring of {SHORTEST} to {LONGEST} characters")
        for prompt, answer in found:
            exchanges.append(Exchange(({"role": "user", "content": prompt},), answer, f"{name}, {prompt.splitlines()[0][:60]!r}"))
            owners.append(name)
    return exchanges, owners


def _distinct(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen = set()
    for pair in pairs:
        if pair not in seen:
            seen.add(pair)
            yield pair


def _installed() -> dict[str, Path]:
    found = {}
    for name in NAMES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"data.name: projects needs the source of {', '.join(NAMES)}, and {name} is not installed; pip "
                            f"install 'fedms[train]', or set data.path to a folder of projects")
        found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found


def functions(file: Path, most: int) -> Iterator[tuple[str, str]]:
    """Return at most `most` functions of a file, as (source up to the end of the docstring, rest of the source).

    Only functions count that begin with a docstring, have a source of 200 to 600 characters, and are not indented. A file that is
    not valid Python has none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if most == 0:
            return
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        own = [line[node.col_offset:] for line in lines[node.lineno - 1:node.end_lineno]]
        split = node.body[0].end_lineno - node.lineno + 1
        prompt, answer = "\n".join(own[:split]) + "\n", "\n".join(own[split:])
        if SHORTEST <= len(prompt) + len(answer) <= LONGEST and answer.strip():
            most -= 1
            yield prompt, answer
