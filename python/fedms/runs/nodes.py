"""What nodes of the distributed engine need of a run: its model and their data, kept from message to message."""
from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedms.engines.flower import client as side      # first: it sets Flower's environment

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from fedms.config import RunConfig
    from fedms.runs.experiment import Experiment, LoadedTask


def open_experiment(config: RunConfig, identity: side.Identity) -> tuple[LoadedTask, Experiment]:
    """Model and data of a run, kept in this process for its next message."""
    if identity.model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"id": identity.model})})
    text = json.dumps(config.model_dump(mode="json", exclude_none=True), sort_keys=True)
    return _open(text, identity.data, None if identity.data is None else identity.client)


@lru_cache(maxsize=1)
def _open(text: str, data: Path | None, client: int | None) -> tuple[LoadedTask, Experiment]:
    from fedms.config import config_from_dict
    from fedms.data import read_shard
    from fedms.progress import Progress
    from fedms.runs.experiment import LoadedTask

    config = config_from_dict(json.loads(text))
    session = LoadedTask(config, Progress(), shard=None if data is None else read_shard(data).of(client))
    return session, session.experiment(config)


def simulation_app(state: Path, config: RunConfig) -> ClientApp:
    """Return the app of the nodes of a simulation: a node's number is that of its client, all data are available, and the run file
    is its own.
    """
    app = ClientApp()

    @app.query()
    @app.query("sum")
    @app.train()
    @app.evaluate()
    def answer(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        identity = side.Identity(number, None, state / str(number), None, config, device=config.run.device)
        return side.answer(message, identity, open_experiment)

    return app
