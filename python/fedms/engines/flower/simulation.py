"""Flower's simulation on this machine: Ray actors play the nodes, each with one resident model for all of its clients.

Flower 1.41 calls `run_simulation` deprecated in favor of `flwr run`, which leaves a SuperLink running in the background
and the run's errors and signals in another process; the pinned version has it.
"""
from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedms.errors import FedMSError


class SimulationError(FedMSError):
    """The simulation could not be started, or ended before the run did."""


def share_of_gpu(at_once: int, gpus: int) -> float:
    """Return Ray's `num_gpus` for each of the nodes that work at once: the share of one GPU that it may use, at most 1."""
    return 0.0 if gpus == 0 else 1 / max(1, -(-at_once // gpus))


@contextmanager
def simulated_grid(clients: ClientApp, count: int, threads: int, gpus: int = 0) -> Iterator[Grid]:
    """Return a grid of `count` nodes. As many work at a time as this machine has cores for their `threads`.

    The nodes share its GPUs evenly, and each uses one GPU.

    Raises:
        SimulationError: If Ray does not start.
    """
    from flwr.simulation.run_simulation import run_simulation

    cores = os.cpu_count() or 1
    at_once = max(1, min(count, cores // min(threads, cores)))
    backend: dict[str, Any] = {"init_args": {"num_cpus": cores, "num_gpus": gpus, "include_dashboard": False, "log_to_driver": False,
                                             "logging_level": logging.ERROR},
                               "client_resources": {"num_cpus": min(threads, cores), "num_gpus": share_of_gpu(at_once, gpus)}}
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ready: Queue[Grid | BaseException] = Queue()
    done = threading.Event()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        ready.put(grid)
        done.wait()

    def simulate() -> None:
        try:
            run_simulation(app, clients, count, backend_config=backend)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=simulate, name="simulation", daemon=True)
    thread.start()
    grid = ready.get()
    if isinstance(grid, BaseException):
        raise SimulationError(f"Flower's simulation did not start: {grid}") from grid
    try:
        yield grid
    finally:
        done.set()
        thread.join()
