"""A round with its clients trained side by side (`run.lockstep`) against one after the other.

    python -m bench.federated.lockstep [SOURCE] [--lockstep 1,4,8,16] [--repeats 3] [--set KEY=VALUE ...] [--json FILE]

Each repetition visits the same clients once with each number, in turn. A ratio is of two times of one repetition, and the median
over the repetitions is printed. Beside the time, the table has the processor time of this process, and the largest difference of a
client's training loss from that of one after the other.
"""
from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import save
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.engines.visitor import Visitor
from fedms.federated.client import Private
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTask
from fedms.training.device import peak, reset_peak, synchronize

SETS = ["run.method=fedavg", "clients.count=16", "clients.unseen=0", "data.partition=iid", "data.max_samples=800", "sal.schedule=fixed",
        "sal.depth=2", "run.threads=1"]


class Round:
    """The visits of one round, whose clients begin with the same tensors every time."""

    def __init__(self, source: str, sets: list[str]) -> None:
        config = load_config(source, [*SETS, *sets])
        task = LoadedTask(config, Progress())
        experiment = task.experiment(config)
        self.model, self.server = task.model, experiment.server
        self.visitor = Visitor(experiment.method, self.server, self.model, experiment.clients, Subset(experiment.partition.global_test))
        self.message = self.server.message(self.server.start(experiment.method.initial(self.model)))
        self.clients = [client.id for client in experiment.clients]
        self.samples = sum(client.n_train for client in experiment.clients)

    def carry_out(self, lockstep: int) -> dict[str, Any]:
        """Visit all clients, `lockstep` of them at a time."""
        self.visitor.lockstep = lockstep
        reset_peak(self.model.device)
        started, computed = time.perf_counter(), time.process_time()
        found = [packed.head["metrics"]["loss"] for (_, packed), _ in self.visitor.each("visit", self.message, self.clients,
                                                                                        lambda _: Private())]
        synchronize(self.model.device)
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - computed,
                "peak_bytes": peak(self.model.device), "losses": found}


def compare(round: Round, numbers: list[int], repeats: int) -> dict[int, dict[str, float]]:
    """The figures of each number of clients at a time, by the number."""
    for number in numbers:      # constants are computed, kernels chosen, memory taken
        round.carry_out(number)
    runs = [{number: round.carry_out(number) for number in numbers} for _ in range(repeats)]
    table = {}
    for number in numbers:
        each = [(run[number], run[numbers[0]]) for run in runs]
        table[number] = {
            "seconds": statistics.median(own["seconds"] for own, _ in each),
            "cpu_seconds": statistics.median(own["cpu_seconds"] for own, _ in each),
            "ratio": statistics.median(first["seconds"] / own["seconds"] for own, first in each),
            "cpu_ratio": statistics.median(first["cpu_seconds"] / own["cpu_seconds"] for own, first in each),
            "peak_bytes": max(own["peak_bytes"] for own, _ in each),
            "largest_loss_difference": max(abs(a - b) for own, first in each for a, b in zip(own["losses"], first["losses"])),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="digits", help="a run file or the name of one")
    parser.add_argument("--lockstep", default="1,4,8,16", help="numbers of clients at a time; the first is what others are compared with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    round = Round(options.source, options.sets)
    print(f"{options.source}: {len(round.clients)} clients with {round.samples} training samples on {round.model.device}, "
          f"{torch.get_num_threads()} threads", flush=True)
    table = compare(round, [int(word) for word in options.lockstep.split(",")], options.repeats)
    print("| clients at a time | seconds a round | times as fast | in processor time | peak MiB | largest difference of a loss |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for number, row in table.items():
        print(f"| {number} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | {row['peak_bytes'] / 2**20:.0f} | "
              f"{row['largest_loss_difference']:.1e} |")
    if options.json:
        save(options.json, {"source": options.source, "set": options.sets, "clients": len(round.clients), "lockstep": table})


if __name__ == "__main__":
    main()
