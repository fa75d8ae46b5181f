"""The one resident model of a process, and the data that it reads.

A client is a set of small tensors that are copied into this model in place, never a model of its own. The model holds
two experts, `global` and `local`, each with a head, and the gate adapter; one *stream* (one expert) runs at a time.
Whatever is constant for a sample (the prefix's output, a frozen expert's logits, the frozen model's features) is
computed once and cached.

Tensors travel under these names: `expert/<layer>.lora_a`, `expert/<layer>.lora_b`, `head/<name>`, `gate/<name>`, and
with exact aggregation `correction/<layer>`.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fedms.config import ConfigError, RunConfig
from fedms.data import Dataset, made_cache_dir
from fedms.data.inputs import ImageInputs
from fedms.models import FoundationModel
from fedms.models.heads import LinearHead, TextHead
from fedms.models.peft_format import read_pairs, read_shape
from fedms.seeds import generator
from fedms_ext import (ConstantCache, ConstantPrefix, DiskCache, GateAdapter, LoRA, Ragged, activate, activation_order,
                       attach, budget, build_info, deactivate, expert_layers, gated, prefix_depth, prefix_hash, quantize,
                       reset_expert, segmented)
from fedms_ext.sparse.activation import blocks_of

EXPERTS = ("global", "local")
Tensors = dict[str, Tensor]
Constant = TypeVar("Constant", Tensor, Ragged)


@dataclass(frozen=True)
class Subset:
    """Some samples of a data set, such as one client's training part; `key` names their set in caches."""

    indices: Tensor                               # (n,) int64 sample indices

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.indices.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)


def is_a(name: str) -> bool:
    """Whether a tensor is the A of a pair."""
    return name.endswith(".lora_a")


def nothing(name: str) -> bool:
    """Accepts no name."""
    return False


class ResidentModel:
    """A frozen foundation model with two experts, two heads and a gate, bound to one data set.

    Args:
        foundation: the frozen model; experts are attached to it in place.
        dataset: what `Subset`s index into.
        config: the run file; the tables [model], [lora], [sal] and [gate] are read.

    Raises:
        ConfigError: if the targets match nothing, the order does not fit the model's blocks, or what is to be augmented
            is no image.
    """

    # Samples are sorted by length and run in chunks of this size, always the same ones: padding is then the same at
    # every rebuild, and so are the bits.
    CHUNK = 64

    def __init__(self, foundation: FoundationModel, dataset: Dataset, config: RunConfig) -> None:
        self.foundation, self.dataset, self.config = foundation, dataset, config
        if config.data.augment and not isinstance(dataset.inputs, ImageInputs):
            raise ConfigError(f"data.augment: got {list(config.data.augment)}, which is for images, and {dataset.name} holds "
                              "texts; leave it out")
        self.fm_params = sum(p.numel() for p in foundation.module.parameters())
        lora = LoRA(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.rslora)
        with _blamed_on("model.targets"):
            attach(foundation.module, config.model.targets, {name: lora for name in EXPERTS}, blocks=foundation.blocks)
        self.freeze(config.model.frozen)
        self.layers = expert_layers(foundation.module)
        self.blocks = len(blocks_of(foundation.module))
        self.block_of = {f"expert/{name}.lora_{x}": layer.block for name, layer in self.layers.items() for x in "ab"}
        with _blamed_on("sal.order"):
            self.order = activation_order(self.blocks, config.sal.order)

        self.class_embeddings = (None if dataset.prompts is None or foundation.zero_shot_temperature is None else
                                 foundation.class_embeddings(dataset.prompts, config.data.max_tokens))
        if config.model.head == "text" and self.class_embeddings is None:
            raise ConfigError(f'model.head: "text" needs a model that embeds class prompts, and {foundation.name} has no '
                              'text tower; use "linear"')
        self.temperature = config.model.temperature or foundation.zero_shot_temperature or 1.0
        self.heads = nn.ModuleDict({name: self._new_head() for name in EXPERTS})
        self.gate = self._new_gate()
        self.imported = {} if config.lora.start is None else self._import(Path(config.lora.start))
        self.cache = self._new_cache()
        self.depths = {name: (0, 0) for name in EXPERTS}    # (trained, applied) depth of each expert
        self.shifts = self._no_shifts()                     # added to each expert's logits, (C,)
        # What training each expert leaves as it is.
        self.kept: dict[str, Callable[[str], bool]] = dict.fromkeys(EXPERTS, nothing)
        self.corrected: Tensors = {}                        # what exact aggregation adds to frozen weights, by layer
        self.originals: Tensors = {}                        # the weights of those layers without it
        self.boundary = self.untrained_below(config.sal.depth)
        self.logits_cache: dict[tuple[str, str, str], Tensor] = {}    # logits of experts on whole parts, in this visit
        self.running: str | None = None                     # what the pairs are set for now
        self.costs: list[budget.BlockCost] = []             # of the blocks as they run now
        self.untrained = 0                                  # blocks below the first trained pair of what runs now
        self.prefix_key = (0, "")                           # depth and hash of the prefix that runs now
        self.flops = 0                                      # of the run under way, on its clients' devices
        self.paid_constants: set[str] = set()                      # constants that the run has paid for

    def _new_cache(self) -> ConstantCache | DiskCache:
        sal, run = self.config.sal, self.config.run
        if sal.cache != "disk":
            return ConstantCache(sal.cache_bytes if sal.cache == "memory" else 0)
        # Bits depend on the arithmetic too: on torch, on the kernels' instruction set, on the number of threads.
        arithmetic = (torch.__version__, build_info()["isa_used"], run.threads, self.config.model.frozen,
                      sal.cache_dtype)
        return DiskCache(made_cache_dir() / "constants", sal.cache_bytes,
                         repr((self.foundation.fingerprint, self.dataset.fingerprint, self.CHUNK, arithmetic)))

    def _new_head(self) -> nn.Module:
        model = self.config.model
        if model.head == "text":
            return TextHead(self.class_embeddings, self.temperature, model.learn_temperature)
        return LinearHead(self.foundation.feature_dim, len(self.dataset.classes), self.class_embeddings,
                          self.temperature)

    def _new_gate(self, side: int = 0) -> GateAdapter:
        gate = self.config.gate
        width = self.foundation.feature_dim if gate.features == "final" else self.foundation.width
        return GateAdapter(width, len(EXPERTS), gate.bottleneck, gate.temperature, side)

    def freeze(self, frozen: str) -> None:
        """Stores the frozen weights of Linear layers as `[model] frozen` says; from full precision only."""
        if frozen != "fp32":
            quantize(self.foundation.module, frozen)
            # One tensor keeps the whole file mapped that the model was loaded from, with all that was quantized.
            for parameter in self.foundation.module.parameters():
                parameter.data = parameter.data.clone()

    # Tensors in and out

    def initial(self, seed: int) -> Tensors:
        """All tensors of a fresh global expert, its head and the gate, drawn from the run's seed."""
        reset_expert(self.foundation.module, "global", generator(seed, "init", "expert"))
        self.heads["global"] = self._new_head()
        if isinstance(self.heads["global"], LinearHead):
            self.heads["global"].reset(generator(seed, "init", "head"))
        with torch.random.fork_rng():
            torch.manual_seed(generator(seed, "init", "gate").initial_seed())
            self.gate = self._new_gate()
        self.running = None
        return {**self.read("global"), **self.read_gate(), **self.imported}

    def _import(self, folder: Path) -> Tensors:
        """The pairs of an adapter, and its head if it has one that fits. ConfigError for one of another shape."""
        lora, shape = self.config.lora, read_shape(folder)
        if (shape.rank, shape.alpha, shape.rslora) != (lora.rank, lora.alpha, lora.rslora):
            raise ConfigError(f"lora.rank: the adapter in {folder} has rank {shape.rank}, alpha {shape.alpha:g}, rslora "
                              f"{str(shape.rslora).lower()}; `fedms import-peft` sets [lora] to that")
        found, own = read_pairs(folder, self.layers), self.read("global")
        if "head/weight" in found and "head/bias" not in found:
            found["head/bias"] = torch.zeros(len(found["head/weight"]))
        head: Tensors = {name: found.pop(name) for name in ("head/weight", "head/bias") if name in found}
        if all(name in own and own[name].shape == tensor.shape for name, tensor in head.items()):
            found |= head
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                raise ConfigError(f"lora.start: {folder}: {name} is {tuple(tensor.shape)}, the model's is "
                                  f"{tuple(own[name].shape)}; is it an adapter of this model?")
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"lora.start: {folder}: {name} holds NaN or infinity")
            if name in self.block_of and name.endswith("lora_b") and tensor.any() and self.block_of[name] not in self.order:
                raise ConfigError(f"sal.order: leaves out block {self.block_of[name]}, where the adapter in {folder} has a pair")
        return found

    def start(self) -> None:
        """The start of a run: nothing is counted yet."""
        self.flops, self.paid_constants = 0, set()
        self._correct({})
        self.clear()

    def clear(self) -> None:
        """Forgets which experts are loaded, and what they answered: the start of every visit."""
        self.logits_cache = {}
        self.depths = {name: (0, 0) for name in EXPERTS}
        self.shifts = self._no_shifts()
        self.running = None

    def _no_shifts(self) -> dict[str, Tensor]:
        return {name: torch.zeros(len(self.dataset.classes)) for name in EXPERTS}

    def load(self, expert: str, tensors: Mapping[str, Tensor], *, depth: int, applied_depth: int,
             keep: Callable[[str], bool] = nothing) -> None:
        """Copies an expert into the model: its pairs and its head, and the corrections of the frozen weights that
        come with it. The first `depth` blocks of the order will be trained, those up to `applied_depth` applied;
        pairs of the others are off. Training leaves tensors whose names `keep` accepts as they are.

        Raises:
            KeyError: if a tensor of an applied pair, or of the head, is missing.
        """
        self.depths[expert], self.kept[expert] = (depth, applied_depth), keep
        self.boundary = self.untrained_below(max(trained for trained, _ in self.depths.values()))
        self.running = None
        targets = self._targets(expert, self.order[:applied_depth])
        with torch.no_grad():
            torch._foreach_copy_(list(targets.values()), [tensors[name] for name in targets])
            self._correct({name: tensor for name, tensor in tensors.items() if name.startswith("correction/")})

    def _correct(self, corrections: Tensors) -> None:
        """Puts `correction/<layer>` (N, K) beside the frozen weights: added to them while an expert's stream runs."""
        if corrections.keys() == self.corrected.keys() and all(c is self.corrected[n] for n, c in corrections.items()):
            return
        self._show_corrections(False)
        self.corrected = corrections
        self.originals = {name: self._frozen_weight(name).detach().clone() for name in corrections}

    @torch.no_grad()
    def _show_corrections(self, shown: bool) -> None:
        for name, original in self.originals.items():
            self._frozen_weight(name).copy_(original + self.corrected[name] if shown else original)

    def _frozen_weight(self, name: str) -> Tensor:
        return self.layers[name.removeprefix("correction/")].weight

    def untrained_below(self, depth: int) -> int:
        """Number of blocks below the lowest one that a depth trains; all of them at depth 0."""
        return min(self.order[:depth], default=self.blocks + 1) - 1

    def read(self, expert: str) -> Tensors:
        """Copies of all of an expert's pairs and of its head."""
        return {name: p.detach().clone() for name, p in self._targets(expert, range(1, self.blocks + 1)).items()}

    def load_gate(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies a gate into the model; whether it has further inputs is seen from its tensors."""
        side = tensors["gate/side.weight"].shape[1] if "gate/side.weight" in tensors else 0
        if side != self.gate.side_inputs:
            self.gate = self._new_gate(side)
        self.gate.load_state_dict({name.removeprefix("gate/"): t for name, t in tensors.items()
                                   if name.startswith("gate/")})

    def read_gate(self) -> Tensors:
        return {f"gate/{name}": t.detach().clone() for name, t in self.gate.state_dict().items()}

    def _targets(self, expert: str, blocks: Collection[int]) -> dict[str, nn.Parameter]:
        pairs = {f"expert/{layer}.{name}": pair[expert] for layer, m in self.layers.items() if m.block in blocks
                 for name, pair in (("lora_a", m.lora_a), ("lora_b", m.lora_b))}
        return {**pairs, **{f"head/{name}": p for name, p in self.heads[expert].named_parameters()}}

    def trainable(self, expert: str) -> dict[str, nn.Parameter]:
        """What training this expert changes, by name: its trained pairs, and its head if that is trained."""
        self._run(expert)
        blocks = self.order[:self.depths[expert][0]]
        return {name: p for name, p in self._targets(expert, blocks).items() if p.requires_grad}

    def _freeze_kept(self, expert: str) -> None:
        """Heads are not parts of blocks, so what trains in them is set here; of active blocks, what stays."""
        head = self.config.model.head == "linear" or self.config.model.learn_temperature
        for name, p in self._targets(expert, self.order[:self.depths[expert][0]]).items():
            if name.startswith("head/") or self.kept[expert](name):
                p.requires_grad_(head and not self.kept[expert](name))
                p.grad = None

    def read_applied(self, expert: str) -> Tensors:
        """Copies of an expert's applied pairs and of its head."""
        blocks = self.order[:self.depths[expert][1]]
        return {name: p.detach().clone() for name, p in self._targets(expert, blocks).items()}

    def read_trained(self, expert: str) -> Tensors:
        """Copies of what training this expert changed."""
        return {name: p.detach().clone() for name, p in self.trainable(expert).items()}

    @contextmanager
    def augmented_batches(self, part: Subset, rows: Tensor) -> Iterator[Subset]:
        """Within the context the data set is a random variation (`[data] augment`) of the samples of a part at the rows
        (B,), and the part that it gives is all of them, in that order. What is constant for them is kept as long."""
        kept = self.dataset, self.cache, self.paid_constants, self.logits_cache
        indices, images = part.indices[rows], cast(ImageInputs, self.dataset.inputs)
        self.dataset = replace(self.dataset, inputs=images.augmented(indices, self.config.data.augment),
                               labels=self.dataset.labels[indices])
        self.cache, self.paid_constants, self.logits_cache = ConstantCache(self.cache.max_bytes), set(), {}
        try:
            yield Subset(torch.arange(len(rows)))
        finally:
            self.dataset, self.cache, self.paid_constants, self.logits_cache = kept

    def labels(self, part: Subset, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.dataset.labels[part.indices[rows]]

    # Streams

    def logits(self, expert: str, part: Subset, rows: Tensor) -> Tensor:
        """(B, C) logits of one expert's stream for the rows (B,) of a part, from the cached prefix. Differentiable
        with respect to the expert's trained tensors."""
        self._run(expert)
        return self.heads[expert](self._features(part, rows)) + self.shifts[expert]

    def layer_mixture(self, part: Subset, rows: Tensor, weights: Tensor) -> Tensor:
        """(B, C) logits with the experts mixed inside each trained layer by `weights` (B, 2): one stream. Layers whose
        local pair is frozen hold the same pair twice; the global one alone is applied there, with weight 1."""
        self._run("mixture")
        mixed = [layer for layer in self.layers.values() if layer.block in self.order[:self.depths["local"][0]]]
        with gated(mixed, weights):
            features = self._features(part, rows)
        logits = torch.stack([self.heads[e](features) + self.shifts[e] for e in EXPERTS], dim=1)
        return (weights.unsqueeze(-1) * logits).sum(1)

    @torch.no_grad()
    def all_logits(self, expert: str, part: Subset) -> Tensor:
        """(n, C) logits of one expert's stream for a whole part, as it stands now. A visit judges the same expert on
        the same samples several times: they are computed once."""
        key = (expert, part.key, self._digest(expert))
        if key not in self.logits_cache:
            self.logits_cache[key] = self._in_chunks(part, lambda rows: self.logits(expert, part, rows),
                                               len(self.dataset.classes))
        return self.logits_cache[key]

    @torch.no_grad()
    def both_logits(self, part: Subset) -> tuple[Tensor, Tensor]:
        """`all_logits` of the global and of the local expert. Where both start from the same prefix, the two streams run
        as one batch above it: through one frozen product a layer, each half of the rows with its own expert."""
        keys = []
        for expert in EXPERTS:
            self._run(expert)
            keys.append(self.prefix_key)
        if keys[0] != keys[1]:
            return self.all_logits("global", part), self.all_logits("local", part)
        prefix = self._prefix(part) if self._replays() and len(part) else None
        self._run("streams")
        self.prefix_key = keys[0]
        with segmented(self.layers, (1, 1)):    # half of the rows with each expert
            self.costs = budget.block_costs(self.foundation.module)

        def compute(rows: Tensor) -> Tensor:
            with segmented(self.layers, (len(rows), len(rows))):
                features = self._features(part, rows.repeat(len(EXPERTS)), prefix)
            halves = zip(EXPERTS, features.chunk(len(EXPERTS)))
            return torch.cat([self.heads[e](own) + self.shifts[e] for e, own in halves], dim=1)

        both = self._in_chunks(part, compute, len(EXPERTS) * len(self.dataset.classes))
        ours, own = both.chunk(len(EXPERTS), dim=1)
        return ours, own

    @torch.no_grad()
    def all_layer_mixture(self, part: Subset, weights: Tensor) -> Tensor:
        """(n, C) logits of `layer_mixture` for a whole part, by weights (n, 2)."""
        return self._in_chunks(part, lambda rows: self.layer_mixture(part, rows, weights[rows]),
                               len(self.dataset.classes))

    def frozen_logits(self, expert: str, part: Subset) -> Tensor:
        """`all_logits` of an expert that does not change: computed once for the tensors that it has."""
        return self._constant((part.key, "logits", self._digest(expert)), lambda: self.all_logits(expert, part),
                              lambda: self._live_flops(expert, part))

    def _digest(self, expert: str) -> str:
        """Names an expert's applied tensors by what they hold."""
        digest = hashlib.sha256()
        for tensor in (*self.read_applied(expert).values(), *self.corrected.values(), self.shifts[expert]):
            digest.update(tensor.numpy())  # type: ignore[arg-type]  # numpy's stubs: a buffer from 3.12 on
        return digest.hexdigest()

    def features(self, part: Subset) -> Tensor:
        """(n, D) pooled features of the foundation model alone, all experts off: constant for ever."""
        def compute() -> Tensor:
            with torch.no_grad():
                self._run(None)
                return self._in_chunks(part, lambda rows: self._features(part, rows), self.foundation.feature_dim)
        return self._constant((part.key, "features"), compute, lambda: self._live_flops(None, part))

    def gate_features(self, part: Subset) -> Tensor:
        """(n, D) what the gate sees: `[gate] features`."""
        if self.config.gate.features == "final" or len(part) == 0:
            return self.features(part)
        self._run("local" if self.config.gate.mixing == "outputs" else "mixture")

        def compute() -> Tensor:
            prefix = self._prefix(part)
            return torch.stack([prefix.row(i).mean(0) for i in range(len(prefix))])
        return self._constant((part.key, "prefix features", *self.prefix_key), compute, lambda: 0)

    def zero_shot_logits(self, part: Subset) -> Tensor | None:
        """(n, C) logits of the class prompts on the foundation model's own features; None without prompts."""
        if self.class_embeddings is None:
            return None
        return self.features(part) @ self.class_embeddings.T / self.temperature

    def _constant(self, key: tuple[str | int, ...], compute: Callable[[], Constant],
                  flops: Callable[[], int]) -> Constant:
        """A value that depends on its key alone, from the cache or computed now.

        A client's device computes each once in a run, so that is what the run is charged: whatever this process
        still has from another run, has had to drop, or must compute again after a restart.
        """
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        due = name not in self.paid_constants
        if due:
            self.paid_constants.add(name)
            self.flops += flops()
        counted = self.flops
        value = cast(Constant, self.cache.get(key, compute))    # what was computed under the key
        if not due and value.nbytes > self.cache.max_bytes:     # too large to be kept: computed every time
            counted += flops()
        self.flops = counted
        return value

    def _live_flops(self, stream: str | None, part: Subset) -> int:
        """Operations of running a stream on a whole part, without the prefix where that is cached."""
        self._run(stream)
        if self._replays() and len(part):
            self._prefix(part)      # charged on its own
        return self._chunk_flops(part, first=self.prefix_key[0] if self._replays() else 0)

    def _chunk_flops(self, part: Subset, **blocks: int) -> int:
        lengths = self.dataset.inputs.lengths[part.indices]
        return sum(self._forward_flops(len(rows), int(lengths[rows].max()), **blocks) for rows in self._chunks(part))

    def _forward_flops(self, samples: int, length: int, first: int = 0, last: int | None = None) -> int:
        """As `budget.forward_flops`, of what runs now; its layers are walked once for many batches."""
        return sum(cost.forward(samples * length, length) for cost in self.costs[first:last])

    def _replays(self) -> bool:
        """Whether the running stream starts from a cached prefix."""
        return self.prefix_key[0] > 0 and self.cache.max_bytes > 0

    def _run(self, stream: str | None) -> None:
        """Sets all pairs for a stream: one expert as `load` said, "mixture" (the global expert frozen, the local one
        where it is trained), "streams" (each as `load` said, for `segmented` rows), or None (the foundation model alone)."""
        if self.running == stream and stream is not None:
            return
        module, order = self.foundation.module, self.config.sal.order
        for expert in EXPERTS:
            trained, applied = self.depths[expert]
            if stream in (expert, "streams"):
                activate(module, expert, depth=trained, applied_depth=applied, order=order)
            elif stream == "mixture":
                activate(module, expert, depth=0 if expert == "global" else trained, order=order,
                         applied_depth=applied if expert == "global" else trained)
            else:
                deactivate(module, expert)
            if stream == expert:
                self._freeze_kept(expert)
        self._show_corrections(stream is not None)      # the foundation model alone has none
        self.running = stream
        self.costs, self.untrained = budget.block_costs(module), prefix_depth(module)
        depth = min(self.untrained, self.boundary)
        self.prefix_key = (depth, self._prefix_hash(depth, corrected=stream is not None))

    def _prefix_hash(self, depth: int, corrected: bool) -> str:
        digest = hashlib.sha256(prefix_hash(self.foundation.module, depth).encode())
        for name, correction in self.corrected.items() if corrected else ():
            if self.layers[name.removeprefix("correction/")].block <= depth:
                digest.update(correction.numpy())  # type: ignore[arg-type]  # numpy's stubs: a buffer from 3.12 on
        return digest.hexdigest()

    def _features(self, part: Subset, rows: Tensor, prefix: Ragged | None = None) -> Tensor:
        """(B, D) pooled features of the running stream: the cached prefix (`prefix`, if given), then the live blocks."""
        module, depth = self.foundation.module, self.prefix_key[0]
        if self.config.lora.dropout:    # on where something is trained; the foundation model's own never is
            for layer in self.layers.values():
                layer.train(torch.is_grad_enabled())
        inputs = self.dataset.inputs.batch(part.indices[rows])
        start = 0
        replayed: AbstractContextManager[None] = nullcontext()
        if self._replays():
            prefix = self._prefix(part) if prefix is None else prefix
            start, replayed = depth, ConstantPrefix(module, depth).replay(prefix.pad(rows))
        with replayed:
            features = self.foundation.features(inputs)
        length = int(self.dataset.inputs.lengths[part.indices[rows]].max())
        self.flops += self._forward_flops(len(rows), length, first=start)
        if features.requires_grad:
            self.flops += sum(cost.backward(len(rows) * length, length) for cost in self.costs[self.untrained:])
        return features

    def _prefix(self, part: Subset) -> Ragged:
        """Output of the constant prefix for every sample of a part, each (T_i, D)."""
        depth = self.prefix_key[0]

        def compute() -> Ragged:
            prefix = ConstantPrefix(self.foundation.module, depth)
            lengths = self.dataset.inputs.lengths[part.indices]
            outputs: Ragged | None = None
            for rows in self._chunks(part):
                inputs = self.dataset.inputs.batch(part.indices[rows])
                hidden = prefix.capture(lambda: self.foundation.features(inputs))
                if outputs is None:
                    outputs = Ragged.empty(lengths, hidden[0], self.config.sal.cache_dtype)
                for row, output in zip(rows.tolist(), hidden):
                    outputs.put(row, output[:lengths[row]])
            return outputs

        return self._constant((part.key, "prefix", *self.prefix_key), compute,
                              lambda: self._chunk_flops(part, last=depth))

    def _chunks(self, part: Subset) -> Sequence[Tensor]:
        if len(part) == 0:
            return ()
        return torch.argsort(self.dataset.inputs.lengths[part.indices], stable=True).split(self.CHUNK)

    def _in_chunks(self, part: Subset, compute: Callable[[Tensor], Tensor], width: int) -> Tensor:
        out = torch.empty(len(part), width)
        for rows in self._chunks(part):
            out[rows] = compute(rows)
        return out


@contextmanager
def _blamed_on(key: str) -> Iterator[None]:
    """What the model refuses is a mistake in this key of the run file."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
