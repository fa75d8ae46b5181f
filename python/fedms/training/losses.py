"""The loss of a training step, in two parts: what a step reads, and what it computes of that.

The second part alone runs on the device, and can be replayed as a CUDA graph (see `fedms.training.graphs`).
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from fedms.data.subset import Subset
from fedms.errors import ConfigError
from fedms.training.expert_model import ExpertModel
from fedms.training.streams import Batch
from fedms_ext.graphs import CaptureError


@dataclass(frozen=True)
class Loss:
    """The mean loss () over the units of a batch, by the batch's rows (B,) of a subset.

    Attributes:
        model: The model that computes it.
        key: Of two losses with the same key, `compute` does the same.
        params: Parameters of the model that get gradients.
        read: Returns the arguments of `compute` for rows (B,): tensors on the device, or tuples and dictionaries of them.
        compute: Computes the loss. Everything else that changes from batch to batch, or from visit to visit, stays in its memory: the
            model's parameters.
    """

    model: ExpertModel
    key: Hashable
    params: Sequence[Tensor]
    read: Callable[[Tensor], Sequence[Any]]
    compute: Callable[..., Tensor]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the loss.

        Raises:
            ConfigError: If graphs are asked for, and a graph cannot hold what the model computes.
        """
        arguments = self.read(rows)
        try:
            return self.model.graphs.of(self.key, self.compute, self.params)(*arguments)
        except CaptureError as error:
            raise ConfigError(f"run.graphs: {error}; set run.graphs = false") from error


LossOn = Callable[[Subset], Callable[[Tensor], Tensor]]     # the loss on a subset; a `Loss`, or any function of rows (B,)


def own_loss_of(model: ExpertModel, expert: str) -> Callable[[Subset], Loss]:
    """Return the loss of a single expert's opinion."""
    def on(part: Subset) -> Loss:
        with model.stream(expert) as stream:
            key = "own", stream.key

        def read(rows: Tensor) -> Sequence[Any]:
            with model.stream(expert) as stream:
                return stream.read(part, rows), model.targets(part, rows), model.shifts[expert]

        def compute(batch: Batch, targets: Tensor, shift: Tensor | None) -> Tensor:
            return model.task.loss(model.opinion_of(expert, batch, targets, shift), targets)
        return Loss(model, key, tuple(model.trainable(expert).values()), read, compute)
    return on


@dataclass(frozen=True)
class Proximal:
    """A penalty on the distance of trained parameters from where they began: strength / 2 times its square.

    Attributes:
        strength: Its weight in the loss.
        anchors: Where the parameters began, by name, on their device.
    """

    strength: float
    anchors: Mapping[str, Tensor]

    def of(self, params: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> Tensor:
        """Compute the penalty () of parameters from anchors, both by name."""
        return self.strength / 2 * cast(Tensor, sum((p - anchors[name]).square().sum() for name, p in params.items()))

    def added_to(self, loss: Loss, params: Mapping[str, Tensor]) -> Loss:
        """Return a loss with the penalty of trained parameters added."""
        anchors = {name: self.anchors[name] for name in params}
        return Loss(loss.model, (loss.key, "proximal", self.strength), loss.params, lambda rows: (anchors, *loss.read(rows)),
                    lambda anchors, *batch: loss.compute(*batch) + self.of(params, anchors))
