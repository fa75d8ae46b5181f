"""The model of a process, with two experts and a gate, and the data set that it reads.

There is one model for all clients: a client's small tensors are copied into it for each visit. The model holds the experts
`global` and `local`, each with a head, and the gate adapter. It runs one *stream* at a time. Values that are constant for a
sample (the output of the prefix, the opinion of a frozen expert, the features of the frozen model) are computed once and
cached. The model is on one device; tensors that are read from it are copied to the CPU.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fedms.config import RunConfig
from fedms.data import Dataset
from fedms.data.inputs import ImageInputs
from fedms.data.subset import Subset
from fedms.errors import ConfigError, blamed_on
from fedms.models import FoundationModel
from fedms.seeds import generator
from fedms.tasks import Task
from fedms.tasks.base import shifted
from fedms.tensors import Tensors, digest_of, freeze_none
from fedms.training.constants import new_cache
from fedms.training.corrections import Corrections
from fedms.training.device import ACTIVATIONS
from fedms.training.flop_meter import Constant, FlopMeter, Key
from fedms.training.frozen import hold_in_16_bits, quantize_frozen
from fedms.training.graphs import StepGraphs
from fedms.training.imported import imported_tensors
from fedms.training.kept_opinions import KeptOpinions
from fedms.training.streams import Batch, Stream
from fedms.training.tasks import task_of
from fedms_ext import (ConstantCache, GateAdapter, LoRA, activate, activation_order, attach, budget, deactivate, expert_layers,
                       prefix_depth, reset_expert)
from fedms_ext.sparse.activation import blocks_of

EXPERTS = ("global", "local")


class ExpertModel:
    """A frozen foundation model with two experts, two heads and a gate, bound to one data set.

    Args:
        foundation: The frozen model. Experts are attached to it in place, and it is moved to the device.
        dataset: The data set into which `Subset`s index. It stays on the CPU.
        config: The run file. Its tables [task], [model], [lora], [sal] and [gate] are used, and `[run] dtype`.
        task: The task; the default is that of the run file.
        device: Device of the model, its experts, heads and gate, and of cached values.

    Raises:
        ConfigError: If the targets match no layer, the order does not match the model's blocks, samples to be augmented are
            not images, or the model or the data do not suit the task.
    """

    # Samples are sorted by length and run in chunks of this size, always the same ones: padding is then the same at
    # every rebuild, and so are the bits.
    CHUNK = 64

    def __init__(self, foundation: FoundationModel, dataset: Dataset, config: RunConfig, *, task: Task | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.foundation, self.dataset, self.config, self.device = foundation, dataset, config, torch.device(device)
        if config.data.augment and not isinstance(dataset.inputs, ImageInputs):
            raise ConfigError(f"data.augment: got {list(config.data.augment)}, which is for images, and {dataset.name} holds "
                              "texts; leave it out")
        self.fm_params = foundation.parameter_count
        lora = LoRA(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.rslora)
        with blamed_on("model.targets"):
            attach(foundation.module, config.model.targets, {name: lora for name in EXPERTS}, blocks=foundation.blocks)
        quantize_frozen(foundation.module, config, self.device, config.model.frozen)
        self.layers = expert_layers(foundation.module)
        self.blocks = len(blocks_of(foundation.module))
        self.block_of = {f"expert/{name}.lora_{x}": layer.block for name, layer in self.layers.items() for x in "ab"}
        with blamed_on("sal.order"):
            self.order = activation_order(self.blocks, config.sal.order)
        self.task = task_of(foundation, dataset, config, self.device) if task is None else task
        hold_in_16_bits(foundation.module, config)      # after the task, which may embed class prompts in float32
        foundation.to(self.device)
        self.heads = nn.ModuleDict({name: self.task.new_head() for name in EXPERTS}).to(self.device)
        self.gate = self._new_gate()
        self.imported = {} if config.lora.start is None else imported_tensors(self, Path(config.lora.start))
        self.cache = new_cache(self)
        self.meter, self.graphs, self.corrections = FlopMeter(), StepGraphs(self), Corrections(self.layers)
        self.depths = {name: (0, 0) for name in EXPERTS}    # (trained, applied) depth of each expert
        self.shifts = self._no_shifts()                     # added to each expert's opinion, (K,)
        self.kept: dict[str, Callable[[str], bool]] = dict.fromkeys(EXPERTS, freeze_none)     # what training leaves as it is
        self.boundary = self.untrained_below(config.sal.depth)
        self.ahead: Sequence[int] | None = None             # see `clear`
        self.kept_opinions = KeptOpinions(outlast=False)    # until `start`
        self._streams: dict[str, Stream] = {}               # of what is loaded now
        self._open: Stream | None = None                    # the stream that the pairs are set for
        self._live: Stream | None = None                    # the one whose context is open

    def _new_gate(self, side: int = 0) -> GateAdapter:
        gate = self.config.gate
        width = self.foundation.feature_dim if gate.features == "final" else self.foundation.width
        return GateAdapter(width, len(EXPERTS), gate.bottleneck, gate.temperature, side).to(self.device)

    # Tensors in and out

    def initial(self, seed: int) -> Tensors:
        """Return the tensors of a newly initialized global expert, its head and the gate, drawn from the run's seed."""
        reset_expert(self.foundation.module, "global", generator(seed, "init", "expert"))
        head = self.task.new_head()
        self.task.reset_head(head, generator(seed, "init", "head"))
        self.heads["global"].load_state_dict(head.state_dict())
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):     # by default those of all GPUs
            torch.manual_seed(generator(seed, "init", "gate").initial_seed())
            self.load_gate({f"gate/{name}": t for name, t in self._new_gate().state_dict().items()})
        self._forget_streams()
        return {**self.read("global"), **self.read_gate(), **self.imported}

    def start(self) -> None:
        """Reset the counters, and forget all opinions, at the start of a run."""
        self.meter.restart()
        self.corrections.replace({})
        self.forget_opinions()
        self.clear()

    def clear(self, ahead: Sequence[int] | None = None) -> None:
        """Forget the loaded experts and their opinions. Called at the start of every visit.

        Args:
            ahead: Depths that later visits may train at. The cache keeps outputs for them, too; None for this visit's alone.
        """
        self.ahead, self.kept_opinions.visit = ahead, {}
        self.depths = {name: (0, 0) for name in EXPERTS}
        self.shifts = self._no_shifts()
        self._forget_streams()

    def _no_shifts(self) -> dict[str, Tensor | None]:
        return {name: torch.zeros(self.task.columns, device=self.device) if self.task.shifts else None for name in EXPERTS}

    def load(self, expert: str, tensors: Mapping[str, Tensor], *, depth: int, applied_depth: int,
             keep: Callable[[str], bool] = freeze_none) -> None:
        """Copy an expert into the model: its pairs, its head, and corrections of the frozen weights that belong to it.

        The first `depth` blocks of the order are trained, and those up to `applied_depth` are applied; pairs in other blocks
        are off. Tensors whose names `keep` accepts are not trained.

        Raises:
            KeyError: If a tensor of an applied pair or of the head is missing.
        """
        self.depths[expert], self.kept[expert] = (depth, applied_depth), keep
        self.boundary = self.untrained_below(max(trained for trained, _ in self.depths.values()))
        self._forget_streams()
        with torch.no_grad():
            targets = self.applied(expert)
            if targets:     # a language model has no head, and at depth 0 no pair is applied
                torch._foreach_copy_(list(targets.values()), [tensors[name] for name in targets])
            self.corrections.replace({name: t for name, t in tensors.items() if name.startswith("correction/")})

    def untrained_below(self, depth: int) -> int:
        """Return the number of blocks below the lowest block that is trained at a depth; all blocks at depth 0."""
        return min(self.order[:depth], default=self.blocks + 1) - 1

    def read(self, expert: str) -> Tensors:
        """Return copies of all pairs of an expert and of its head."""
        return _copies(self._targets(expert, range(1, self.blocks + 1)))

    def load_gate(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a gate into the model. Its tensors show whether it has further inputs."""
        side = tensors["gate/side.weight"].shape[1] if "gate/side.weight" in tensors else 0
        if side != self.gate.side_inputs:
            self.gate = self._new_gate(side)
        self.gate.load_state_dict({name.removeprefix("gate/"): t for name, t in tensors.items()
                                   if name.startswith("gate/")})

    def read_gate(self) -> Tensors:
        return _copies({f"gate/{name}": t for name, t in self.gate.state_dict().items()})

    def _targets(self, expert: str, blocks: Collection[int]) -> dict[str, nn.Parameter]:
        pairs = {f"expert/{layer}.{name}": pair[expert] for layer, m in self.layers.items() if m.block in blocks
                 for name, pair in (("lora_a", m.lora_a), ("lora_b", m.lora_b))}
        return {**pairs, **{f"head/{name}": p for name, p in self.heads[expert].named_parameters()}}

    def trainable(self, expert: str) -> dict[str, nn.Parameter]:
        """Return the parameters that training an expert changes, by name: its trained pairs, and its head if it is trained."""
        with self.stream(expert):
            blocks = self.order[:self.depths[expert][0]]
            return {name: p for name, p in self._targets(expert, blocks).items() if p.requires_grad}

    def _freeze_kept(self, expert: str) -> None:
        """Set which parameters of the head, and of pairs in active blocks, are not trained."""
        head = self.config.model.head == "linear" or self.config.model.learn_temperature
        for name, p in self._targets(expert, self.order[:self.depths[expert][0]]).items():
            if name.startswith("head/") or self.kept[expert](name):
                p.requires_grad_(head and not self.kept[expert](name))
                p.grad = None

    def applied(self, expert: str) -> dict[str, nn.Parameter]:
        """Return the parameters of the applied pairs of an expert and of its head, by name."""
        return self._targets(expert, self.order[:self.depths[expert][1]])

    def read_applied(self, expert: str) -> Tensors:
        """Return copies of `applied`."""
        return _copies(self.applied(expert))

    def read_trained(self, expert: str) -> Tensors:
        """Return copies of `trainable`."""
        return _copies(self.trainable(expert))

    # Samples

    def augmented_batches(self, part: Subset, rows: Tensor) -> AbstractContextManager[Subset]:
        """Replace the data set by augmented copies (`[data] augment`) of the rows (B,) of a subset, within the context, and
        yield the subset of all copies; see `reading`."""
        indices, images = part.indices[rows], cast(ImageInputs, self.dataset.inputs)
        return self.reading(replace(self.dataset, inputs=images.augmented(indices, self.config.data.augment),
                                    labels=self.dataset.labels[indices]))

    @contextmanager
    def reading(self, dataset: Dataset) -> Iterator[Subset]:
        """Read another data set within the context, and yield the subset of all its samples. Their cached values are dropped at the
        end."""
        meter = self.meter
        kept = self.dataset, self.cache, meter.paid, meter.asked, self.kept_opinions, self.ahead
        self.dataset, self.cache, meter.paid, meter.asked = dataset, ConstantCache(self.cache.max_bytes), set(), set()
        self.ahead = None
        self.forget_opinions()
        try:
            yield Subset(torch.arange(len(dataset)))
        finally:
            self.dataset, self.cache, meter.paid, meter.asked, self.kept_opinions, self.ahead = kept

    def targets(self, part: Subset, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the targets (U, ...) of the rows of a subset."""
        return self.dataset.targets(part.indices[rows]).to(self.device)

    def units(self, part: Subset, rows: Tensor) -> Tensor:
        """Return the positions (U,) int64 of the units of the rows (B,) among all units of a subset, row by row."""
        if not self.task.per_token:
            return rows
        counts = self.dataset.units(part.indices)
        ends, own = counts.cumsum(0)[rows], counts[rows]
        return torch.repeat_interleave(ends - own.cumsum(0), own) + torch.arange(int(own.sum()))

    def count_units(self, part: Subset, rows: Tensor) -> int:
        """Return the number of units in the rows (B,) of a subset."""
        return int(self.dataset.units(part.indices[rows]).sum()) if self.task.per_token else len(rows)

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the keyword arguments of the foundation model's forward method for samples (B,)."""
        return {name: tensor.to(self.device) for name, tensor in self.dataset.inputs.batch(indices).items()}

    @property
    def prefix_chunk(self) -> int:
        """Number of samples for which one pass computes the constant prefix. Token sequences go one by one, without padding: the
        bits are then the same whether the output is kept or computed again for each batch."""
        return 1 if self.task.per_token else self.CHUNK

    def chunks(self, part: Subset, size: int = CHUNK) -> Sequence[Tensor]:
        """Return the rows of a subset in chunks of so many samples with similar length."""
        if len(part) == 0:
            return ()
        return torch.argsort(self.dataset.inputs.lengths[part.indices], stable=True).split(size)

    # Streams

    def precision(self) -> AbstractContextManager[object]:
        """Compute activations in `[run] dtype`, within the context; experts, sums and norms stay in float32."""
        dtype = self.config.run.dtype
        return nullcontext() if dtype == "fp32" else torch.autocast(self.device.type, ACTIVATIONS[dtype])

    @contextmanager
    def stream(self, name: str | None) -> Iterator[Stream]:
        """Set all pairs for a stream (see `Stream.name`), within the context, and afterwards for the outer stream again."""
        around = self._live
        self._live = self._opened(name)
        try:
            yield self._live
        finally:
            self._live = around
            if around is not None and self._open is not around:
                self._live = self._opened(around.name)

    def _forget_streams(self) -> None:
        self._streams, self._open = {}, None

    def _opened(self, name: str | None) -> Stream:
        if self._open is not None and self._open.name == name is not None:
            return self._open
        module, order = self.foundation.module, self.config.sal.order
        for expert in EXPERTS:
            trained, applied = self.depths[expert]
            if name in (expert, "streams"):
                activate(module, expert, depth=trained, applied_depth=applied, order=order)
            elif name == "mixture":
                activate(module, expert, depth=0 if expert == "global" else trained, order=order,
                         applied_depth=applied if expert == "global" else trained)
            else:
                deactivate(module, expert)
            if name == expert:
                self._freeze_kept(expert)
        self.corrections.show(name is not None)     # the foundation model alone has none
        self._open = self._streams.get(name) if name is not None else None
        if self._open is None:
            untrained = prefix_depth(module)
            self._open = Stream(self, name, budget.block_costs(module), untrained, min(untrained, self.boundary))
            if name is not None:
                self._streams[name] = self._open
        return self._open

    def opinion(self, expert: str, part: Subset, rows: Tensor) -> Tensor:
        """Return the opinion (U, K) of an expert for the rows (B,) of a subset, differentiable by its trained parameters."""
        with self.stream(expert) as stream:
            return self.opinion_of(expert, stream.read(part, rows), self.targets(part, rows), self.shifts[expert])

    def opinion_of(self, expert: str, batch: Batch, targets: Tensor, shift: Tensor | None) -> Tensor:
        """Compute `opinion` of a batch with targets (U, ...) and what is added to the opinion (K,)."""
        with self.stream(expert) as stream:
            return shifted(self.task.opinion(self.heads[expert], stream.features_of(batch), targets), shift)

    @torch.no_grad()
    def opinions(self, expert: str, part: Subset) -> Tensor:
        """Return the opinion (U, K) of an expert for a whole subset. It is kept until the expert changes; see `KeptOpinions`."""
        kept, what = self.kept_opinions, (part.key, self._digest(expert))
        if (expert, *what) not in kept.visit:
            with self.stream(expert) as stream:
                key = (*what, stream.prefix_depth)
                opinion = kept.find(key)
                if opinion is None:
                    opinion = self.in_chunks(part, lambda rows: self.opinion(expert, part, rows), self.task.columns)
                    kept.keep(key, opinion)
                else:
                    self.meter.add(stream.live_flops(part))
            kept.visit[(expert, *what)] = opinion
        return kept.visit[(expert, *what)]

    def forget_opinions(self) -> None:
        """Drop all opinions that are kept."""
        self.kept_opinions = KeptOpinions(outlast=self.cache.max_bytes > 0)

    def frozen_opinions(self, expert: str, part: Subset) -> Tensor:
        """Return `opinions` of an expert that does not change; cached by a hash of its tensors."""
        def flops() -> int:
            with self.stream(expert) as stream:
                return stream.live_flops(part)
        return self.constant((part.key, "logits", self._digest(expert)), lambda: self.opinions(expert, part), flops)

    def _digest(self, expert: str) -> str:
        """Return a hash of the applied tensors of an expert."""
        shift = self.shifts[expert]
        return digest_of((*self.read_applied(expert).values(), *self.corrections.tensors.values(),
                          *(() if shift is None else (shift,))))

    def features(self, part: Subset) -> Tensor:
        """Return the features (U, D) of the foundation model without experts, which never change."""
        def compute() -> Tensor:
            with torch.no_grad(), self.stream(None) as stream:
                return self.in_chunks(part, lambda rows: stream.features(part, rows), self.foundation.feature_dim)

        def flops() -> int:
            with self.stream(None) as stream:
                return stream.live_flops(part)
        return self.constant((part.key, "features"), compute, flops)

    def gate_features(self, part: Subset) -> Tensor:
        """Return the features (U, D) that the gate gets, as `[gate] features` says."""
        if self.config.gate.features == "final" or len(part) == 0:
            return self.features(part)
        with self.stream("local" if self.config.gate.mixing == "outputs" else "mixture") as stream:
            return stream.prefix_at_units(part)

    @torch.no_grad()
    def zero_shot(self, part: Subset) -> Tensor | None:
        """Return the opinion (U, K) of the untrained foundation model, or None if it has none."""
        return self.task.zero_shot(self.features(part), self.targets(part))

    def constant(self, key: Key, compute: Callable[[], Constant], flops: Callable[[], int],
                 with_it: Callable[[], Iterable[Key]] = tuple) -> Constant:
        """Return a value that depends only on its key; see `FlopMeter.constant`. Tensors are on the device; rows of different
        lengths stay on the CPU, and each batch is moved when it is used."""
        value = self.meter.constant(self.cache, key, compute, flops, with_it)
        return value.to(self.device) if isinstance(value, Tensor) else value

    def in_chunks(self, part: Subset, compute: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """Apply `compute` to the rows of each chunk of a subset and return the results as one tensor (U, width)."""
        out = torch.empty(self.count_units(part, torch.arange(len(part))), width, device=self.device)
        for rows in self.chunks(part):
            out[self.units(part, rows)] = compute(rows)
        return out


def _copies(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return copies of tensors on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
