"""The server's state in a checkpoint: as plain data and tensors, and back."""
from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict     # pydantic asks for it below Python 3.12

from fedms.errors import CheckpointError
from fedms.federated.schedule import SalState
from fedms.federated.server import ServerState
from fedms.foreign import conform
from fedms.tensors import Tensors, prefixed, under

_Count = Annotated[int, Field(ge=0)]


class Round(Protocol):
    """What a round has collected so far."""

    def plain(self) -> dict[str, Any]: ...

    def tensors(self) -> Tensors: ...


def pack_server(state: ServerState, collected: Round) -> tuple[dict[str, Any], Tensors]:
    """Return the server's state, and what a round has collected so far, as plain data and tensors by name."""
    plain = {"stage": state.stage, "round": state.round, "applied_depth": state.applied_depth,
             "final_depth": dict(state.final_depth), "counted": sorted(state.counted), "collected": collected.plain(),
             "sal": {"depth": state.sal.depth, "rounds": state.sal.rounds, "queue": list(state.sal.queue)}}
    tensors = {**prefixed("tensors/", state.tensors), **prefixed("sums/", state.statistics),
               **prefixed("collected/", collected.tensors())}
    return plain, tensors


_Sal = TypedDict("_Sal", {"depth": _Count, "rounds": _Count, "queue": list[float]})
_ServerState = TypedDict("_ServerState", {
    "stage": Literal["stage1", "stage2", "done"], "round": _Count, "applied_depth": _Count,
    "final_depth": dict[str, _Count], "counted": NotRequired[list[_Count]], "collected": dict[str, Any], "sal": _Sal})
_SERVER_STATE = TypeAdapter(_ServerState)


def unpack_server(plain: Any, tensors: Tensors) -> tuple[ServerState, Tensors]:
    """Return the state, and the tensors of the round under way: with `plain["collected"]` what `Server.restore` takes.

    Raises:
        CheckpointError: If the data are not of its form.
    """
    try:
        conform(_SERVER_STATE, plain)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint's state of the server is not what a run writes: {type(error).__name__}: "
                              f"{error}; start the run again") from None
    sal = plain["sal"]
    state = ServerState(plain["stage"], plain["round"], under("tensors/", tensors),
                        SalState(sal["depth"], sal["rounds"], tuple(sal["queue"])), plain["applied_depth"],
                        under("sums/", tensors), plain["final_depth"], frozenset(plain.get("counted", ())))
    return state, under("collected/", tensors)
