"""Timing on a GPU: CUDA events around each call, eager and as a CUDA graph, with a warm and a cold L2 cache; the
candidates take turns, so that a clock that changes meets them all. And the tables that come of it.

With device "cpu" the same code runs on the wall clock: a rehearsal that shows that a benchmark works, and no more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fedms_ext


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


Call = Callable[[], object]


class Clock:
    """Times calls on one device. `seconds`: for how long each candidate runs."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        if device == "cuda":
            # Writing twice the L2 cache leaves nothing in it of what the last call read.
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush: Tensor | None = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, calls: Mapping[str, Call], cold: bool) -> dict[str, Timing]:
        """`cold`: the L2 cache is flushed before every call; otherwise the call before has left there what it will."""
        first = [self._once(call, cold) for call in calls.values()]
        rounds = int(np.clip(self.seconds * 1e6 * len(calls) / max(sum(first), 1.0), 5, 200))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self._once(call, cold))
        return {name: Timing(*(float(np.percentile(t, p)) for p in (50, 20, 80))) for name, t in times.items()}

    def _once(self, call: Call, cold: bool) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        if cold:
            self.flush.zero_()
        else:
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def graphed(self, call: Call) -> Call:
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

    def cpu_microseconds(self, call: Call) -> float:
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

    def peak_mebibytes(self, call: Call) -> float | None:
        """Memory that the call takes beyond what was there before it; None on the CPU."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


Rows = dict[str, dict[str, object]]


def compare(clock: Clock, candidates: Mapping[str, Call], base: str) -> Rows:
    """Every candidate in every way, each time also as its ratio to `base`. One that fails says why instead."""
    rows: Rows = {}
    calls: dict[str, dict[str, Call]] = {"eager": {}, "graph": {}}
    for name, call in candidates.items():
        try:
            rows[name] = {"cpu_microseconds": clock.cpu_microseconds(call), "peak_mebibytes": clock.peak_mebibytes(call)}
            calls["graph"][name] = clock.graphed(call)
            calls["eager"][name] = call
        except Exception as error:  # a peer that cannot run here is a result too
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    for mode, cold in (("eager", False), ("eager", True), ("graph", False), ("graph", True)):
        way = f"{mode}, {'cold' if cold else 'warm'}"
        times = clock.time(calls[mode], cold)
        for name, timing in times.items():
            rows[name][way] = asdict(timing) | ({"ratio": timing.median / times[base].median} if base in times else {})
    return rows


# What does less than a layer with experts.
_LESS = ("bare GEMM", "merged W", "frozen model")


def faster(rows: Mapping[str, Mapping[str, object]], way: str) -> dict[str, float]:
    """The peers that take less time than our first row, and how much less: their time over ours."""
    timed = {name: row[way]["median"] for name, row in rows.items() if "failed" not in row and name not in _LESS}
    ours = next((name for name in timed if name == "fedms" or name == "fedms, segments"), None)
    return {name: t / timed[ours] for name, t in timed.items() if ours and not name.startswith("fedms") and t < timed[ours]}


def table(title: str, rows: Mapping[str, Mapping[str, object]]) -> str:
    """The rows as Markdown: microseconds (median, 20th to 80th percentile) and ratio to the base, CUDA graph with warm L2
    first; then who is faster."""
    lines = [f"### {title}", "", "| | graph, warm | ratio | graph, cold | ratio | eager, warm | ratio | CPU us | peak MiB |",
             "| --- " * 9 + "|"]  # fmt: skip
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed'].splitlines()[0]} " + "| " * 7 + "|")
            continue
        cells = [f"{t['median']:.1f} ({t['p20']:.1f} to {t['p80']:.1f}) | {t.get('ratio', float('nan')):.3f}"
                 for t in (row[way] for way in ("graph, warm", "graph, cold", "eager, warm"))]  # fmt: skip
        peak = "" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {row['cpu_microseconds']:.1f} | {peak} |")
    for way in ("graph, warm", "eager, warm"):
        if lost := faster(rows, way):
            lines += ["", f"Faster than fedms ({way}): " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in lost.items())]
    return "\n".join(lines) + "\n"


class Report:
    """The tables of one benchmark, printed and written to --json one by one, until the --seconds are over."""

    def __init__(self, doc: str, seconds: float, quick_seconds: float) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="fewer shapes and peers, shorter timings")
        parser.add_argument("--seconds", type=float, default=float("inf"),
                            help="begin no table that is not expected to end within so many seconds")  # fmt: skip
        parser.add_argument("--json", type=Path, help="write the figures to this file too")
        parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: shows that it runs, no more")
        options = parser.parse_args()
        self.quick, self.rehearse = options.quick, options.rehearse
        self.dtype = torch.float32 if self.rehearse else torch.bfloat16
        self.clock = Clock("cpu", 0.0) if self.rehearse else Clock("cuda", quick_seconds if self.quick else seconds)
        self._json, self._results = options.json, []
        self._end, self._last = time.perf_counter() + options.seconds, 0.0
        self._left_out: list[str] = []
        print(f"backends: {', '.join(fedms_ext.available())}\n")

    def add(self, title: str, facts: Mapping[str, object], calls: Mapping[str, Call], base: str) -> None:
        """Measures the calls, unless the time does not suffice for a table that takes as long as the one before."""
        start = time.perf_counter()
        if start + self._last > self._end:
            self._left_out.append(title)
            return
        rows = compare(self.clock, calls, base)
        print(table(title, rows), flush=True)
        self.keep({**facts, "results": rows})
        self._last = time.perf_counter() - start

    def keep(self, figures: Mapping[str, object]) -> None:
        """Adds to what --json holds."""
        self._results.append(figures)
        if self._json:
            self._json.write_text(json.dumps(self._results, indent=1))

    def close(self) -> None:
        if self._left_out:
            print("Left out, since the time was over:\n" + "\n".join(f"- {title}" for title in self._left_out))
