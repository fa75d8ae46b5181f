"""The same federated run on a GPU, there with CUDA graphs, and on the CPU: `python -m bench.federated.devices SOURCE`.

Prints a line for each: accuracy of every seed, seconds of a round after the first of its stage, which builds constants and
captures graphs, and the peak memory of a visit (on a GPU what PyTorch allocated there). With --rehearse all are on the CPU, to
show that this works.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from fedms.config import load_config, with_run
from fedms.runs import run
from fedms.storage.records import RunRecords

WAYS = {"cuda": {"device": "cuda"}, "cuda, graphs": {"device": "cuda", "graphs": True}, "cpu": {"device": "cpu"}}


def row(folders: list[Path]) -> str:
    """Return the cells of one way to run, from its run folders."""
    records = [RunRecords.read(folder) for folder in folders]
    accuracies = [f"{100 * each.summary['personalized_accuracy']['mean']:.1f}" for each in records]
    later = [line["seconds"] for each in records for line in each.rounds if line["round"] > 1]
    seconds = later or [line["seconds"] for each in records for line in each.rounds]
    peak = max(visit["peak_memory_bytes"] for each in records for visit in each.visits if visit.get("peak_memory_bytes"))
    return f"{', '.join(accuracies)} | {statistics.median(seconds):.3f} | {peak / 2**20:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a run file, or the name of a built-in one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    config = load_config(options.source, options.set)
    print(f"{options.source} {' '.join(options.set)}\n\n| | accuracy, % | seconds a round | peak MiB of a visit |\n"
          "| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            way = way | ({"device": "cpu"} if options.rehearse else {})
            folders = [Path(folder) / f"{name}-{seed}" for seed in range(options.seeds)]
            for seed, out in enumerate(folders):
                run.run(with_run(config, seed=seed, **way), out)
            print(f"| {name} | {row(folders)} |", flush=True)


if __name__ == "__main__":
    main()
