"""The shape and scale of a LoRA expert in a layer, and the state of its pair of parameters."""
from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from torch import Tensor

from fedms_ext.nn.pairs import Pairs


class PairState(str, enum.Enum):
    """Whether the LoRA pair (A, B) of an expert in a layer is used, and whether it is trained (Sparsely Activated LoRA)."""

    OFF = "off"          # not applied: costs nothing
    FROZEN = "frozen"    # applied, not trained
    TRAINED = "trained"  # applied and trained


STATES = tuple(PairState)


@dataclass(frozen=True)
class LoRA:
    """Shape and scale of one LoRA expert (Hu et al. 2021; rsLoRA: Kalajdzievski 2023).

    Args:
        rank: Inner dimension r, at least 1.
        alpha: Numerator of the scale, which is `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`.
        dropout: Probability in [0, 1) of dropping an input of the LoRA branch while it is trained.
        rslora: Whether the scale is rank-stabilized.

    Attributes:
        scale: The factor of B A in the layer's output. Every call of a layer reads it, so it is computed once.

    Raises:
        TypeError: If the rank is no integer, or alpha or dropout no number.
        ValueError: If a value is outside its range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    scale: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, Integral):
            raise TypeError(f"LoRA rank must be an integer, got {self.rank!r}")
        for name in ("alpha", "dropout"):
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"LoRA {name} must be a number, got {getattr(self, name)!r}")
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout must lie in [0, 1), got {self.dropout}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"LoRA alpha must be finite, got {self.alpha}")
        object.__setattr__(self, "scale", self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank))


class Experts(dict[str, LoRA]):
    """The shapes of a layer's experts by name, in the order in which they were added. None is ever taken out.

    Attributes:
        scales: The scale of each expert. Every call of a layer reads them, so they are collected once.
        dropout: The dropout that the experts share.
    """

    def __init__(self, experts: Mapping[str, LoRA] | None = None) -> None:
        super().__init__()
        self.scales: tuple[float, ...] = ()
        self.dropout = 0.0
        for name, lora in (experts or {}).items():
            self[name] = lora

    def __setitem__(self, name: str, lora: LoRA) -> None:
        super().__setitem__(name, lora)
        self.scales, self.dropout = tuple([one.scale for one in self.values()]), lora.dropout


def check_experts(present: Mapping[str, LoRA], new: Mapping[str, LoRA]) -> None:
    """Check that a layer can hold the experts `present` and the `new` ones together.

    Raises:
        ValueError: If a new name is taken or unusable, or if the dropout probabilities differ.
    """
    for name in new:
        if name in present:
            raise ValueError(f"this layer already has an expert {name!r}; it has {sorted(present)}")
        # The names become attributes of a `ParameterDict`, besides those that every module has.
        if not isinstance(name, str) or not name or "." in name or hasattr(Pairs(), name):
            raise ValueError(f"{name!r} cannot be the name of an expert; expected a non-empty string without a dot that is not "
                             "an attribute of torch.nn.Module")
    dropouts = {name: lora.dropout for name, lora in (*present.items(), *new.items())}
    if len(set(dropouts.values())) > 1:
        raise ValueError(f"the experts of a layer share one dropout mask, so one dropout; got {dropouts}")


def saved_pair(saved: Tensor, held: int) -> tuple[LoRA, PairState]:
    """Read the shape and the state of a pair from its tensor in a state dict; `held` is the rank that the layer has.

    Raises:
        ValueError: If the tensor is not one that `ExpertLinear` saved, or if its rank differs from `held`.
    """
    if not isinstance(saved, Tensor) or saved.shape != (5,) or not saved.is_floating_point():
        raise ValueError("expected five numbers: rank, alpha, dropout, rslora, state")
    rank, alpha, dropout, rslora, state = saved.tolist()
    if rank != held:
        raise ValueError(f"the saved expert has the rank {rank:g}, this layer's has {held}; attach it with the rank of the saved one")
    if not (rslora in (0, 1) and state in range(len(STATES))):
        raise ValueError(f"rslora and state are {rslora:g} and {state:g}, expected 0 or 1, and 0 to {len(STATES) - 1}")
    return LoRA(int(rank), alpha, dropout, bool(rslora)), STATES[int(state)]
