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


@contextmanager
def simulated_grid(clients: ClientApp, count: int, threads: int) -> Iterator[Grid]:
    """A grid of `count` nodes, of which as many work at a time as this machine has cores for their `threads`.

    Raises:
        SimulationError: if Ray does not start.
    """
    from flwr.simulation.run_simulation import run_simulation

    cores = os.cpu_count() or 1
    backend: dict[str, Any] = {"init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False,
                                             "logging_level": logging.ERROR},
                               "client_resources": {"num_cpus": min(threads, cores), "num_gpus": 0.0}}
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
