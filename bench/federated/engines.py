"""Seconds a round of the same run on each engine, and that they end in the same bits: `python -m bench.federated.engines --help`.

The model is the small ViT on digits, so that what is compared is the carrying of messages, not training. The embedded
engine's overhead is what a round takes beyond its clients' own visits (packing, checks, averaging, records, checkpoint).
Flower's FedAvg is its own strategy over its own simulation, with the same model, data, sampling and local training.
"""
from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import fedms.engines.flower      # sets Flower's environment
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedms.config import load_config
from fedms.engines.flower.client import Identity
from fedms.federated.client import Message as Round
from fedms.federated.client import Private, visit
from fedms.runs import run
from fedms.runs.nodes import open_experiment
from fedms.storage.checkpoint import CheckpointFolder
from fedms.storage.records import RunRecords
from bench.harness.environment import save


def settings(clients: int, rounds: int) -> list[str]:
    return ["data.max_samples=none", "data.partition=iid", f"clients.count={clients}", "clients.unseen=0",
            "run.threads=1", f"stage1.rounds={rounds}", "stage2.rounds=0", "run.method=fedavg", "sal.schedule=fixed"]


def configuration(clients: int, rounds: int, engine: str = "local"):
    return load_config("digits", [*settings(clients, rounds), f"run.engine={engine}"])


def measure(folder: Path, name: str) -> dict:
    records = RunRecords.read(folder / name)
    each = [record["seconds"] for record in records.rounds]
    visits = [sum(v["seconds"] or 0.0 for v in records.visits if v["round"] == r["round"]) for r in records.rounds]
    snapshot, _ = CheckpointFolder(folder / name / "checkpoint").load()
    return {"first": each[0], "later": each[1:], "visits": visits[1:], "tensors": snapshot.tensors}


def flower_fedavg(clients: int, rounds: int) -> dict:
    """Seconds of Flower's own strategy: each training phase, its evaluation phases left out."""
    from flwr.simulation.run_simulation import run_simulation

    config = configuration(clients, rounds)
    session, experiment = open_experiment(config, Identity(0, None, Path("unused"), None))
    start = experiment.server.message(experiment.server.start(session.model.initial(config.run.seed))).tensors
    times: list[float] = []
    app = ServerApp()

    class Timed(FedAvg):
        def configure_train(self, *arguments):
            times.append(time.perf_counter())
            return super().configure_train(*arguments)

        def aggregate_train(self, *arguments):
            result = super().aggregate_train(*arguments)
            times.append(time.perf_counter())
            return result

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=clients).start(
            grid, ArrayRecord(start), num_rounds=rounds)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(app, client_app(config), clients, backend_config={
        "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    each = [end - begin for begin, end in zip(times[::2], times[1::2])]
    return {"first": each[0], "later": each[1:]}


def client_app(config) -> ClientApp:
    app = ClientApp()
    app.train()(partial(train, config=config))
    return app


def train(message: Message, context: Context, config) -> Message:
    session, experiment = open_experiment(config, Identity(0, None, Path("unused"), None))
    client = experiment.clients[int(context.node_config["partition-id"])]
    tensors = dict(message.content["arrays"].to_torch_state_dict())
    number = int(message.content["config"]["server-round"])
    came, _ = visit(experiment.method.client_step, session.model, client, Private(),
                    Round("stage1", number, (), config.sal.depth, config.sal.depth, tensors))
    return Message(RecordDict({"arrays": ArrayRecord(came.reply.tensors),
                               "metrics": MetricRecord({"num-examples": client.n_train})}), reply_to=message)


def compare(folder: Path, clients: int, rounds: int, engines: list[str]) -> dict:
    found: dict[str, dict] = {}
    for engine in engines:
        if engine == "fedavg":
            found[engine] = flower_fedavg(clients, rounds)
        else:
            run.run(configuration(clients, rounds, engine), folder / engine)
            found[engine] = measure(folder, engine)
        its = found[engine]
        print(f"{engine:10}  {clients:3} clients  first round {its['first']:7.2f} s, then median "
              f"{statistics.median(its['later']):7.3f} s (of {len(its['later'])}: {min(its['later']):.3f} to "
              f"{max(its['later']):.3f})", flush=True)
    tensors = {engine: its.pop("tensors") for engine, its in found.items() if "tensors" in its}
    if "local" in found:
        its = found["local"]
        over = statistics.median((second - inside) / clients for second, inside in zip(its["later"], its["visits"]))
        inside = statistics.median(its["visits"]) / clients
        its |= {"seconds_beyond_a_visit": over, "seconds_a_visit": inside}
        print(f"embedded: {1e3 * over:.2f} ms a visit beyond the visit's own {1e3 * inside:.1f} ms; "
              f"{'within' if over < 1e-3 + 0.02 * inside else 'BEYOND'} 1 ms + 2 %")
        for engine in tensors.keys() - {"local"}:
            a, b = tensors["local"], tensors[engine]
            found[engine]["same_bits_as_local"] = same = all(torch.equal(a[n], b[n]) for n in a if n.startswith("tensors/"))
            print(f"{engine}: {'the same bits as local' if same else 'DIFFERENT BITS'}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="4,16,100")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--engines", default="local,flower-sim,fedavg")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    found = {}
    for clients in map(int, options.clients.split(",")):
        with tempfile.TemporaryDirectory() as name:
            found[clients] = compare(Path(name), clients, options.rounds, options.engines.split(","))
        if options.json:
            save(options.json, {"rounds": options.rounds, "clients": found})


if __name__ == "__main__":
    main()
