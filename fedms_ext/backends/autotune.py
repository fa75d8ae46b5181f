"""Which way of running something is the fastest on a GPU: measured once for each shape, kept on disk.

The files are in $FEDMS_CACHE (~/.cache/fedms by default), JSON from a shape's key to the name of the choice. Deleting one
measures anew. With FEDMS_TUNE=0, under Triton's interpreter, and while a CUDA graph is captured, nothing is measured: the
first name is taken, and not kept.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def folder() -> Path:
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")


def read(path: Path) -> dict[str, str]:
    """A file of `write`; what is not there, or broken, is empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        warnings.warn(f"{path} is not valid JSON ({error}); it is ignored and written anew", stacklevel=3)
        return {}


def write(path: Path, values: dict[str, str]) -> None:
    """Replaces the file as a whole, for other processes that read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(values, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


class Choices:
    """The choices in the file of that name. `choose` reads it when it is first called."""

    def __init__(self, name: str) -> None:
        self.path = folder() / name
        self.measures = os.environ.get("FEDMS_TUNE") != "0" and os.environ.get("TRITON_INTERPRET") != "1"
        self._known: dict[str, str] | None = None

    def choose(self, key: str, names: Sequence[str], run: Callable[[str], object]) -> str:
        """The name whose `run(name)` takes the least time, or the first one where nothing can be measured."""
        if not self.measures or len(names) == 1:
            return names[0]
        if self._known is None:
            self._known = read(self.path)
        if self._known.get(key) in names:
            return self._known[key]
        if torch.cuda.is_current_stream_capturing():
            return names[0]
        best = min(names, key=lambda name: milliseconds(lambda: run(name)))
        # Another process may have added to the file in the meantime.
        self._known = read(self.path) | self._known | {key: best}
        write(self.path, self._known)
        return best


def milliseconds(run: Callable[[], object]) -> float:
    """The least of five times on the current CUDA stream, each over four calls, after one that is not timed."""
    run()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return min(times)
