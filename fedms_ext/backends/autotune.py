"""Which way to run something is the fastest on a GPU: measured once for each shape and kept on disk.

The files are in $FEDMS_CACHE (~/.cache/fedms by default): JSON from the text of a shape to the name of the choice. Delete one to
measure anew. With FEDMS_TUNE=0, on a stand-in for a GPU, and while a CUDA graph is captured, nothing is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch

from . import device as devices
from . import files

Way = TypeVar("Way")

# GPU cycles, about a millisecond. The GPU sleeps so long while the CPU queues the calls that are timed.
_HEAD_START = 2_000_000


class Choices(Generic[Way]):
    """The choices in one file, which is read when the first shape is requested.

    Args:
        name: Name of the file. It contains everything besides the shape that choices depend on.
    """

    def __init__(self, name: str) -> None:
        self.path = files.folder() / name
        self.measures = os.environ.get("FEDMS_TUNE") != "0"
        self._on_disk: dict[str, str] | None = None
        self._cache: dict[tuple[object, ...], Way] = {}

    def choose(
        self, device: torch.device, shape: tuple[object, ...], ways: Callable[[], Mapping[str, Way]],
        run: Callable[[Way], object],
    ) -> Way:  # fmt: skip
        """Return the fastest way for a shape.

        Args:
            device: Device on which `run` computes.
            shape: Everything that decides how fast a way is.
            ways: Returns the valid ways by name. The first one is used if nothing can be measured.
            run: Computes the complete result in one way.
        """
        key = (device, *shape)
        if key in self._cache:
            return self._cache[key]
        legal = ways()
        name = self._measured(device, " ".join(map(str, shape)).replace("torch.", ""), legal, run)
        way = legal[next(iter(legal)) if name is None else name]
        if name is not None or not devices.is_capturing(device):  # a shape first met in a capture is measured after it
            self._cache[key] = way
        return way

    def _measured(
        self, device: torch.device, text: str, legal: Mapping[str, Way], run: Callable[[Way], object]
    ) -> str | None:
        """Return the name of the fastest way, or None where nothing can be measured."""
        if not self.measures or len(legal) == 1 or not devices.is_real(device):
            return None
        if self._on_disk is None:
            self._on_disk = files.read(self.path)
        if self._on_disk.get(text) in legal:
            return self._on_disk[text]
        if devices.is_capturing(device):
            return None
        with devices.guard(device):
            best = min(legal, key=lambda name: milliseconds(lambda: run(legal[name])))
        # Another process may have added to the file in the meantime.
        self._on_disk = files.read(self.path) | self._on_disk | {text: best}
        files.write(self.path, self._on_disk)
        return best


def milliseconds(run: Callable[[], object]) -> float:
    """Return the least of five times on the current CUDA stream, each of four calls, after one that is not timed.

    The GPU is kept asleep until the calls are queued. Otherwise a layer that takes the GPU less time than Python takes to
    launch it would be timed by its Python.
    """
    run()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START)
        start.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return min(times)
