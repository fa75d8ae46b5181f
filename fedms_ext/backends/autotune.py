"""Which way to run something is the fastest on a GPU: measured once for each shape and kept on disk.

The files are in $FEDMS_CACHE (~/.cache/fedms by default): JSON from the text of a shape to the name of the choice. Delete one to
measure anew. With FEDMS_TUNE=0, on a stand-in for a GPU, and while a CUDA graph is captured, nothing is measured.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from . import device as devices
from . import files

Way = TypeVar("Way")

# GPU cycles, about a millisecond. The GPU sleeps so long while the CPU queues the calls that are timed.
_HEAD_START = 2_000_000

# Largest difference between the results of two ways, as a share of the result, both as root mean squares. Results in bf16 that
# differ in the order of their sums alone differ by less than a hundredth.
_TOLERANCE = 0.05


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
        run: Callable[[Way], object], result: Callable[[Way], Sequence[Tensor]] | None = None,
    ) -> Way:  # fmt: skip
        """Return the fastest way for a shape.

        Args:
            device: Device on which `run` computes.
            shape: Everything that decides how fast a way is.
            ways: Returns the valid ways by name. The first one is used if nothing can be measured.
            run: Computes the complete result in one way.
            result: Does the same, and returns the tensors of the result. The ways whose result differs from that of the first one
                are then left out, with a warning. None: all ways are taken to be right.
        """
        key = (device, *shape)
        if key in self._cache:
            return self._cache[key]
        legal = ways()
        name = self._measured(device, " ".join(map(str, shape)).replace("torch.", ""), legal, run, result)
        way = legal[next(iter(legal)) if name is None else name]
        if name is not None or not devices.is_capturing(device):  # a shape first met in a capture is measured after it
            self._cache[key] = way
        return way

    def _measured(
        self, device: torch.device, text: str, legal: Mapping[str, Way], run: Callable[[Way], object],
        result: Callable[[Way], Sequence[Tensor]] | None,
    ) -> str | None:  # fmt: skip
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
            right = legal if result is None else _agreeing(legal, result, text)
            best = min(right, key=lambda name: milliseconds(lambda: run(legal[name])))
        # Another process may have added to the file in the meantime.
        self._on_disk = files.read(self.path) | self._on_disk | {text: best}
        files.write(self.path, self._on_disk)
        return best


def _agreeing(ways: Mapping[str, Way], result: Callable[[Way], Sequence[Tensor]], shape: str) -> dict[str, Way]:
    """Return the ways whose result agrees with that of the first one, which is among them; warn of the others."""
    (first, trusted), *others = ways.items()
    want = [tensor.clone() for tensor in result(trusted)]
    right = {first: trusted}
    for name, way in others:
        if all(map(_agree, result(way), want)):
            right[name] = way
        else:
            warnings.warn(f"fedms_ext: on this GPU {name!r} gives another result than {first!r} for {shape}, so it is not used; "
                          "please report this", stacklevel=2)  # fmt: skip
    return right


def _agree(got: Tensor, want: Tensor) -> bool:
    """Return whether two results are the same up to rounding, as far as the second one is finite."""
    finite = want.isfinite()
    difference, size = (torch.where(finite, values, 0).norm() for values in (got.float() - want.float(), want.float()))
    return bool(difference <= _TOLERANCE * size)


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
