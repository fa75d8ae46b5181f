"""Many clients on one machine: `python -m bench.federated.scale --help`. It ends with 1 if a bound does not hold.

registered  the embedded engine with 100,000 clients, 32 of them a round: seconds until the first visit (bound: 20, from
            the start of the process), memory of a client that is never visited (the difference to a run with 1,000
            clients over the same samples, by client), seconds a round.
simulated   Flower's simulation with 1,000 clients, 32 of them a round, until each has its private expert (some 240
            rounds; --rounds 60 visits 86 % of them): all experts are read back with their checksums, as the server knows
            them, and all differ. Memory of the whole process tree (proportional set size, Ray included) after each
            round: below 3 GB, and flat.
"""
from __future__ import annotations

import time

STARTED = time.perf_counter()       # before the imports, which belong to a start

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from bench.harness.environment import save
from fedms.config import load_config
from fedms.progress import Progress
from fedms.runs.batch import BatchRun, carry_out
from fedms.training.memory import resident_memory

A_ROUND = 32
GB = 10**9


def samples(folder: Path, count: int) -> Path:
    """Images of noise: what is measured is everything but the learning."""
    rng = np.random.default_rng(0)
    path = folder / "noise.npz"
    np.savez(path, images=rng.integers(0, 17, (count, 8, 8)).astype(np.uint8), labels=rng.integers(0, 10, count))
    return path


def configuration(data: Path, clients: int, *sets: str):
    return load_config("digits", [f"data.path={data}", "data.max_samples=none", "data.partition=iid", "data.global_test=0",
                                  f"clients.count={clients}", "clients.unseen=0", f"clients.fraction={A_ROUND / clients}",
                                  "run.threads=1", "sal.schedule=fixed", *sets])


class Watch(Progress):
    """When the first visit begins, memory then, and seconds and memory after each round."""

    def __init__(self, memory) -> None:
        self.memory, self.rounds = memory, []

    def start(self, total_visits: int, title: str) -> None:
        self.started, self.at_start = time.perf_counter() - STARTED, self.memory()

    def round(self, stage: str, round: int, **metrics) -> None:
        self.rounds.append((metrics["seconds"], self.memory()))


# 100,000 registered clients

def registered_once(folder: Path, clients: int, rounds: int) -> dict:
    """In a process of its own."""
    watch = Watch(resident_memory)
    config = configuration(folder / "noise.npz", clients, "run.method=fedavg", f"stage1.rounds={rounds}",
                           "stage2.rounds=0")
    carry_out([BatchRun(config, folder / f"{clients}", tested=False)], progress=watch)
    return {"clients": clients, "start_seconds": watch.started, "start_bytes": watch.at_start,
            "round_seconds": [seconds for seconds, _ in watch.rounds], "end_bytes": watch.rounds[-1][1]}


def registered(folder: Path, clients: int, rounds: int) -> dict:
    samples(folder, 3 * clients)
    few, many = (json.loads(subprocess.run(
        [sys.executable, "-m", "bench.federated.scale", "once", "--folder", str(folder), "--clients", str(n), "--rounds", str(rounds)],
        capture_output=True, text=True, check=True).stdout.splitlines()[-1]) for n in (min(1000, clients // 2), clients))
    idle = (many["start_bytes"] - few["start_bytes"]) / (many["clients"] - few["clients"])
    print(f"{clients} registered clients: first visit after {many['start_seconds']:.1f} s, {idle:.0f} bytes an idle client, "
          f"{many['start_bytes'] / 2**20:.0f} MiB in all; a round of {A_ROUND}: "
          f"{statistics.median(many['round_seconds']):.2f} s ({statistics.median(few['round_seconds']):.2f} s with "
          f"{few['clients']} clients)")
    return {"few": few, "many": many, "bytes_per_idle_client": idle, "holds": many["start_seconds"] < 20}


# 1,000 simulated clients

def tree_memory() -> int:
    """Bytes of this process and its descendants; what they share is counted once. Ray's object store is among it."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            pass
    return total


def simulated(folder: Path, clients: int, most: int | None) -> dict:
    from fedms.storage.checkpoint import CheckpointFolder
    from fedms.storage.private_state import ClientFolder

    data = samples(folder, 4 * clients)
    rounds = rounds_to_visit_all(data, clients) if most is None else most
    # On noise the best expert is mostly the one that all began with; the last one is a client's own.
    config = configuration(data, clients, "run.engine=flower-sim", "run.method=local", "stage1.rounds=0",
                           f"stage2.rounds={rounds}", "stage2.keep=last")
    watch = Watch(tree_memory)
    carry_out([BatchRun(config, folder / "run", tested=False)], progress=watch)
    engine = CheckpointFolder(folder / "run/checkpoint").load()[0].state
    experts = {}
    for client, digest in engine["kept"].items():
        with ClientFolder(folder / "run/clients" / client, engine["run"], int(client)) as own:
            private = own.load(digest).private           # refused unless every byte is what the server knows of
        if private.has_expert:
            content = b"".join(name.encode() + private.tensors[name].numpy().tobytes() for name in sorted(private.tensors))
            experts[client] = hashlib.sha256(content).hexdigest()
    memory = [size for _, size in watch.rounds]
    # The first rounds warm up; after them a round must not cost memory that stays.
    tenth = max(1, len(memory) // 10)
    early, late = (statistics.median(part) for part in (memory[tenth:2 * tenth], memory[-tenth:]))
    print(f"{clients} simulated clients: {len(experts)} have a private expert, {len(set(experts.values()))} different; "
          f"{rounds} rounds of {A_ROUND}, median {statistics.median(s for s, _ in watch.rounds):.2f} s; process tree at "
          f"most {max(memory) / GB:.2f} GB, {early / GB:.3f} GB early, {late / GB:.3f} GB late")
    whole = most is not None or len(experts) == clients
    return {"clients": clients, "rounds": rounds, "experts": len(experts), "different": len(set(experts.values())),
            "round_seconds": [s for s, _ in watch.rounds], "tree_bytes": memory,
            "holds": whole and len(set(experts.values())) == len(experts) and max(memory) < 3 * GB and late < 1.05 * early}


def rounds_to_visit_all(data: Path, clients: int) -> int:
    from fedms.federated.server import Server
    from fedms.methods import create

    config = configuration(data, clients)
    server = Server(config, [1], {}, create(config))
    visited: set[int] = set()
    for number in range(1, 10**5):
        visited |= set(server.sample("stage2", number))
        if len(visited) == clients:
            return number
    raise AssertionError("some client is never sampled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("registered", "simulated", "once"))
    parser.add_argument("--clients", type=int, help="default: 100000 registered, 1000 simulated")
    parser.add_argument("--rounds", type=int, help="default: 5 registered; simulated: until all clients were visited")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "once":
        print(json.dumps(registered_once(options.folder, options.clients, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as name:
        found = (registered(Path(name), options.clients or 100_000, options.rounds or 5) if options.what == "registered"
                 else simulated(Path(name), options.clients or 1000, options.rounds))
    if options.json:
        save(options.json, found)
    if not found["holds"]:
        sys.exit("a bound does not hold")


if __name__ == "__main__":
    main()
