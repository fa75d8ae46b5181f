"""Visits that several runs of a comparison have in common, each made by one of them.

Many methods begin with federated averaging, and their visits begin with its visit: the same training, of the same tensors, on the
same samples, from the same random draws. The run that comes to such a visit first makes it and stores the reply with what it has
cost; the others read that, and record the same numbers. What is shared is known by its inputs alone, never by the names of methods:
a visit of which any setting, tensor or sample differs is another one.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict     # pydantic asks for it below Python 3.12

from fedms.config import RunConfig, registry
from fedms.federated import encoding, schema
from fedms.federated.client import Client, Message, Private, Reply
from fedms.federated.lockstep import Visiting
from fedms.foreign import conform, parse_json
from fedms.tensors import Tensors, digest_of
from fedms.training.constants import origin
from fedms.training.device import peak
from fedms.training.expert_model import ExpertModel
from fedms.training.flop_meter import Elsewhere, FlopMeter
from fedms_ext import DiskCache

MOST_BYTES = 4 * 1024**3        # that the visits of a comparison take on disk; those read longest ago are dropped first

_Names = list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]
_Amount = Annotated[int, Field(ge=0)]
_Costs = TypedDict("_Costs", {
    "flops": _Amount, "seconds": Annotated[float, Field(ge=0)], "peak_memory_bytes": _Amount,
    "paid": _Names,         # constants that the visit has paid for
    "found": _Names})       # constants that it used and that were paid for before
_COSTS = TypeAdapter(_Costs)


def can_share(config: RunConfig) -> bool:
    """Return whether runs can share visits: each client is visited by itself, keeps no optimizer state, and hides nothing."""
    return config.run.lockstep == 1 and config.clients.optimizer == "fresh" and config.privacy.mode == "off"


class SharedVisits:
    """The shared visits of one run.

    Args:
        folder: Where they are, of all runs. It is made at the first visit that can be shared.
        model: The model of this process.
        config: The run file.
    """

    def __init__(self, folder: Path, model: ExpertModel, config: RunConfig) -> None:
        self.folder, self.model, self.config = folder, model, config

    @cached_property
    def cache(self) -> DiskCache:
        """The visits as they are stored: a buffer of bytes each."""
        # All settings but those that no such visit reads. The stage's own are in the key of a visit.
        unread = {"gate", "privacy", "stage1", "stage2", *registry.settings_tables()}
        read = self.config.model_dump_json(exclude={**dict.fromkeys(unread, True), "run": {"method", "workers"}})
        return DiskCache(self.folder, MOST_BYTES, repr((origin(self.model), self.config.aggregation, read)))

    def visiting(self, visiting: Visiting, model: ExpertModel, client: Client, private: Private, message: Message, brought: Tensors,
                 load: Callable[[Mapping[str, Tensor]], None]) -> Visiting:
        """Return the same visit, which is taken from another run where one has made it.

        It is not shared if it leaves tensors at the client, and not taken if its operations would be others in this run, because
        other constants are paid for.

        Args:
            visiting: The visit.
            model, client, private, message: Its arguments, see `Method.visit`.
            brought: Tensors of the global expert at the client, see `shared_expert`.
            load: Loads the expert into the model, with the given tensors in the place of those that the client begins with.
        """
        began, meter = time.perf_counter(), model.meter
        key = _key(model, client, message, brought)
        with self.cache.alone(key):
            kept = self.cache.find(key)
            made = None if kept is None else _read(kept)
            if made is not None and _is_due(made[1], meter):
                reply, costs = made
                load(reply.tensors)
                meter.add(costs["flops"])
                meter.paid |= set(costs["paid"])
                meter.elsewhere = Elsewhere(costs["seconds"] - (time.perf_counter() - began), costs["peak_memory_bytes"])
                return reply, private
            started, flops, paid = time.perf_counter(), meter.flops, set(meter.paid)
            meter.elsewhere, meter.asked = Elsewhere(began - started), set()
            reply, after = yield from visiting
            if made is None and all(private.tensors.get(name) is tensor for name, tensor in after.tensors.items()):
                self.cache.keep(key, _written(reply, {
                    "flops": meter.flops - flops, "seconds": time.perf_counter() - started, "peak_memory_bytes": peak(model.device),
                    "paid": sorted(meter.paid - paid), "found": sorted(meter.asked & paid)}))
            return reply, after


def _key(model: ExpertModel, client: Client, message: Message, brought: Tensors) -> tuple[object, ...]:
    """Return all that a visit depends on beside the run file's tables in the cache's fingerprint."""
    samples, shift = (client.split.train, client.split.validation), model.shifts["global"]
    tensors = sorted(brought.items())
    return (client.id, [len(part) for part in samples], digest_of(samples), message.stage, message.round,
            getattr(client.config, message.stage).model_dump_json(), client.trained_depth(message), message.applied_depth,
            None if model.ahead is None else list(model.ahead), sorted(message.tensors),
            [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors],
            digest_of(tensor for _, tensor in tensors), None if shift is None else digest_of([shift]))


def _is_due(costs: _Costs, meter: FlopMeter) -> bool:
    """Return whether a visit with these costs would cost the same in this run: what it paid for is not paid yet, and what it found is
    there."""
    return meter.paid.isdisjoint(costs["paid"]) and meter.paid.issuperset(costs["found"])


def _written(reply: Reply, costs: _Costs) -> Tensor:
    """Return a visit as a buffer of bytes (uint8): the length of a JSON head in 8 bytes, the head, and the reply's tensors."""
    head = json.dumps({"costs": costs, "reply": {
        "client": reply.client, "n_train": reply.n_train, "n_validation": reply.n_validation, "score": reply.score,
        "metrics": reply.metrics}}).encode()
    data = len(head).to_bytes(8, "little") + head + encoding.pack(reply.tensors)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _read(kept: Any) -> tuple[Reply, _Costs] | None:
    """Return what `_written` wrote; None if it is anything else."""
    data = kept.numpy().tobytes()
    length = int.from_bytes(data[:8], "little")
    try:
        head = parse_json(data[8:8 + length])
        costs, told = conform(_COSTS, head["costs"]), schema.REPLY.read(head["reply"])
        tensors = encoding.unpack(data[8 + length:])
    except (ValueError, KeyError, TypeError, schema.SchemaError, encoding.WireError):
        return None
    return Reply(told["client"], tensors, told["n_train"], told["n_validation"], told["score"], told["metrics"]), costs
