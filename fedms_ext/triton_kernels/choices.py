"""Which way of running a GEMM is the fastest here: measured once for each shape, kept on disk.

The file is $FEDMS_CACHE/gemm-smXY-tritonA.B.C.json (~/.cache/fedms by default): from a shape's key to the name of the
choice. Deleting it measures anew. With FEDMS_TUNE=0, under Triton's interpreter, and while a CUDA graph is captured,
nothing is measured: the cost model's first choice is taken, and not kept.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from .tiles import Chip


class Choices:
    """The choices for one kind of GPU. `choose` reads the file when it is first called."""

    def __init__(self, chip: Chip) -> None:
        folder = Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")
        major, minor = chip.capability
        self.path = folder / f"gemm-sm{major}{minor}-triton{triton.__version__}.json"
        self.measures = os.environ.get("FEDMS_TUNE") != "0" and os.environ.get("TRITON_INTERPRET") != "1"
        self._known: dict[str, str] | None = None

    def choose(self, key: str, names: Sequence[str], run: Callable[[str], object]) -> str:
        """The name whose `run(name)` takes the least time, or the first one where nothing can be measured."""
        if not self.measures or len(names) == 1:
            return names[0]
        if self._known is None:
            self._known = self._read()
        if self._known.get(key) in names:
            return self._known[key]
        if torch.cuda.is_current_stream_capturing():
            return names[0]
        best = min(names, key=lambda name: milliseconds(lambda: run(name)))
        # Another process may have added to the file in the meantime.
        self._known = self._read() | self._known | {key: best}
        self._write(self._known)
        return best

    def _read(self) -> dict[str, str]:
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            warnings.warn(f"{self.path} is not valid JSON ({error}); it is ignored and written anew", stacklevel=2)
            return {}

    def _write(self, known: dict[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(known, file, indent=1, sort_keys=True)
        os.replace(file.name, self.path)


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
