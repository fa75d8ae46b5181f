"""What Flower ships to every node: the names of the two sides, which the installed package brings."""
from fedms.runs.flower_app import client, server

__all__ = ["client", "server"]
