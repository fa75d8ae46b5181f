"""Timing on a GPU: CUDA events around each call, eager and as a CUDA graph, with a warm and a cold L2 cache.

With device "cpu" the same code runs on the wall clock: a rehearsal that shows that a benchmark works, and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class Clock:
    """Times calls on one device. `seconds`: for how long each candidate runs."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        if device == "cuda":
            # Writing twice the L2 cache leaves nothing in it of what the last call read.
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush: Tensor | None = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], object], cold: bool) -> Timing:
        """`cold`: the L2 cache is flushed before every call."""
        self._once(call, cold)
        first = self._once(call, cold)
        count = int(np.clip(self.seconds * 1e6 / max(first, 1.0), 5, 200))
        times = [self._once(call, cold) for _ in range(count)]
        return Timing(*(float(np.percentile(times, p)) for p in (50, 20, 80)))

    def _once(self, call: Callable[[], object], cold: bool) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        if cold:
            self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as the replay of a CUDA graph."""
        if self.device == "cpu":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def cpu_microseconds(self, call: Callable[[], object]) -> float:
        """What a call costs the CPU, while the GPU has nothing else to do than to fall behind."""
        count = 20
        self._once(call, False)
        start = time.perf_counter()
        for _ in range(count):
            call()
        spent = (time.perf_counter() - start) / count * 1e6
        if self.device == "cuda":
            torch.cuda.synchronize()
        return spent

    def peak_mebibytes(self, call: Callable[[], object]) -> float | None:
        """Memory that the call takes beyond what was there before it; None on the CPU."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(clock: Clock, candidates: Mapping[str, Callable[[], object]], base: str) -> dict[str, dict[str, object]]:
    """Every candidate in every way, each time also as its ratio to `base`. One that fails says why instead."""
    rows: dict[str, dict[str, object]] = {}
    for name, call in candidates.items():
        try:
            graphed = clock.graphed(call)
            rows[name] = {
                "eager, warm": asdict(clock.time(call, cold=False)),
                "eager, cold": asdict(clock.time(call, cold=True)),
                "graph, warm": asdict(clock.time(graphed, cold=False)),
                "graph, cold": asdict(clock.time(graphed, cold=True)),
                "cpu_microseconds": clock.cpu_microseconds(call),
                "peak_mebibytes": clock.peak_mebibytes(call),
            }
        except Exception as error:  # a peer that cannot run here is a result too
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    for row in rows.values():
        for way, timing in row.items():
            if isinstance(timing, dict) and base in rows and way in rows[base]:
                timing["ratio"] = timing["median"] / rows[base][way]["median"]
    return rows


# What does less than a layer with experts.
_LESS = ("bare GEMM", "merged W", "frozen model")


def faster(rows: Mapping[str, Mapping[str, object]], way: str) -> dict[str, float]:
    """The peers that take less time than our first row, and how much less: their time over ours."""
    timed = {name: row[way]["median"] for name, row in rows.items() if "failed" not in row and name not in _LESS}
    ours = next((name for name in timed if name == "fedms" or name == "fedms, segments"), None)
    return {name: t / timed[ours] for name, t in timed.items() if ours and not name.startswith("fedms") and t < timed[ours]}


def table(title: str, rows: Mapping[str, Mapping[str, object]]) -> str:
    """The rows as Markdown: microseconds and ratio to the base, CUDA graph with warm L2 first; then who is faster."""
    lines = [f"### {title}", "", "| | graph, warm | ratio | graph, cold | ratio | eager, warm | ratio | CPU us | peak MiB |",
             "| --- " * 9 + "|"]  # fmt: skip
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed'].splitlines()[0]} " + "| " * 7 + "|")
            continue
        cells = [f"{row[way]['median']:.1f} | {row[way].get('ratio', float('nan')):.3f}"
                 for way in ("graph, warm", "graph, cold", "eager, warm")]  # fmt: skip
        peak = "" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {row['cpu_microseconds']:.1f} | {peak} |")
    for way in ("graph, warm", "eager, warm"):
        if lost := faster(rows, way):
            lines += ["", f"Faster than fedms ({way}): " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in lost.items())]
    return "\n".join(lines) + "\n"
