"""CUDA graphs of training steps: `[run] graphs`.

A graph holds the loss and its gradients. Clipping and AdamW stay outside: they are less than a tenth of a step's operators, and their
state is a client's own, which a graph would have to be given at each visit.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedms_ext import graphed
from fedms_ext.graphs import Graphed

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel

Compute = Callable[..., Tensor]


class StepGraphs:
    """CUDA graphs of losses and their gradients; see `fedms.training.losses.Loss`.

    Attributes:
        kept: The graphs of each loss, by its key and its parameters.
    """

    # Losses whose graphs are kept, each with those of its shapes. A visit has up to three; activation makes new ones.
    MOST = 4

    def __init__(self, model: ExpertModel) -> None:
        self.model = model
        self.kept: OrderedDict[Hashable, Graphed] = OrderedDict()

    def of(self, key: Hashable, compute: Compute, params: Sequence[Tensor]) -> Compute:
        """Return a function that computes a loss by CUDA graphs, which are captured when shapes occur again; or `compute` without
        `[run] graphs`.

        Args:
            key: Of functions with the same key, the first one is captured.
            compute: Computes the loss.
            params: The parameters that get gradients.
        """
        if not (self.model.config.run.graphs and torch.is_grad_enabled()):
            return compute
        key = key, tuple(map(id, params))       # which the graphs keep alive, so that no other one gets its id
        if key not in self.kept:
            while len(self.kept) >= self.MOST:
                self.kept.popitem(last=False)
            self.kept[key] = graphed(compute, params)
        self.kept.move_to_end(key)
        return self.kept[key]
