"""Local training: steps of AdamW, by one client or by several side by side on one model.

`train` is for one client. `Steps` makes the steps of any number of clients: in a step each has a batch, a loss, a gradient norm and
an optimizer state of its own. How their gradients come about is the caller's: of one client by its loss (`train`), of several in one
pass (`fedms.federated.lockstep`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from fedms.config import Stage
from fedms.data.subset import Subset
from fedms.federated.client import Client, ClientFailure, Message, Private
from fedms.seeds import generator
from fedms.tensors import Tensors
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import LossOn

# In fp16 the loss is scaled, so that small gradients do not become zero. The scale starts at FIRST_SCALE and is halved whenever
# a gradient overflows. A visit fails after more than MOST_SKIPPED overflows in a row.
FIRST_SCALE, MOST_SKIPPED = 2.0**12, 12


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate.

    Attributes:
        params: The parameters, by the names under which their optimizer state is kept.
        lr: The learning rate.
    """

    params: Mapping[str, Tensor]
    lr: float


class Trained(NamedTuple):
    """What a training has come to: the mean loss over all units, the optimizer's state (empty if it is not kept), and the number of
    trained parameters. The trained values are in the parameters."""

    loss: float
    moments: Tensors
    size: int


class Trainee:
    """A client in training: its parameters, its batches, and what it has done so far.

    Args:
        model: The model of this process.
        client: The client.
        message: The message of the round.
        private: Holds the optimizer's state of the last visit if `[clients] optimizer = "kept"`.
        groups: The parameters and their learning rates.
        part: The samples; the default is the training samples.
        rows: (n,) rows of the samples that are trained on; the default is all.
        epochs: Number of epochs; the default is that of the stage.
        after_epoch: Called after each epoch, and at the end if the last epoch is incomplete.

    Attributes:
        named: The parameters by the names under which their optimizer state is kept.
        batch: Rows (B,) of the batch of the step under way.
        losses: Losses () of its micro-batches, whose sum is the mean loss of the batch.
        failure: Why the training has ended early, or None.
    """

    def __init__(self, model: ExpertModel, client: Client, message: Message, private: Private, groups: Sequence[Group],
                 part: Subset | None = None, rows: Tensor | None = None, epochs: int | None = None,
                 after_epoch: Callable[[], None] | None = None) -> None:
        self.client, self.stage, self.private, self.groups = client, message.stage, private, groups
        self.settings: Stage = getattr(client.config, message.stage)
        self.part = client.train if part is None else part
        self.named = {name: p for group in groups for name, p in group.params.items()}
        self.batch, self.losses = torch.empty(0, dtype=torch.int64), list[Tensor]()
        self.failure: ClientFailure | None = None
        self._model, self._after_epoch = model, after_epoch
        self._rows = torch.arange(len(self.part)) if rows is None else rows
        self._batches = self._all_batches(epochs, generator(client.seed(message, "shuffle")))
        self._total, self._seen, self._done, self._skipped = 0.0, 0, 0, 0

    def _all_batches(self, epochs: int | None, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the batches of the visit: those of `epochs` epochs, or `[stage] steps` batches. Every epoch has a new random order.

        With `[data] group_by_length` a batch holds samples of similar length, and the batches are in random order.
        """
        model, settings, rows = self._model, self.settings, self._rows
        steps = settings.steps if epochs is None else None
        done = 0
        for _ in range(epochs or settings.epochs) if steps is None else count():
            order = rows[torch.randperm(len(rows), generator=shuffle)]
            batches = order.split(settings.batch)
            if model.config.data.group_by_length and model.task.per_token:
                lengths = model.dataset.inputs.lengths[self.part.indices[order]]
                batches = order[lengths.argsort(stable=True)].split(settings.batch)
                batches = [batches[i] for i in torch.randperm(len(batches), generator=shuffle).tolist()]
            for batch in batches:
                yield batch
                done += 1
                if done == steps:
                    return

    @property
    def micro_batch(self) -> int:
        return self.settings.micro_batch or self.settings.batch

    def next(self) -> bool:
        """Take the next batch; return whether there is one."""
        batch = None if self.failure else next(self._batches, None)
        if batch is None:
            return False
        if self._after_epoch is not None and self._done and self._done % len(self._rows) == 0:
            self._after_epoch()
        self.batch, self.losses = batch, []
        return True

    def judge(self, loss: float, norm: float, may_skip: bool) -> None:
        """Count a step, or end the training if it diverges.

        Args:
            loss: The mean loss of the batch.
            norm: The norm of its gradient.
            may_skip: Whether a few steps whose gradient is not finite may be left out.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            units = self._model.count_units(self.part, self.batch)
            self._total, self._seen, self._done = self._total + loss * units, self._seen + units, self._done + len(self.batch)
            self._skipped = 0
            return
        self._skipped += 1
        if not may_skip or self._skipped > MOST_SKIPPED:
            self.failure = ClientFailure(f"training diverged: loss {loss:g}, gradient norm {norm:g} after {self._done} samples; a lower "
                                         f"{self.stage}.lr may help")
            for p in self.named.values():
                p.grad = None

    def end(self, optimizer: torch.optim.Optimizer) -> Trained | ClientFailure:
        """Return what the training has come to, when there are no more batches."""
        if self.failure is not None:
            return self.failure
        if self._after_epoch is not None:
            self._after_epoch()
        moments = moments_of(optimizer, self.named, self.stage) if self.client.config.clients.optimizer == "kept" else {}
        return Trained(self._total / max(self._seen, 1), moments, sum(p.numel() for p in self.named.values()))


Backward = Callable[[Mapping[int, Trainee], torch.amp.GradScaler], None]
"""Adds the gradients of the mean loss of each trainee's batch, scaled, to its parameters, and its losses to `Trainee.losses`. The
trainees of a step are given by their numbers among all."""


class Steps:
    """The steps of trainees in the same stage, with one optimizer for all of them.

    Args:
        model: The model, with the tensors of one of the clients loaded.
        trainees: The clients in training.
        backward: Computes their gradients.
    """

    def __init__(self, model: ExpertModel, trainees: Sequence[Trainee], backward: Backward) -> None:
        self.trainees, self._backward, config = trainees, backward, trainees[0].client.config
        self._clip = trainees[0].settings.clip or float("inf")
        rates: dict[float, list[Tensor]] = {}
        for group in (group for trainee in trainees for group in trainee.groups if group.params):
            rates.setdefault(group.lr, []).extend(group.params.values())
        # Fused: one kernel for all pairs, of which there are many small ones. Those without a gradient stay as they are.
        self._optimizer = torch.optim.AdamW([{"params": params, "lr": lr} for lr, params in rates.items()],
                                            weight_decay=trainees[0].settings.weight_decay, fused=True)
        self._scaler = torch.amp.GradScaler(model.device.type, init_scale=FIRST_SCALE, enabled=config.run.dtype == "fp16")
        for trainee in trainees if config.clients.optimizer == "kept" else ():
            load_moments(self._optimizer, trainee.named, trainee.private.tensors, trainee.stage)

    def run(self) -> list[Trained | ClientFailure]:
        """Train until no client has a batch left, and return what became of each."""
        while running := {number: trainee for number, trainee in enumerate(self.trainees) if trainee.next()}:
            self._step(running)
        return [trainee.end(self._optimizer) for trainee in self.trainees]

    def _step(self, running: Mapping[int, Trainee]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._backward(running, self._scaler)
        self._scaler.unscale_(self._optimizer)
        trainees = list(running.values())
        norms = clip_each([list(trainee.named.values()) for trainee in trainees], self._clip)
        # The step waits for the device here, and nowhere else.
        values = iter(torch.stack([*(loss for trainee in trainees for loss in trainee.losses), *norms]).tolist())
        losses = [sum(next(values) for _ in trainee.losses) for trainee in trainees]
        for trainee, loss, norm in zip(trainees, losses, values):
            trainee.judge(loss, norm, self._scaler.is_enabled())
        if not all(trainee.failure for trainee in trainees):
            self._scaler.step(self._optimizer)      # in fp16 left out where a gradient is not finite
            self._scaler.update()


def train(model: ExpertModel, client: Client, message: Message, private: Private, groups: Sequence[Group],
          loss_on: LossOn, part: Subset | None = None, rows: Tensor | None = None,
          epochs: int | None = None, after_epoch: Callable[[], None] | None = None) -> Trained:
    """Train the given parameters with AdamW on a subset of the client's samples.

    Args:
        model: The model, with the client's tensors loaded.
        client, message, private, groups: See `Trainee`.
        loss_on: Called once with the subset; with `[data] augment`, called in each step with the augmented images of the
            batch.
        part, rows, epochs, after_epoch: See `Trainee`.

    Raises:
        ClientFailure: If a loss or a gradient norm is NaN or infinite.
    """
    trainee = Trainee(model, client, message, private, groups, part, rows, epochs, after_epoch)
    torch.manual_seed(client.seed(message, "dropout"))
    loss_of = None if client.config.data.augment else loss_on(trainee.part)

    def backward(_: Mapping[int, Trainee], scaler: torch.amp.GradScaler) -> None:
        if loss_of is not None:
            trainee.losses = accumulate(loss_of, trainee.batch, trainee.micro_batch, partial(model.count_units, trainee.part), scaler)
            return
        with model.augmented_batches(trainee.part, trainee.batch) as images:
            trainee.losses = accumulate(loss_on(images), torch.arange(len(images)), trainee.micro_batch, scaler=scaler)

    (found,) = Steps(model, [trainee], backward).run()
    if isinstance(found, ClientFailure):
        raise found
    return found


def accumulate(loss_of: Callable[[Tensor], Tensor], batch: Tensor, micro_batch: int, units: Callable[[Tensor], int] = len,
               scaler: torch.amp.GradScaler | None = None) -> list[Tensor]:
    """Add the gradients of the mean loss of a batch (B,) to the parameters, in micro-batches of `micro_batch` samples.

    A micro-batch is weighted by its number of `units`, and the loss is scaled by `scaler` before the backward pass.

    Returns:
        The losses () of the micro-batches, whose sum is the mean loss of the batch, unscaled.
    """
    losses = []
    for part in batch.split(micro_batch):
        loss = loss_of(part) * (units(part) / units(batch))
        (loss if scaler is None else scaler.scale(loss)).backward()
        losses.append(loss.detach())
    return losses


def clip_each(clients: Sequence[Sequence[Tensor]], most: float) -> Sequence[Tensor]:
    """Scale the gradients of each client's parameters so that their norm is at most `most`, as
    `torch.nn.utils.clip_grad_norm_` does for one client; return the norms () of before.

    The norms of all gradients are computed by one call, so that on a GPU a step of many clients has few launches. Each client has
    one gradient at least: that of its loss.
    """
    gradients = [[p.grad for p in params if p.grad is not None] for params in clients]
    lengths = iter(torch._foreach_norm([gradient for own in gradients for gradient in own]))
    norms = []
    for own in gradients:
        norm = torch.linalg.vector_norm(torch.stack([next(lengths) for _ in own]))
        torch._foreach_mul_(own, (most / (norm + 1e-6)).clamp(max=1.0))
        norms.append(norm)
    return norms


def moments_of(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], stage: str) -> Tensors:
    """Return copies, on the CPU, of the optimizer's state of the named parameters: `optimizer/STAGE/NAME/KIND`."""
    return {f"optimizer/{stage}/{name}/{kind}": value.to("cpu", copy=True)
            for name, p in named.items() for kind, value in optimizer.state.get(p, {}).items()}


def load_moments(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], kept: Tensors, stage: str) -> None:
    """Copy the state that `moments_of` returned at the last visit into the optimizer. A parameter without such a state starts anew."""
    for name, p in named.items():
        prefix = f"optimizer/{stage}/{name}"
        if f"{prefix}/step" in kept:      # a pair activated since the last visit has none yet
            optimizer.state[p] = {kind: kept[f"{prefix}/{kind}"].to(p.device, copy=True) for kind in ("step", "exp_avg", "exp_avg_sq")}
