"""What a client's visit costs at a depth: memory, operations, bytes. The cost model of `fedms_ext.budget`, asked about
a run's own model, data, method and settings, before anything is trained."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.data import ClientSplit, Partition
from fedms.data.subset import Subset
from fedms.errors import ConfigError
from fedms.federated import encoding
from fedms.federated.client import Client, Private
from fedms.federated.devices import Fitting
from fedms.federated.lockstep import together
from fedms.federated.schedule import SalState
from fedms.federated.server import STAGES, Server
from fedms.federated.method import BroadcastPolicy, Method
from fedms.seeds import generator
from fedms.tensors import Tensors, freeze_none, is_a
from fedms.training.constants import boundaries, prefix_bytes
from fedms.training.expert_model import ExpertModel
from fedms_ext import ConstantCache, budget
from fedms_ext.budget import Memory


@dataclass(frozen=True)
class VisitMemory:
    """Bytes that a visit needs at one depth and one precision of the frozen weights, with or without replayed prefixes.

    Attributes:
        weights: The model with its experts, and the transposed weights of a quantized model as far as this depth needs them.
        training: The larger of the visits of both stages, with gradients and the optimizer's state, by the samples of a
            micro-batch; of clients side by side, those of all, by the samples of each one's micro-batch.
        judging: A pass without gradients through the whole model, by the samples of a chunk: for validation, and to build
            constants.
    """

    weights: int
    training: Memory
    judging: Memory

    def working(self, micro_batch: int, chunk: int) -> int:
        """Peak of what is made and dropped during a visit."""
        return max(self.training.of(micro_batch), self.judging.of(chunk))


@dataclass(frozen=True)
class VisitWork:
    """Stage 1 at one depth, of one client: parameters that it trains, operations of a visit and of building the
    constants (once), bytes of a visit's messages."""

    trained_params: int
    flops: int
    building_flops: int
    bytes_up: int
    bytes_down: int


class CostModel:
    """Answers for one run's model, data, method and settings.

    Asking overwrites what is loaded into the model. Every device class is asked about alike: `[clients] budgets` is
    not read.

    Args:
        model: The model of this process.
        method: The method.
        config: The run file.
        partition: The clients' samples.
        side_by_side: Number of clients that are trained in one pass, see `fedms.federated.lockstep`. It counts for memory alone.
    """

    def __init__(self, model: ExpertModel, method: Method, config: RunConfig, partition: Partition, side_by_side: int = 1) -> None:
        self.model, self.method, self.partition, self.side_by_side = model, method, partition, side_by_side
        self.config = config.model_copy(update={"clients": config.clients.model_copy(update={"budgets": ()})})
        self.server = Server(config, model.order, model.block_of, method)
        self.max_depth = config.sal.max_depth or len(model.order)
        lengths = model.dataset.inputs.lengths
        self.longest = lengths.argmax()
        self.largest = max(partition.clients, key=lambda split: int(lengths[split.train].sum()))

    # Memory

    def memory(self, depth: int, replays: bool) -> VisitMemory:
        """Traced on the longest sample; ask for depths in ascending order, as transposed weights stay."""
        stages = [stage for stage in STAGES if getattr(self.config, stage).rounds]
        kept, self.model.cache = self.model.cache, ConstantCache(2**62 if replays else 0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)        # one or two samples: threads would wait for each other most of the time
        try:
            with torch.random.fork_rng(devices=[]):
                traces = [self._training(stage, depth) for stage in stages]
                self.model.cache = ConstantCache(0)
                judging = self._judging(depth)
        finally:
            torch.set_num_threads(threads)
            self.model.cache = kept
            self.model.clear()
        training = Memory(max(t.fixed for t in traces), max(t.per_sample for t in traces))
        held = self.model.foundation.weight_bytes + sum(budget.weight_bytes(m) for m in (self.model.heads, self.model.gate))
        return VisitMemory(held, training, judging)

    def _training(self, stage: str, depth: int) -> Memory:
        initial = self.method.initial(self.model)
        state = replace(self.server.start(initial), stage=stage, sal=SalState(depth), applied_depth=depth)
        message = self.server.message(state)

        def visit(samples: int) -> None:
            # Two steps: the second one finds the optimizer's state in place.
            rows = self.longest.repeat(2 * samples)
            settings = getattr(self.config, stage).model_copy(
                update={"batch": samples, "micro_batch": None, "epochs": 1})
            config = self.config.model_copy(update={stage: settings})
            clients = [(Client(ClientSplit(i, None, rows, rows[:1], rows[:0]), config), Private()) for i in range(self.side_by_side)]
            self.model.clear()
            if self.side_by_side > 1:
                together(self.method.visit, self.model, clients, message)
            else:
                self.method.client_step(self.model, *clients[0], message)
        return budget.memory_of(visit)

    def _judging(self, depth: int) -> Memory:
        self._load(depth)

        def judge(samples: int) -> None:
            self.model.forget_opinions()
            self.model.opinions("global", Subset(self.longest.repeat(samples)))
        return budget.memory_of(judge)

    def boundaries(self, depth: int, ahead: bool) -> list[int]:
        """Return the numbers of blocks behind which outputs of the frozen blocks are kept, in a run that comes to a depth: with `ahead`
        (`[sal] cache_ahead`) all that the run needs, else those that it needs last."""
        start = self.server.schedule.start().depth
        later = self.server.depths_ahead(self.server.first_stage, 1, start) if ahead else ()
        return boundaries(self.model, {depth, *(min(each, depth) for each in (start, *later) if later)})

    def constants(self, depth: int, ahead: bool = False) -> int:
        """Return the bytes that the cache of the largest client holds at a depth, for training and validation samples of both
        stages; of clients side by side, the bytes of as many such caches. `ahead`: see `boundaries`.
        """
        parts = [self.largest.validation, *([] if self.config.data.augment else [self.largest.train])]
        outputs, units = self.model.foundation.feature_dim + self.model.task.columns, self.model.dataset.units
        needed, wanted = (self.side_by_side * sum(
            prefix_bytes(self.model, part) * len(self.boundaries(depth, more))
            + (4 * outputs * int(units(part).sum()) if self.config.stage2.rounds else 0)
            for part in parts) for more in (False, ahead))
        return max(needed, min(wanted, self.config.sal.cache_bytes))

    def building(self, depth: int, cache: str, ahead: bool = False) -> int:
        """Return the bytes that are needed temporarily to compute prefix outputs of the largest set of samples for a cache: the
        outputs as they are stored, and on disk the bytes of a file too. `ahead`: see `boundaries`."""
        visited, tested = len(self.boundaries(depth, ahead)), len(self.boundaries(depth, False))
        if cache == "off" or not visited:
            return 0

        def largest(parts: Iterable[Tensor]) -> int:
            return max(prefix_bytes(self.model, part) for part in parts)

        splits, files = (*self.partition.clients, *self.partition.unseen), cache == "disk"
        return max(largest(part for split in splits for part in (split.train, split.validation)) * (visited + files),
                   largest([*(split.test for split in splits), self.partition.global_test]) * (tested + files))

    def experts(self, depth: int) -> int:
        """Return the bytes of experts outside the model.

        A process that plays all clients keeps the private expert of every client, and that of the server, which is read, sent,
        averaged and saved.
        """
        kept = 3 if self.config.clients.optimizer == "kept" else 1
        one = _nbytes(self._load(depth))
        return one * (self.config.clients.count * kept * bool(self.config.stage2.rounds) + 6)

    # Operations and bytes

    def work(self, depth: int, replays: bool, micro_batch: int | None = None) -> VisitWork:
        """Return the work of a visit of the client with the most training tokens, in stage 1, after its first round."""
        applied = self._load(depth)
        module, settings = self.model.foundation.module, self.config.stage1
        params = self.model.trainable("global")
        first = self.model.untrained_below(depth) if replays or self.model.task.per_token else 0
        train, validation = Subset(self.largest.train), Subset(self.largest.validation)
        shuffle = generator(self.config.run.seed, "plan")
        again = 0 if self.config.data.augment else first        # blocks of a training pass that are not run again
        flops = building = 0
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(train), generator=shuffle).split(micro_batch or settings.batch):
                size = self._size(train, rows)
                flops += budget.forward_flops(module, *size, first=again) + budget.backward_flops(module, *size)
                flops += self._head_flops(train, rows, training=True)
                flops += 0 if replays else self._prefix_flops(Subset(train.indices[rows]), first)
        for part in (validation, *([] if self.config.data.augment else [train])):
            building += self._prefix_flops(part, first) if replays else 0
        for rows in self.model.chunks(validation):
            flops += budget.forward_flops(module, *self._size(validation, rows), first=first)
            flops += self._head_flops(validation, rows, training=False)
        flops += 0 if replays else self._prefix_flops(validation, first)
        trained = {name: applied[name] for name in params}
        up, down = (self._message(tensors) for tensors in (trained, applied))
        return VisitWork(sum(p.numel() for p in params.values()), flops, building, up, down)

    def _size(self, part: Subset, rows: Tensor) -> tuple[int, int]:
        """Return the number of samples and the padded length of the rows (B,) of a part."""
        return len(rows), int(self.model.dataset.inputs.lengths[part.indices[rows]].max())

    def _prefix_flops(self, part: Subset, depth: int) -> int:
        """Return the operations of so many blocks for a whole part, in the passes that compute a prefix."""
        costs = budget.block_costs(self.model.foundation.module)[:depth]
        sizes = [self._size(part, rows) for rows in self.model.chunks(part, self.model.prefix_chunk)]
        return sum(cost.forward(samples * length, length) for samples, length in sizes for cost in costs)

    def _head_flops(self, part: Subset, rows: Tensor, training: bool) -> int:
        return self.model.task.head_flops(self.model.count_units(part, rows), training)

    def _load(self, depth: int) -> Tensors:
        """Load a new global expert, and return its applied tensors."""
        self.model.clear()
        self.model.load("global", self.model.initial(self.config.run.seed), depth=depth, applied_depth=depth,
                        keep=is_a if self.config.aggregation == "freeze_a" else freeze_none)
        return self.model.read_applied("global")

    def _message(self, tensors: Tensors) -> int:
        policy = self.server.broadcast_policy
        sent = {name: tensor for name, tensor in tensors.items() if policy("stage1", name) is not BroadcastPolicy.NEVER}
        return len(encoding.pack(sent, self.config.wire.dtype)) if sent else 0


def fitting_of(model: ExpertModel, method: Method, config: RunConfig, partition: Partition) -> Fitting:
    """Return what fits the memory of each class of `[clients] budgets`, and what visits cost if `[sal]` sets a budget for them.

    The memory of a class holds the weights, the constants of the largest client, and what a visit creates and drops, but not the
    Python process around them.

    Raises:
        ConfigError: If the memory of a class is too small to train one block.
    """
    memories = [tier.memory for tier in config.clients.budgets]
    has_memory, has_budget = any(memory is not None for memory in memories), config.sal.has_budget
    if not (has_memory or has_budget):
        return Fitting([None] * len(memories))
    costs = CostModel(model, method, config, partition)
    work = [costs.work(depth, config.sal.cache != "off").flops for depth in range(1, costs.max_depth + 1)] if has_budget else []
    return Fitting(_depths(costs, memories) if has_memory else [None] * len(memories), work)


def _depths(costs: CostModel, memories: Sequence[int | None]) -> list[int | None]:
    """Return the largest number of blocks whose training fits the memory of each class, or None for a class without a limit.

    Raises:
        ConfigError: If not even one block fits.
    """
    needs = [device_memory(costs, depth) for depth in range(1, costs.max_depth + 1)]
    depths: list[int | None] = []
    for number, memory in enumerate(memories):
        fitting = [depth for depth, need in enumerate(needs, start=1) if memory is None or need <= memory]
        if not fitting:
            raise ConfigError(f"clients.budgets[{number}].memory: got {memory}, but to train one block takes "
                              f"{needs[0]} bytes; give more, or lower stage1.micro_batch and stage2.micro_batch")
        depths.append(None if memory is None else max(fitting))
    return depths


def device_memory(costs: CostModel, depth: int) -> int:
    """Return the bytes that a client's device needs at a depth with the settings as they are."""
    config, replays = costs.config, costs.config.sal.cache != "off"
    micro_batch = max(stage.micro_batch or stage.batch for stage in (config.stage1, config.stage2))
    memory = costs.memory(depth, replays)
    kept = min(costs.constants(depth), config.sal.cache_bytes) if config.sal.cache == "memory" else 0
    return memory.weights + kept + memory.working(micro_batch, costs.model.CHUNK)


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
