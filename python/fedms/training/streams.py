"""`Stream`: a configuration in which the model runs, and its cost."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.tensors import digest_of
from fedms.training.constants import kept_ahead, pass_start
from fedms.training.flop_meter import Key
from fedms_ext import ConstantPrefix, ExpertLinear, PairState, Ragged, gated, prefix_hash
from fedms_ext.budget import BlockCost

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel

# Layers, and the gate (B, E) or (B, T, E) by which they weight their experts; see `fedms_ext.gated`.
Mixing = tuple[Sequence[ExpertLinear], Tensor]


class Batch(NamedTuple):
    """What a pass through the model reads of a batch of B samples with U units: tensors on the device.

    Attributes:
        inputs: Keyword arguments of the foundation model's forward method.
        hidden: (B, T, ..., D) output of the constant prefix, padded with zeros; None where a pass starts from the inputs.
        places: (U,) int64 numbers of the positions that predict the units, among all B * T positions; None if a sample is a unit.
    """

    inputs: dict[str, Tensor]
    hidden: Tensor | None
    places: Tensor | None


@dataclass(frozen=True)
class Stream:
    """A configuration in which the model runs: which pairs are applied, and how many blocks are constant.

    Attributes:
        name: An expert; "mixture" (the global expert frozen, and the local one where it is trained); "streams" (each expert
            as it was loaded, for segments of rows); or None (the foundation model alone).
        costs: Cost of each block.
        untrained: Number of blocks below the first trained pair.
        prefix_depth: Number of blocks in the constant prefix, which are not run again.
    """

    model: ExpertModel
    name: str | None
    costs: Sequence[BlockCost]
    untrained: int
    prefix_depth: int

    @cached_property
    def prefix_hash(self) -> str:
        """Hash of everything but the sample that the output of the prefix depends on."""
        return self._hash(self.prefix_depth)

    def _hash(self, depth: int) -> str:
        """Return a hash of the pairs and corrections in the first `depth` blocks."""
        corrections = self.model.corrections.below(depth) if self.name is not None else ()
        return prefix_hash(self.model.foundation.module, depth) + digest_of(corrections)

    @property
    def keeps(self) -> bool:
        """Whether the output of the prefix is kept in the cache."""
        return self.prefix_depth > 0 and self.model.cache.max_bytes > 0

    @property
    def replays(self) -> bool:
        """Whether a pass starts from the output of the prefix. Without a cache it does so for token sequences alone, for which that
        output is computed again for each batch (see `ExpertModel.prefix_chunk`)."""
        return self.keeps or (self.prefix_depth > 0 and self.model.task.per_token)

    @cached_property
    def trains(self) -> bool:
        """Whether a pass with gradients has one for a pair."""
        return any(pair[name].requires_grad for layer in self.model.layers.values() for pair in (layer.lora_a, layer.lora_b)
                   for name, state in layer.states.items() if state is PairState.TRAINED)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What determines the kernels of a pass, beside the shapes of its batch."""
        return self.name, self.prefix_depth, self.replays, tuple(tuple(layer.states.values()) for layer in self.model.layers.values())

    def features(self, part: Subset, rows: Tensor) -> Tensor:
        """Return the features (U, D) of the rows (B,) of a subset."""
        return self.features_of(self.read(part, rows))

    def read(self, part: Subset, rows: Tensor, hidden: Tensor | None = None) -> Batch:
        """Read the batch of the rows (B,) of a subset, and count the operations of a pass through it.

        Args:
            hidden: Output of the prefix, if it is known already.
        """
        indices = part.indices[rows]
        batch = self.batch(indices, self.hidden(part, rows) if hidden is None else hidden)
        self.charge(indices, torch.is_grad_enabled() and self.trains)
        return batch

    def batch(self, indices: Tensor, hidden: Tensor | None) -> Batch:
        """Return the batch of samples (B,), of which the output of the prefix is known or not needed."""
        model, places = self.model, None
        if model.task.per_token:
            width = int(model.dataset.inputs.lengths[indices].max())
            places = model.dataset.at_units(indices, width).flatten().nonzero().squeeze(1).to(model.device)
        return Batch(model.inputs(indices), hidden, places)

    def features_of(self, batch: Batch, mixing: Mixing | None = None) -> Tensor:
        """Compute the features (U, D) float32 of a batch.

        Args:
            batch: The batch.
            mixing: Layers that mix their experts, and the gate; None for none.
        """
        model = self.model
        if model.config.lora.dropout:       # on where something is trained; the foundation model's own never is
            for layer in model.layers.values():
                layer.train(torch.is_grad_enabled())
        prefix = ConstantPrefix(model.foundation.module, self.prefix_depth)
        with (nullcontext() if batch.hidden is None else prefix.replay(batch.hidden), model.precision(),
              nullcontext() if mixing is None else gated(*mixing)):
            features = model.foundation.features(batch.inputs).float()
        return features if batch.places is None else features.flatten(0, 1)[batch.places]

    def hidden(self, part: Subset, rows: Tensor) -> Tensor | None:
        """Return the output (B, T, ..., D) of the prefix for the rows (B,) of a subset, padded with zeros; None if a pass starts from
        the inputs."""
        if not self.replays:
            return None
        if not self.keeps:
            part, rows = Subset(part.indices[rows]), torch.arange(len(rows))
            self.charge_prefix(part.indices)
        prefix = self.prefix(part) if self.keeps else self._outputs(part, 0, self.prefix_depth)[self.prefix_depth]
        return prefix.pad(rows).to(self.model.device)

    def charge_prefix(self, indices: Tensor) -> None:
        """Count the operations of the prefix for samples (B,), where it is computed again for each batch."""
        if self.replays and not self.keeps:
            self.model.meter.add(self._prefix_flops(Subset(indices)))

    def charge(self, indices: Tensor, trains: bool) -> None:
        """Count the operations of a pass through the blocks and the head for samples (B,), and of the pass back if it trains."""
        model, start = self.model, self.prefix_depth if self.replays else 0
        length = int(model.dataset.inputs.lengths[indices].max())
        model.meter.add(self.forward_flops(len(indices), length, first=start))
        if trains:
            model.meter.add(sum(cost.backward(len(indices) * length, length) for cost in self.costs[self.untrained:]))
        model.meter.add(model.task.head_flops(int(model.dataset.units(indices).sum()), trains))

    def prefix(self, part: Subset) -> Ragged:
        """Return the output of the constant prefix for every sample of a subset, each (T_i, D), from the cache if it is there.

        Where it is computed, outputs behind fewer blocks are kept with it, see `kept_ahead`."""
        return self._behind(part, self.prefix_depth)

    def _behind(self, part: Subset, depth: int) -> Ragged:
        """Return `prefix` for the first `depth` blocks, which belong to the prefix."""
        model = self.model
        start = pass_start(model, part.indices, depth)
        # The foundation model alone keeps nothing ahead: only by chance would its outputs serve the experts.
        every = () if self.name is None else kept_ahead(model, part.indices, self.prefix_depth)
        ahead = [number for number in every if start < number < depth]
        further: dict[int, Ragged] = {}

        def compute() -> Ragged:
            further.update(self._outputs(part, start, depth, ahead))
            return further.pop(depth)

        def flops() -> int:
            if start:
                self._behind(part, start)       # counted on its own
            return self.chunk_flops(part, model.prefix_chunk, first=start, last=depth)

        outputs = model.constant(self._key(part, depth), compute, flops, lambda: [self._key(part, number) for number in ahead])
        for number, later in further.items():
            model.cache.offer(self._key(part, number), later)
        return outputs

    def _key(self, part: Subset, depth: int) -> Key:
        """Return the key of the outputs of the first `depth` blocks."""
        return part.key, "prefix", depth, self.prefix_hash if depth == self.prefix_depth else self._hash(depth)

    def _outputs(self, part: Subset, start: int, depth: int, ahead: Iterable[int] = ()) -> dict[int, Ragged]:
        """Compute the outputs of the first `depth` blocks from those of the first `start`, and on the way those of the first `ahead`;
        by number of blocks."""
        model, module = self.model, self.model.foundation.module
        before = self._behind(part, start) if start else None
        lengths = model.dataset.inputs.lengths[part.indices]
        outputs: dict[int, Ragged] = {}

        def put(number: int, rows: Tensor, hidden: Tensor) -> None:
            hidden = hidden.float()
            if number not in outputs:
                outputs[number] = Ragged.empty(lengths, hidden[0], model.config.sal.cache_dtype)
            for row, output in zip(rows.tolist(), hidden):
                outputs[number].put(row, output[:lengths[row]])

        for rows in model.chunks(part, model.prefix_chunk):
            inputs = model.inputs(part.indices[rows])
            see = {number: partial(put, number, rows) for number in ahead}
            replayed = nullcontext() if before is None else ConstantPrefix(module, start).replay(before.pad(rows).to(model.device))
            with replayed, model.precision():
                put(depth, rows, ConstantPrefix(module, depth).capture(lambda: model.foundation.features(inputs), see))
        return outputs

    def _prefix_flops(self, part: Subset) -> int:
        return self.chunk_flops(part, self.model.prefix_chunk, last=self.prefix_depth)

    def prefix_at_units(self, part: Subset) -> Tensor:
        """Return the output of the constant prefix at each position that predicts a token, or its mean over a sample, (U,
        D)."""
        model = self.model

        def compute() -> Tensor:
            prefix = self.prefix(part)
            if not model.task.per_token:
                return torch.stack([prefix.row(i).mean(0) for i in range(len(prefix))])
            firsts = (model.dataset.answers[part.indices] - 1).tolist()
            return torch.cat([prefix.row(i)[first:-1] for i, first in enumerate(firsts)])

        def flops() -> int:
            self.prefix(part)       # counted on its own
            return 0
        return model.constant((part.key, "prefix features", self.prefix_depth, self.prefix_hash), compute, flops)

    def forward_flops(self, samples: int, length: int, first: int = 0, last: int | None = None) -> int:
        """Return `budget.forward_flops` without visiting the layers again for every batch."""
        return sum(cost.forward(samples * length, length) for cost in self.costs[first:last])

    def chunk_flops(self, part: Subset, size: int, **blocks: int) -> int:
        """Return the operations of running a whole subset in chunks of so many samples."""
        lengths = self.model.dataset.inputs.lengths[part.indices]
        return sum(self.forward_flops(len(rows), int(lengths[rows].max()), **blocks) for rows in self.model.chunks(part, size))

    def live_flops(self, part: Subset) -> int:
        """Return the operations of running a whole subset, without a cached prefix."""
        if self.keeps and len(part):
            self.prefix(part)       # charged on its own
        again = self._prefix_flops(part) if self.replays and not self.keeps else 0
        head = self.model.task.head_flops(int(self.model.dataset.units(part.indices).sum()), False)
        return self.chunk_flops(part, self.model.CHUNK, first=self.prefix_depth if self.replays else 0) + again + head
