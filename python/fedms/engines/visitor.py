"""Visits of the embedded engine on a resident model, in the engine's own process or in a worker process."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from fedms.data.subset import Subset
from fedms.engines.base import Evaluation
from fedms.federated.client import Client, Message, Private, Visit, visit
from fedms.federated.evaluation import evaluate_client, own_accuracy, validate_client
from fedms.federated.lockstep import Turn, together
from fedms.federated.method import Method
from fedms.federated.packing import Packed, pack_reply
from fedms.federated.server import Server
from fedms.training.expert_model import ExpertModel

if TYPE_CHECKING:
    import numpy as np

    from fedms.federated.private_server import PrivateServer

Errand = Literal["visit", "contribute", "evaluate", "validate"]
"""Names of the methods of :class:`Visitor` that do something for one client."""


class Visits(Protocol):
    """Does errands for clients, in this process or in others.

    Attributes:
        paid: Names of the constants that clients have paid for; see `FlopMeter.paid`.
    """

    paid: set[str]

    def each(self, errand: Errand, message: Message, clients: Sequence[int], state: Callable[[int], Private],
             **further: Any) -> Iterator[tuple[Any, Private]]:
        """Do an errand for each client.

        Args:
            errand: What to do.
            message: What the clients receive.
            clients: Their ids.
            state: Returns the private state that a client of this id has.
            further: Further arguments of the errand.

        Yields:
            The result of the errand, and the client's private state after it, in the order of `clients`.
        """


class Visitor:
    """Visits clients one after the other on one resident model.

    Args:
        method: The method.
        server: The server, of which only settings that clients know are used.
        model: The resident model.
        clients: Participating clients; client i has id i.
        common_test: The common test set.
    """

    def __init__(self, method: Method, server: Server, model: ExpertModel, clients: Sequence[Client], common_test: Subset) -> None:
        self.method, self.server, self.model, self.clients, self.common_test = method, server, model, clients, common_test
        self.lockstep = server.config.run.lockstep

    @property
    def paid(self) -> set[str]:
        """See :class:`Visits`."""
        return self.model.meter.paid

    @paid.setter
    def paid(self, names: set[str]) -> None:
        self.model.meter.paid = names

    def each(self, errand: Errand, message: Message, clients: Sequence[int], state: Callable[[int], Private],
             **further: Any) -> Iterator[tuple[Any, Private]]:
        """See :meth:`Visits.each`. Each client is visited just before its result is yielded; with `[run] lockstep`, together with
        the next ones."""
        if self.lockstep == 1 or message.stage == "done":
            for client in clients:
                yield self.do(errand, message, client, state(client), **further)
            return
        for start in range(0, len(clients), self.lockstep):
            group = clients[start:start + self.lockstep]
            turns = together(self.method.visit, self.model, [(self.clients[i], state(i)) for i in group], message, self.server.ahead)
            for client, turn in zip(group, turns):
                yield self.do(errand, message, client, state(client), turn=turn)

    def do(self, errand: Errand, message: Message, client: int, private: Private, **further: Any) -> tuple[Any, Private]:
        """Do an errand for one client. Return the errand's result, and the client's private state after it."""
        return getattr(self, errand)(message, self.clients[client], private, **further)

    # The errands

    def visit(self, message: Message, client: Client, private: Private,
              turn: Turn | None = None) -> tuple[tuple[Visit, Packed | None], Private]:
        """Visit a client. Return the visit without its reply, and the packed reply, or None if there is none.

        turn: The same visit, if it was carried out together with others.
        """
        if turn is None:
            came, after = visit(self.method.client_step, self.model, client, private, message, self.server.ahead(message, client))
        else:
            came, after = turn.visit()
        packed = None if came.reply is None else pack_reply(came.reply, self.server.config.wire.dtype)
        return (replace(came, reply=None), packed), after

    def contribute(self, message: Message, client: Client, private: Private,
                   turn: Turn | None = None) -> tuple[np.ndarray, Private]:
        """Return the vector (size,) int32 that a client adds to the round's sum in a run with privacy.

        The reason why a client adds nothing stays with the client: no record and no log of the server has it.

        turn: See `visit`.
        """
        from fedms.federated.private_client import contribute

        step = self.method.client_step if turn is None else turn.step
        vector, after, _ = contribute(cast("PrivateServer", self.server), self.method, self.model, client, private, message, step)
        return vector, after

    def evaluate(self, message: Message, client: Client, private: Private, on_common_test: bool) -> tuple[Evaluation, Private]:
        """Return a client's accuracies on its test samples with the final model, and on the common test set if requested."""
        own = own_accuracy(self.method, self.model, self.common_test, private, message) if on_common_test else None
        return Evaluation(evaluate_client(self.method, self.model, client, private, message), own), private

    def validate(self, message: Message, client: Client, private: Private) -> tuple[dict[str, Any], Private]:
        """Return the record of a client's validation samples with the final model, see `validate_client`."""
        return validate_client(self.method, self.model, client, private, message), private
