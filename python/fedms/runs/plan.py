"""`fedms plan`: what a round costs on a client's device at each depth, and the settings that fit its memory.

Memory here is what training takes: weights, experts, constants, and what a step makes and drops. The process around it
(Python, its libraries, the data set) is measured too, but apart: a device may well have a leaner one.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fedms.engines.local  # noqa: F401  what a run loads is part of the process that is measured here
from fedms import data, methods, models
from fedms.config import RunConfig
from fedms.data import ClientSplit, Dataset
from fedms.federated.client import Client, Private
from fedms.federated.visit_costs import CostModel, VisitMemory, VisitWork
from fedms.models import FoundationModel
from fedms.progress import Progress
from fedms.runs.experiment import with_clients
from fedms.training.device import choose, peak, reset_peak, synchronize
from fedms.training.expert_model import ExpertModel
from fedms.training.frozen import held_format, is_quantized, quantize_frozen
from fedms.training.memory import hand_back_large_blocks, resident_memory
from fedms_ext import budget, dequantize

# Share of the limit that is left free: the allocator's losses, and what operators allocate inside themselves.
RESERVE = 0.05
# Precisions of the frozen weights to try after the run file's own: int8 and nf4, where they are smaller.
SMALLER = {"int8": ("nf4",), "int8_rotated": ("nf4",), "nf4": (), "int4": ()}


@dataclass(frozen=True)
class Option:
    """One way to train at a depth.

    Attributes:
        depth: Number of blocks that are trained.
        frozen: Format in which the frozen weights are held, as `model.frozen`: in a run with activations of 16 bits their dtype in the
            place of fp32.
        cache: Where constants are kept, as `sal.cache`.
        ahead: Whether those of later rounds are kept too, as `sal.cache_ahead`.
        micro_batch: Samples of a forward and backward pass.
        memory: Bytes by what they are for.
        work: What a visit computes and sends.
        trained_percent: Trained parameters in percent of the foundation model's.
        seconds: Time of one round of the client with the most training data.
    """

    depth: int
    frozen: str
    cache: str
    ahead: bool
    micro_batch: int
    memory: dict[str, int]
    work: VisitWork
    trained_percent: float
    seconds: float

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What training costs at each depth, and what fits.

    Attributes:
        options: The best option at each depth, the shallowest first.
        limit: Bytes that training may use, or None for any number.
        process: Bytes of the process without the model.
        chosen: The deepest option that fits, or None if none does.
        speed: Operations a second by precision of the frozen weights, given or measured here.
        bandwidth: Bytes a second of the link, or None where transfers take no time.
        cache_bytes: `sal.cache_bytes` for the chosen option.
        side_by_side: Number of clients whose training the memory holds at a time: those of `run.lockstep`.
    """

    options: list[Option]
    limit: int | None
    process: int
    chosen: Option | None
    speed: dict[str, float]
    bandwidth: float | None
    cache_bytes: int
    side_by_side: int = 1

    def fits(self, option: Option) -> bool:
        return self.limit is None or option.peak <= (1 - RESERVE) * self.limit

    @property
    def settings(self) -> dict[str, Any]:
        """What to put into the run file for the chosen option, by dotted key."""
        assert self.chosen is not None
        return {"model.frozen": self.chosen.frozen, "sal.max_depth": self.chosen.depth, "sal.cache": self.chosen.cache,
                "sal.cache_bytes": self.cache_bytes, "sal.cache_ahead": self.chosen.ahead, "stage1.micro_batch": self.chosen.micro_batch,
                "stage2.micro_batch": self.chosen.micro_batch}


def plan(config: RunConfig, *, memory: int | None = None, flops: float | None = None, bandwidth: float | None = None,
         progress: Progress | None = None, foundation: FoundationModel | None = None, dataset: Dataset | None = None) -> Plan:
    """Find out what a round costs at each depth, and which settings fit a client's device.

    At each depth the first of these that fits is taken: the run file's precision of the frozen weights, then int8
    and nf4 if they are smaller; the run file's place of the cache, then the disk; the whole batch, then halves of it; each with
    `[sal] cache_ahead`, if the run file has it and the schedule goes on to that depth in steps, then without. The deepest one is
    chosen. With `[run] lockstep` memory is that of as many clients at a time, and all else that of one.

    Args:
        config: The run file.
        memory: Bytes that training may use, beside the process and the data; None for any number.
        flops: Operations a second of the device; None to measure this machine on one visit.
        bandwidth: Bytes a second, up and down; None where transfers take no time.
        progress: Told of what is being done.
        foundation: The foundation model, where it is loaded already, in full precision. Experts are attached to it.
        dataset: The data set, where it is loaded already.

    Raises:
        FedMSError: If a run could not begin with this run file.
    """
    planner = _Planner(config, progress or Progress(), foundation, dataset)
    speeds: dict[str, float] = {}
    tried: dict[int, list[Option]] = {}
    for frozen in (config.model.frozen, *SMALLER.get(config.model.frozen, ("int8", "nf4"))):
        planner.freeze(frozen)
        speeds[planner.frozen] = flops or planner.speed()
        for depth in range(1, planner.costs.max_depth + 1):
            for option in planner.options(depth, speeds[planner.frozen], bandwidth):
                tried.setdefault(depth, []).append(option)
        if memory is None or all(any(o.peak <= (1 - RESERVE) * memory for o in each) for each in tried.values()):
            break
    found = Plan([], memory, planner.process, None, speeds, bandwidth, 0)
    options = [next((o for o in each if found.fits(o)), None) or min(each, key=lambda o: o.peak)
               for _, each in sorted(tried.items())]
    chosen = max((o for o in options if found.fits(o)), key=lambda o: o.depth, default=None)
    cache_bytes = config.sal.cache_bytes
    if chosen and memory is not None and chosen.cache == "memory":
        left = int((1 - RESERVE) * memory) - chosen.peak
        cache_bytes = min(cache_bytes, (chosen.memory["cached features"] + left) // 2**20 * 2**20)
    return Plan(options, memory, planner.process, chosen, speeds, bandwidth, cache_bytes, planner.costs.side_by_side)


class _Planner:
    """Measures one visit after the other on a model and data that it loads.

    Args:
        config: The run file.
        progress: Told of what is being done.
        foundation: The foundation model; None to load it.
        dataset: The data set; None to load it.
    """

    originals: dict[str, Tensor]    # by name, once they are quantized

    def __init__(self, config: RunConfig, progress: Progress, foundation: FoundationModel | None,
                 dataset: Dataset | None) -> None:
        hand_back_large_blocks()
        torch.set_num_threads(config.run.threads)
        progress.phase(f"loading model {config.model.id}")
        # Loaded as every run does, in full precision, or held in the 16 bits of `[run] dtype`; `freeze` quantizes it.
        plain = config.model_copy(update={"model": config.model.model_copy(update={"frozen": "fp32"})})
        foundation = foundation or models.load(plain.model, plain.task.kind)
        progress.phase(f"loading data {config.data.name}")
        dataset = dataset or data.load(plain.data, foundation)
        config = with_clients(config, dataset)
        self.config, self.progress = config, progress
        self.device = choose(config.run.device, config.model.frozen).device
        self.model = ExpertModel(foundation, dataset, plain, device=self.device)
        self.frozen = held_format(config, "fp32")
        partition = data.partition(dataset, config.data, config.clients, config.run.seed)
        self.costs = CostModel(self.model, methods.create(config), config, partition, min(config.run.lockstep, config.clients.count))
        loading = peak(self.device)
        self._visit()       # what stays of a first visit, such as buffers of the kernels, is a part of the process
        reset_peak(self.device)
        shared = self.device.type != "cuda"     # the process and the model are in the same memory
        self.process = resident_memory() - (budget.weight_bytes(foundation.module) if shared else 0)
        self.loading = loading - (self.process if shared else 0)

    def freeze(self, frozen: str) -> None:
        """Hold the frozen weights as a run with this `[model] frozen` does."""
        frozen = held_format(self.config, frozen)
        if frozen != self.frozen:
            module = self.model.foundation.module
            if is_quantized(self.config, self.frozen):
                dequantize(module, self.originals)
            # A run quantizes weights of fp32. Those that are of 16 bits here had twice as many bytes.
            full = budget.weight_bytes(module) + sum(p.nbytes for p in module.parameters() if p.dtype.itemsize == 2)
            self.originals = {f"{name}.weight": m.weight for name, m in module.named_modules()
                              if isinstance(m, nn.Linear)}
            quantize_frozen(module, self.config, self.device, frozen)
            self.frozen = frozen
            # Both copies of the weights are there for a moment.
            self.loading = max(self.loading, full + budget.weight_bytes(self.model.foundation.module))

    def options(self, depth: int, speed: float, bandwidth: float | None) -> Iterator[Option]:
        """Yield ways to train at a depth with the frozen weights in their current precision, the preferred ones first."""
        self.progress.phase(f"tracing depth {depth} with {self.frozen} weights")
        costs, sal = self.costs, self.config.sal
        replays = sal.cache != "off"
        traced = costs.memory(depth, replays)
        grows = sal.cache_ahead and replays and len(costs.boundaries(depth, True)) > len(costs.boundaries(depth, False))
        for cache in ("memory", "disk") if sal.cache == "memory" else (sal.cache,):
            for micro_batch in _halves(max(self.config.stage1.batch, self.config.stage2.batch)):
                work = costs.work(depth, replays, min(micro_batch, self.config.stage1.batch))
                seconds = work.flops / speed
                if bandwidth is not None:
                    seconds += (work.bytes_up + work.bytes_down) / bandwidth
                for ahead in (True, False) if grows else (sal.cache_ahead,):
                    yield Option(depth, self.frozen, cache, ahead, micro_batch,
                                 self._memory(traced, depth, cache, ahead, micro_batch), work,
                                 100 * work.trained_params / self.model.fm_params, seconds)

    def _memory(self, traced: VisitMemory, depth: int, cache: str, ahead: bool, micro_batch: int) -> dict[str, int]:
        # On disk the constants are mapped while a batch of them is read.
        costs = self.costs
        constants = costs.constants(depth, ahead) if cache == "memory" else 0
        building = costs.building(depth, cache, ahead) + traced.judging.of(self.model.CHUNK)
        working = max(traced.training.of(micro_batch), building)
        parts = {"weights": traced.weights, "experts": costs.experts(depth), "cached features": constants,
                 "training step": working}
        parts["training step"] += max(0, self.loading - sum(parts.values()))     # the peak may be that of loading
        return parts

    def speed(self) -> float:
        """Return the operations a second of this machine, in the faster of two visits at depth 1."""
        self.progress.phase(f"measuring this machine with {self.frozen} weights")
        return max(self._visit() for _ in range(2))

    def _visit(self) -> float:
        costs, batch = self.costs, self.config.stage1.batch
        rows = costs.longest.repeat(2 * batch)
        client = Client(ClientSplit(0, None, rows, rows[:1], rows[:0]), costs.config)
        message = costs.server.message(costs.server.start(costs.method.initial(self.model)))
        self.model.clear()
        before, started = self.model.meter.flops, time.perf_counter()
        costs.method.client_step(self.model, client, Private(), message)
        synchronize(self.device)
        return (self.model.meter.flops - before) / (time.perf_counter() - started)


def _halves(batch: int) -> Iterator[int]:
    while batch > 1:
        yield batch
        batch = (batch + 1) // 2
    yield 1
