"""The Flower app: what `flwr` starts on the server and on the clients; the folders of `fedms flower init` name it.

Nodes say who they are and what they have in their own configuration (`flower-supernode --node-config`):

    client=3 data="/home/me/data" state="/home/me/state" run="/home/me/run.toml"

`run` may be left out: then no run file of a server can name a folder as its model, or code of a model's repository.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedms.engines.flower import client as side      # first: it sets Flower's environment
from fedms.storage.durable import shard_about

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from fedms.config import RunConfig
    from fedms.runs.experiment import Experiment, LoadedTask


def deployed(context: Context) -> side.Identity:
    """Return who a node is, by its own configuration and the shard in its data folder.

    Raises:
        ValueError: If something is missing in its configuration, or the folder holds the data of another client.
    """
    node: Mapping[str, Any] = context.node_config
    for key, kind in (("client", int), ("data", str), ("state", str)):
        if not isinstance(node.get(key), kind):
            raise ValueError(f"--node-config: {key} is {node.get(key)!r}; expected "
                             'client=NUMBER data="FOLDER" state="FOLDER"')
    data, number = Path(node["data"]), node["client"]
    held = {each["id"]: each["n_train"] for each in shard_about(data)["clients"]}
    if number not in held:
        raise ValueError(f"--node-config: client={number}, but {data} holds the data of client "
                         f"{', '.join(map(str, held)) or 'nobody'}")
    own = None
    if "run" in node:
        from fedms.config import load_config

        own = load_config(Path(str(node["run"])))
    return side.Identity(number, held[number], Path(node["state"]), data, own)


def simulated(context: Context, state: Path, config: RunConfig) -> side.Identity:
    """Return who a simulated node is: its number is its client's, it has all data, and the run file is its own."""
    number = int(context.node_config["partition-id"])
    return side.Identity(number, None, state / str(number), None, config)


def open_experiment(config: RunConfig, data: Path | None) -> tuple[LoadedTask, Experiment]:
    """Return model and data of a run. They are kept in this process for its next message."""
    return _open(json.dumps(config.model_dump(mode="json", exclude_none=True), sort_keys=True), data)


@lru_cache(maxsize=1)
def _open(text: str, data: Path | None) -> tuple[LoadedTask, Experiment]:
    from fedms.config import config_from_dict
    from fedms.data import read_shard
    from fedms.progress import Progress
    from fedms.runs.experiment import LoadedTask

    config = config_from_dict(json.loads(text))
    session = LoadedTask(config, Progress(), shard=None if data is None else read_shard(data))
    return session, session.experiment(config)


def client_app(identify: Any) -> ClientApp:
    """Return a ClientApp whose nodes are who `identify(context)` says."""
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return side.hello(message, identify(context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return side.train(message, identify(context), open_experiment)

    @app.query("sum")
    def add_up(message: Message, context: Context) -> Message:
        return side.add_up(message, identify(context))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return side.evaluate(message, identify(context), open_experiment)

    return app


client = client_app(deployed)
server = ServerApp()


def simulation_app(state: Path, config: RunConfig) -> ClientApp:
    return client_app(partial(simulated, state=state, config=config))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run that the app's configuration names. What it prints goes into the run's log (`flwr log`)."""
    from rich.console import Console

    from fedms.config import load_config
    from fedms.data import read_shard
    from fedms.progress import TerminalProgress, accept_any_text
    from fedms.runs.run import run

    accept_any_text()
    settings: Mapping[str, Any] = context.run_config
    config = load_config(settings["run-file"], [*json.loads(settings["set"]), "run.engine=flower"])
    run(config, Path(settings["out"]), overwrite=settings["force"], resume=settings["resume"],
        progress=TerminalProgress(Console(width=10_000, highlight=False)), grid=grid,
        shard=read_shard(Path(settings["data"])))
