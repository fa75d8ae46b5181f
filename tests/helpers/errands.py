"""A visitor for worker processes of a test: it loads no model, and some of its clients end the process that visits them."""
from __future__ import annotations

import os
import signal
import time

import torch

from fedms.engines.visitor import Visitor
from fedms.federated.client import Private

RAISES, DIES, SLOW = 4, 5, 0


class Lonely(Visitor):
    """Returns who asked what, and counts a client's visits in its private state."""

    def __init__(self):
        self.own_paid = set()

    @property
    def paid(self):
        return self.own_paid

    @paid.setter
    def paid(self, names):
        self.own_paid = names

    def do(self, errand, message, client, private, **further):
        if client == RAISES:
            raise ValueError("a number is missing")
        if client == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if client == SLOW:
            time.sleep(0.3)
        known = sorted(self.own_paid)
        self.own_paid = self.own_paid | {f"constant of {client}"}
        count = private.tensors.get("count", torch.zeros((), dtype=torch.int64))
        said = errand, message.round, client, known, os.environ.get("GPU_OF_A_TEST"), further
        return said, Private({"count": count + 1})


def start():
    return Lonely()


def cannot_start():
    raise OSError("no such model")
