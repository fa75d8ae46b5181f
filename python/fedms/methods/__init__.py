"""Federated methods, an algorithm a file. What is known of each before it is imported is a row of `fedms.config.catalogue`."""
from __future__ import annotations

from fedms.config import RunConfig
from fedms.errors import ConfigError
from fedms.federated.method import Method


def create(config: RunConfig) -> Method:
    """Return the method that a run file names; its module is imported now.

    Raises:
        ConfigError: If clients are to be trained side by side, and the method trains each by itself.
    """
    method: Method = config.method_row.load()(config)
    if config.run.lockstep > 1 and not method.asks_for_training:
        raise ConfigError(f"run.lockstep: got {config.run.lockstep}, but {method.name} has its visits as client_step, which trains a "
                          "client by itself; set it to 1, or write them as Method.visit")
    return method
