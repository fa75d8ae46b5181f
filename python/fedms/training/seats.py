"""Clients side by side on one model: what each has loaded is set aside in a `Seat`, and a pass computes rows of all."""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedms.data.subset import Subset
from fedms.tasks.base import shifted
from fedms.training.expert_model import EXPERTS, ExpertModel
from fedms_ext import ExpertBank


class Seat:
    """What a client has loaded into the model, set aside while other clients use it.

    Args:
        model: The model, with the client's tensors loaded.
        expert: The expert that is about to be trained.
        part: The samples that it is trained on.

    Attributes:
        params: Copies of what the training changes, by name. They are trained in the place of the model's own parameters.
        head: The expert's head, whose parameters are among these copies.
        prefix: The output of the constant prefix for each sample, or None where a pass starts from the inputs.
    """

    def __init__(self, model: ExpertModel, expert: str, part: Subset) -> None:
        self.expert, self.part = expert, part
        trained = model.trainable(expert).keys()
        with model.stream(expert) as self._stream:
            self.prefix = self._stream.prefix(part) if self._stream.keeps else None
        self._depths, self._kept, self._shifts, self._ahead = dict(model.depths), dict(model.kept), dict(model.shifts), model.ahead
        self._corrections, self._gate, self._opinions = model.corrections.tensors, model.read_gate(), model.kept_opinions.visit
        self.head = copy.deepcopy(model.heads[expert])
        head = {f"head/{name}": p for name, p in self.head.named_parameters()}
        self._tensors = {name: {n: head[n] if name == expert and n in head else nn.Parameter(p.detach().clone())
                                for n, p in model.applied(name).items()} for name in EXPERTS}
        for name, own in self._tensors.items():
            for n, p in own.items():
                p.requires_grad_(name == expert and n in trained)
        self.params: dict[str, nn.Parameter] = {name: self._tensors[expert][name] for name in trained}

    @property
    def layout(self) -> tuple[object, ...]:
        """What seats have to have in common to be trained in one pass."""
        return self.expert, tuple(self._depths.items()), self._stream.prefix_depth, tuple(self.params)

    @property
    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The applied pairs (A, B) of the expert, by the name of the layer."""
        own = self._tensors[self.expert]
        layers = [name.removeprefix("expert/").removesuffix(".lora_a") for name in own if name.endswith(".lora_a")]
        return {layer: (own[f"expert/{layer}.lora_a"], own[f"expert/{layer}.lora_b"]) for layer in layers}

    def shifted(self, opinion: Tensor) -> Tensor:
        """Return an opinion (U, K) of the expert with what the client adds to it."""
        return shifted(opinion, self._shifts[self.expert])

    def charge(self, rows: Tensor) -> None:
        """Count the operations of a step on rows (B,) of the samples, as the client's own device would do it."""
        indices = self.part.indices[rows]
        self._stream.charge_prefix(indices)
        self._stream.charge(indices, any(name.startswith("expert/") for name in self.params))

    def load(self, model: ExpertModel) -> None:
        """Load into the model what the client had there, with the copies as they are by now."""
        model.clear(self._ahead)
        for name in EXPERTS:
            depth, applied = self._depths[name]
            model.load(name, {**self._tensors[name], **self._corrections}, depth=depth, applied_depth=applied, keep=self._kept[name])
        model.shifts, model.kept_opinions.visit = dict(self._shifts), self._opinions
        model.load_gate(self._gate)


class SideBySide:
    """Computes steps of several clients in one pass.

    The pairs of each client stay tensors of its own. One tensor for those of all would save no launch: the operator takes them as
    segments in one call for each layer, and AdamW takes all of them in one call, whatever their number.

    Args:
        model: The model. Whenever a pass is computed, one of these clients is loaded.
        seats: What the clients have loaded; all of one `layout`.
    """

    def __init__(self, model: ExpertModel, seats: Sequence[Seat]) -> None:
        self.model, self.seats = model, seats
        self._bank = ExpertBank(model.layers, seats[0].expert, [seat.pairs for seat in seats])

    def losses(self, rows: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the mean loss () of each client on rows (B,) of its samples, by the number of its seat in ascending order."""
        model, own = self.model, [(self.seats[number], rows[number]) for number in rows]
        indices = torch.cat([seat.part.indices[its] for seat, its in own])
        samples = [len(rows.get(number, ())) for number in range(len(self.seats))]
        with model.stream(self.seats[0].expert) as stream:
            length = int(model.dataset.inputs.lengths[indices].max())
            hidden = torch.cat([self._padded(seat, its, length) for seat, its in own]) if stream.keeps else None
            batch = stream.batch(indices, hidden)
            with self._bank.used(samples):
                features = stream.features_of(batch)
        units = [model.count_units(seat.part, its) for seat, its in own]
        return [self._loss(seat, its, features) for (seat, its), features in zip(own, features.split(units))]

    def _padded(self, seat: Seat, rows: Tensor, length: int) -> Tensor:
        """Return the prefix's outputs for rows (B,) of a client, (B, length, ..., D), padded with zeros."""
        outputs = seat.prefix.pad(rows).to(self.model.device)
        return F.pad(outputs, (0, 0) * (outputs.dim() - 2) + (0, length - outputs.shape[1]))

    def _loss(self, seat: Seat, rows: Tensor, features: Tensor) -> Tensor:
        targets = self.model.targets(seat.part, rows)
        return self.model.task.loss(seat.shifted(self.model.task.opinion(seat.head, features, targets)), targets)
