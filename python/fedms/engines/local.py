"""The embedded engine: the server and all clients on this machine.

This process visits the clients one after the other on its resident model, or worker processes visit them in parallel.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedms.data.subset import Subset
from fedms.engines.arrivals import Simulated
from fedms.engines.base import Arrival, Engine, Evaluation
from fedms.engines.buffered import Courier
from fedms.engines.visitor import Errand, Visitor, Visits
from fedms.federated.client import Client, Message, Participant, Private, Share
from fedms.federated.method import Method
from fedms.federated.packing import Packed, pack_share, unpack_reply, unpack_share
from fedms.federated.server import Server
from fedms.progress import Progress
from fedms.storage.run_folder import RunFolder
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel

if TYPE_CHECKING:
    from fedms.privacy.secure_round import Held, Question
    from fedms.privacy.secure_sum import Member


class LocalEngine(Engine):
    """The engine whose clients are on this machine.

    Args:
        method: The method.
        server: The server.
        model: The resident model, on which clients are visited.
        clients: The participating clients; client i has id i.
        common_test: The common test set.
        folder, progress, stop: See `Engine`.
        workers: Worker processes that visit the clients, or None if this process does.
    """

    def __init__(self, method: Method, server: Server, model: ExpertModel, clients: Sequence[Client],
                 common_test: Subset, folder: RunFolder, progress: Progress,
                 stop: Callable[[], bool] = lambda: False, workers: Visits | None = None) -> None:
        super().__init__(server, model.fm_params, folder, progress, stop)
        self.clients = clients
        self.visitor: Visits = Visitor(method, server, model, clients, common_test) if workers is None else workers
        self.states: dict[int, Private] = {}        # of clients with a visit that counted
        self.held: dict[int, Held] = {}             # by client, while a secure sum is under way
        self.between_groups = True                  # no client that was visited together with others is still to be taken

    def prepare(self, message: Message) -> Mapping[int, Participant]:
        return {client: self.clients[client] for client in message.clients}

    def visits(self, message: Message, packed: Packed, clients: Sequence[int]) -> Iterator[Arrival]:
        arrivals = (self._replies if self.private_rounds is None else self._shares)(message, packed, clients)
        for number, arrival in enumerate(arrivals, start=1):
            self.between_groups = number % self.server.config.run.lockstep == 0 or number == len(clients)
            yield arrival

    def _replies(self, message: Message, packed: Packed, clients: Sequence[int]) -> Iterator[Arrival]:
        for client, ((came, answer), after) in zip(clients, self.visitor.each("visit", message, clients, self._state)):
            bytes_down = self._received(client, packed)
            if answer is not None:
                came = replace(came, reply=unpack_reply(answer))
            yield Arrival(client, came, 0 if answer is None else answer.size, bytes_down, after=after)

    def _shares(self, message: Message, packed: Packed, clients: Sequence[int]) -> Iterator[Arrival]:
        """Yield the shares of clients in a run with privacy. What they hold until the sum is over is kept in `held`."""
        from fedms.federated.private_client import join

        for client, (vector, after) in zip(clients, self.visitor.each("contribute", message, clients, self._state)):
            bytes_down = self._received(client, packed)
            if self.private_server.settings.masks:
                share, self.held[client] = join(self.private_server, self._member(client), message, vector)
            else:
                share = Share(client, vector)
            answer = pack_share(share)
            share = unpack_share(answer, len(vector), self.private_server.settings.masks)
            yield Arrival(client, None, answer.size, bytes_down, after=after, share=share)

    def check_stop(self, message: Message) -> None:
        """Raise Interrupted if the run was asked to stop; not in the middle of clients that were visited together, as the others
        would be visited without them when the run goes on."""
        if self.between_groups:
            super().check_stop(message)

    def courier(self) -> Courier:
        return Simulated(self, self.server.config)

    def participant(self, client: int) -> Participant:
        return self.clients[client]

    def _received(self, client: int, packed: Packed) -> int:
        """Note that a client has received a message, and return the bytes that it had to be sent."""
        size = self.due_to(client, packed).size
        self.note_received(client, packed)
        return size

    def exchange(self, message: Message, attempt: int,
                 questions: Mapping[int, Question]) -> Mapping[int, Mapping[str, bytes]]:
        from fedms.federated.private_client import answer

        answers, terms = {}, self.private_server.terms(message, attempt)        # all clients compute the same terms
        for client, question in questions.items():
            self.check_stop(message)
            answers[client] = answer(question, terms, self._member(client), self.held[client])
        return answers

    def _member(self, client: int) -> Member:
        from fedms.federated.private_client import member_of_run

        return member_of_run(self.private_server.key, client, self.private_server.config.clients.count)

    def keep(self, arrival: Arrival) -> None:
        self.states[arrival.client] = arrival.after

    def evaluate(self, final: Message, on_common_test: bool) -> Iterator[Evaluation]:
        yield from self._of_all("evaluate", final, on_common_test=on_common_test)

    def validate(self, final: Message) -> list[dict[str, Any]]:
        """Return the record of each client's validation samples with the final model, see `validate_client`.

        Raises:
            Interrupted: If the run was asked to stop.
        """
        return list(self._of_all("validate", final))

    def _of_all(self, errand: Errand, final: Message, **further: Any) -> Iterator[Any]:
        """Yield what an errand returns for each client, in ascending order of their ids."""
        ids = [client.id for client in self.clients]
        results = self.visitor.each(errand, final, ids, self._state, **further)
        for _ in ids:
            self.check_stop(final)
            yield next(results)[0]

    def _state(self, client: int) -> Private:
        return self.states.get(client, Private())

    def own_state(self) -> dict[str, Any]:
        return {"charged": sorted(self.visitor.paid)}

    def private(self) -> Mapping[int, Tensors]:
        return {client: private.tensors for client, private in self.states.items() if private.tensors}

    def restore_own(self, state: Mapping[str, Any], private: Mapping[int, Tensors]) -> None:
        self.visitor.paid = set(state["charged"])
        self.states |= {client: Private(tensors) for client, tensors in private.items()}
