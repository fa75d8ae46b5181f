"""CUDA graphs of training steps: `[run] graphs`."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedms_ext import graphed

if TYPE_CHECKING:
    from fedms.training.expert_model import ExpertModel
    from fedms.training.streams import Stream

Live = Callable[..., Tensor]


class StepGraphs:
    """CUDA graphs of the passes through a model's blocks, forward and backward, in which one expert is trained: alone, or mixed with
    the frozen global one inside the layers.

    Passes of several clients at once are not captured: their numbers of rows are in the layers, not arguments of the pass.
    """

    # Ways to run the model of which graphs are kept, each with those of its shapes; activation makes new ones.
    MOST = 2

    def __init__(self, model: ExpertModel) -> None:
        self.model = model
        self.kept: OrderedDict[object, Live] = OrderedDict()

    def of(self, stream: Stream, live: Live) -> Live:
        """Return the graphs of a pass of a stream, captured at their first call; or `live` if the pass is not captured.

        Args:
            stream: The stream.
            live: Computes the pass.
        """
        model = self.model
        expert = "local" if stream.name == "mixture" else stream.name
        trains = torch.is_grad_enabled() and expert in model.depths
        if not (model.config.run.graphs and trains) or any(layer.routes for layer in model.layers.values()):
            return live
        key = (stream.name, stream.prefix_depth, stream.replays, stream.states)
        if key not in self.kept:
            while len(self.kept) >= self.MOST:
                self.kept.popitem(last=False)
            trained = [p for layer in model.layers.values() for p in (layer.lora_a[expert], layer.lora_b[expert])]
            self.kept[key] = graphed(live, trained)
        self.kept.move_to_end(key)
        return self.kept[key]
