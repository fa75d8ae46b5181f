"""Federated methods, an algorithm a file. What is known of each before it is imported is a row of `fedms.config.catalogue`."""
from __future__ import annotations

from fedms.config import RunConfig
from fedms.federated.method import Method


def create(config: RunConfig) -> Method:
    """Returns the method that a run file names; its module is imported now."""
    return config.method_row.load()(config)
