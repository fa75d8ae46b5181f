"""`Stream`: a configuration in which the model runs, and its cost."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.tasks.base import shifted
from fedms.tensors import digest_of
from fedms.training.constants import kept_ahead, pass_start
from fedms.training.flop_meter import Key
from fedms_ext import ConstantPrefix, ExpertLinear, PairState, Ragged, gated, prefix_hash
from fedms_ext.budget import BlockCost

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel

# Layers, and the gate (B, E) or (B, T, E) by which they weight their experts; see `fedms_ext.gated`.
Mixing = tuple[Sequence[ExpertLinear], Tensor]


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

    def opinion(self, part: Subset, rows: Tensor) -> Tensor:
        """Return the opinion (U, K) of the expert for the rows (B,) of a subset, differentiable by its trained parameters."""
        model = self.model
        opinion = model.task.opinion(model.heads[self.name], self.features(part, rows), model.targets(part, rows))
        return shifted(opinion, model.shifts[self.name])

    def features(self, part: Subset, rows: Tensor, hidden: Tensor | None = None, mixing: Mixing | None = None) -> Tensor:
        """Return the features (U, D) of the rows (B,) of a subset, computed from the output `hidden` of the prefix if it is given; see
        the method `hidden`."""
        model = self.model
        indices = part.indices[rows]
        if model.config.lora.dropout:       # on where something is trained; the foundation model's own never is
            for layer in model.layers.values():
                layer.train(torch.is_grad_enabled())
        features = self.live(self.hidden(part, rows) if hidden is None else hidden, model.inputs(indices), mixing)
        self.charge(indices, features.requires_grad)
        if model.task.per_token:
            features = features[model.dataset.at_units(indices, features.shape[1]).to(features.device)]
        return features

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

    def live(self, hidden: Tensor | None, inputs: Mapping[str, Tensor], mixing: Mixing | None = None) -> Tensor:
        """Compute the features, (B, D) or per token (B, T, D) float32.

        Args:
            hidden: Output (B, T, D) of the prefix, from which to go on; None to start from the inputs.
            inputs: Inputs of the model by name.
            mixing: Layers that mix their experts, which the stream determines, and the gate; None for none.
        """
        model, names = self.model, tuple(inputs)
        layers, gate = mixing or ((), None)

        def live(hidden: Tensor | None, gate: Tensor | None, *values: Tensor) -> Tensor:
            replayed = nullcontext() if hidden is None else ConstantPrefix(model.foundation.module, self.prefix_depth).replay(hidden)
            with replayed, model.precision(), nullcontext() if gate is None else gated(layers, gate):
                return model.foundation.features(dict(zip(names, values))).float()

        return model.graphs.of(self, live)(hidden, gate, *inputs.values())

    @cached_property
    def states(self) -> tuple[tuple[PairState, ...], ...]:
        """The state of each pair of each layer."""
        return tuple(tuple(layer.states.values()) for layer in self.model.layers.values())

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
