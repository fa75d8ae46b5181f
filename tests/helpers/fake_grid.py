"""A Flower grid without Flower's processes: nodes answer in this one, and each can be made to misbehave."""
from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedms.config import RunConfig
from fedms.engines.flower import client as side
from fedms.runs.nodes import open_experiment

Fault = Callable[[Message, Callable[[Message], Message]], "Message | list[Message] | None"]


class FakeGrid:
    """`count` clients, client i on node 100 + i, with their folders under `state`; `data(i)`: client i's shard.

    faults: by (kind, round, client), such as ("train", "stage1 2", 3) or, for every round, ("train", None, 3): given
            the message and what would answer it, returns the answer, several, or None for none.
    own:    the run file of each node, which may name folders of its own.
    down:   clients whose nodes are not there.
    """

    def __init__(self, state: Path, count: int, n_train: dict[int, int],
                 data: Callable[[int], Path | None] = lambda _: None, faults: dict[tuple, Fault] | None = None,
                 own: RunConfig | None = None) -> None:
        self.state, self.n_train, self.data, self.faults, self.own = state, n_train, data, faults or {}, own
        self.nodes = {100 + i: i for i in range(count)}
        self.names: dict[int, str] = {}
        self.down: set[int] = set()
        self.replies: dict[str, list[Message]] = {}
        self.numbers = itertools.count()
        self.asked: list[tuple[str, str, int]] = []
        self.together: list[int] = []               # messages that were pushed at once, by push
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1      # Message() asks for them

    def get_nodes(self):
        return [SimpleNamespace(node_id=node, name=self.names.get(node, ""), last_activated_at="") for node, i in self.nodes.items()
                if i not in self.down]

    def push_messages(self, messages):
        self.together.append(len(messages))
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{next(self.numbers)}"
            client, kind = self.nodes[message.metadata.dst_node_id], message.metadata.message_type
            where = message.metadata.group_id
            self.asked.append((kind, where, client))
            identity = side.Identity(client, self.n_train[client], self.state / str(client), self.data(client), self.own)
            fault = self.faults.get((kind, where, client), self.faults.get((kind, None, client)))
            answer = (lambda m: self._act(m, identity)) if fault is None else (
                lambda m: fault(m, lambda n: self._act(n, identity)))
            came = answer(message)
            came = [] if came is None else came if isinstance(came, list) else [came]
            self.replies[message.metadata.message_id] = came
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        return [reply for number in ids for reply in self.replies.pop(number, [])]

    @staticmethod
    def _act(message: Message, identity: side.Identity) -> Message:
        return side.answer(message, identity, open_experiment)
