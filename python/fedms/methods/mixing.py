"""The mixture of the global and a local expert, used by `fedms` and `fedms_plus`.

    z(x) = G_0(x) z_global(x) + G_1(x) z_local(x),      G = softmax(gate(features(x)) / temperature)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from fedms.config import RunConfig
from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private, Reply, validate
from fedms.federated.local_training import Group, train
from fedms.federated.method import Prediction
from fedms.methods.steps import BestEpoch, make_reply, private_lr_of, shared_expert
from fedms.tasks import Score
from fedms.tensors import Tensors
from fedms.training.answering import Speaker
from fedms.training.both import both_opinions, mixed_opinions
from fedms.training.expert_model import ExpertModel
from fedms.training.layer_mixture import all_layer_mixture, layer_mixture_of, units_of_positions
from fedms.training.losses import Loss, LossOn, own_loss_of
from fedms.training.streams import Batch


def is_few(name: str) -> bool:
    """Return whether a tensor of a gate is its bias, or its weights of the experts' confidences.

    These are a handful of numbers, and may take larger steps than the many weights behind the features.
    """
    return name == "gate/out.bias" or name.startswith("gate/side.")


class _Mixed(NamedTuple):
    """A mixture's opinion (U, K) on a subset, in the two parts of a `Loss`: `compute` gets what `read` returned, and the local expert's
    opinion (U, K)."""

    key: Hashable
    read: Callable[[Tensor], Sequence[Any]]
    compute: Callable[[Sequence[Any], Tensor], Tensor]


@dataclass(frozen=True)
class Mixture:
    """How two experts are mixed, by the tables [gate] and [stage2].

    Attributes:
        config: The run file.
        sees_confidences: Whether the gate gets the experts' confidences.
        sees_features: Whether the gate gets the features of the frozen model.
    """

    config: RunConfig
    sees_confidences: bool = False
    sees_features: bool = True

    @property
    def trains_gate(self) -> bool:
        """Whether the weights come from a gate. Otherwise they are fixed."""
        return self.config.expert_weight is None

    @property
    def shares_gate(self) -> bool:
        """Whether the gates of the clients are averaged."""
        return self.trains_gate and self.config.gate.training == "aggregated"

    @property
    def keeps_gate(self) -> bool:
        """Whether each client has a private gate."""
        return self.config.gate.training == "private"

    def trains(self, name: str) -> bool:
        """Return whether a tensor of the gate is trained.

        Without features only the bias and the weights of the confidences are: the layer behind the features stays as it was drawn,
        and leads to weights of zero.
        """
        return self.sees_features or is_few(name)

    def load(self, model: ExpertModel, private: Private, message: Message, depth: int, gate: Tensors) -> None:
        """Load the global expert of the message, the client's local expert, trained at the given depth, and the gate.

        Args:
            gate: Initial tensors of a private gate.
        """
        shared = shared_expert(model, message, self.config)
        model.load("global", shared, depth=0, applied_depth=message.applied_depth)
        model.load("local", {**shared, **private.tensors}, depth=depth, applied_depth=message.applied_depth)
        if self.trains_gate:
            model.load_gate({**gate, **private.tensors, **message.tensors})

    def gate_group(self, model: ExpertModel) -> Group:
        """Return the gate's parameters with their learning rate; empty if the weight is fixed."""
        params = {f"gate/{n}": p for n, p in model.gate.named_parameters() if self.trains_gate and self.trains(f"gate/{n}")}
        return Group(params, self.config.gate.lr)

    def weights(self, model: ExpertModel, features: Tensor, shared: Tensor | None = None,
                own: Tensor | None = None) -> Tensor:
        """Return the weights (U, 2) of both experts for units with features (U, D).

        Args:
            shared, own: (U, K) the experts' opinions, if they are known before the gate is computed.
        """
        fixed = self.config.expert_weight
        if fixed is not None:
            # Filled, not copied: a copy to the device cannot be captured in a CUDA graph.
            return torch.stack([torch.full((len(features),), weight, device=model.device) for weight in (1 - fixed, fixed)], 1)
        if not self.sees_confidences:
            return model.gate(features)
        sure = model.task.confidences
        return model.gate(features, torch.cat([sure(shared), sure(own.detach())], 1))

    def _opinion_on(self, model: ExpertModel, part: Subset) -> _Mixed:
        """Return the mixture's opinion on a subset. The global expert's opinion and the gate's features are constant for each sample
        and cached."""
        features = self._features(model, part)
        if self.config.gate.mixing == "layers":
            with model.stream("mixture") as stream:
                key = stream.key

            def read(rows: Tensor) -> Sequence[Any]:
                with model.stream("mixture") as stream:
                    batch = stream.read(part, rows)
                return (features[model.units(part, rows)], batch, model.targets(part, rows), dict(model.shifts),
                        units_of_positions(model, part, rows))

            def in_layers(read: Sequence[Any], _: Tensor) -> Tensor:
                features, batch, targets, shifts, places = read
                return layer_mixture_of(model, batch, targets, shifts, self.weights(model, features), places)
            return _Mixed(("layers", key), read, in_layers)
        shared = model.frozen_opinions("global", part)

        def of_outputs(read: Sequence[Any], own: Tensor) -> Tensor:
            features, shared = read
            return model.task.mix(self.weights(model, features, shared, own), shared, own, self.config.gate.on)

        def both(rows: Tensor) -> Sequence[Any]:
            units = model.units(part, rows)
            return features[units], shared[units]
        return _Mixed("outputs", both, of_outputs)

    def joint_loss(self, model: ExpertModel) -> LossOn:
        """Return the training loss of the local expert and the gate: the mean of loss(mixture) + own_loss * loss(local)."""
        own_loss, loss_of = self.config.stage2.own_loss, model.task.loss

        def on(part: Subset) -> Loss:
            local, mixed = own_loss_of(model, "local")(part), self._opinion_on(model, part)

            def compute(read: Sequence[Any], batch: Batch, targets: Tensor, shift: Tensor | None) -> Tensor:
                own = model.opinion_of("local", batch, targets, shift)
                return loss_of(mixed.compute(read, own), targets) + own_loss * loss_of(own, targets)
            return Loss(model, ("joint", local.key, mixed.key), (*local.params, *self.gate_group(model).params.values()),
                        lambda rows: (mixed.read(rows), *local.read(rows)), compute)
        return on

    def gate_loss(self, model: ExpertModel) -> LossOn:
        """Return the training loss of the gate alone: the mean loss of the mixture with both experts constant."""
        def on(part: Subset) -> Loss:
            mixed, own = self._opinion_on(model, part), model.opinions("local", part)
            return Loss(model, ("gate", mixed.key), tuple(self.gate_group(model).params.values()),
                        lambda rows: (mixed.read(rows), own[model.units(part, rows)], model.targets(part, rows)),
                        lambda read, own, targets: model.task.loss(mixed.compute(read, own), targets))
        return on

    @torch.no_grad()
    def on_all(self, model: ExpertModel, part: Subset,
               streams: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the opinion (U, K) of the mixture and the weights (U, 2) for a whole subset.

        Args:
            streams: Opinions (U, K) of the global and the local expert, if they are known already.
        """
        features = self._features(model, part)
        if self.config.gate.mixing == "layers":
            weights = self.weights(model, features)
            return all_layer_mixture(model, part, weights), weights
        shared, own = streams or (model.frozen_opinions("global", part), model.opinions("local", part))
        weights = self.weights(model, features, shared, own)
        return model.task.mix(weights, shared, own, self.config.gate.on), weights

    def validate(self, model: ExpertModel, client: Client) -> tuple[Score, Tensor]:
        """Return the score of the mixture on the client's validation samples, and the weights (U, 2) there."""
        opinion, weights = self.on_all(model, client.validation)
        return model.task.score(opinion, model.targets(client.validation)), weights

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message, gate: Tensors) -> Prediction:
        """Return a client's predictions, by the global expert alone if it has no local one. `gate`: see `load`."""
        if not private.has_expert:
            model.load("global", shared_expert(model, final, self.config), depth=final.depth,
                       applied_depth=final.applied_depth)
            opinion = model.opinions("global", part)
            return Prediction(opinion, global_=opinion)
        self.load(model, private, final, final.depth, gate)
        if self.config.gate.mixing == "outputs" and not model.task.mixes_opinions:
            features = self._features(model, part)
            return Prediction(*mixed_opinions(model, part, lambda units, shared, own: self.weights(model, features[units], shared, own)))
        both = both_opinions(model, part)
        mixed, weights = self.on_all(model, part, both)
        return Prediction(mixed, *both, weights)

    def speaker(self, model: ExpertModel, private: Private, final: Message, gate: Tensors) -> Speaker:
        """Load a client's experts and gate for generating answers. `gate`: see `load`."""
        if not private.has_expert:
            model.load("global", shared_expert(model, final, self.config), depth=0, applied_depth=final.applied_depth)
            return Speaker(("global",))
        self.load(model, private, final, final.depth, gate)

        @torch.no_grad()
        def weigh(features: Tensor, shared: Tensor | None, own: Tensor | None) -> Tensor:
            return self.weights(model, features, shared, own)
        return Speaker(("global", "local"), weigh, self.config.gate.features if self.trains_gate else None,
                       self.config.gate.mixing == "layers")

    def _features(self, model: ExpertModel, part: Subset) -> Tensor:
        if self.trains_gate:
            return model.gate_features(part)
        return torch.empty(model.count_units(part, torch.arange(len(part))), 0, device=model.device)


@dataclass(frozen=True)
class Fitted:
    """The result of training a mixture.

    Attributes:
        loss: The mean training loss. Where the losses of the mixture and of the local expert are added, it is their mean, weighted as
            in the sum, so that it can be compared with the loss of a single expert.
        kept: The local expert's tensors.
        moments: The optimizer's state.
    """

    loss: float
    kept: Tensors
    moments: Tensors


# Trains the local expert (the first group) and the gate (the second one) as they lie in the model.
Fit = Callable[[Mixture, ExpertModel, Client, Private, Message, Group, Group], Fitted]


def train_mixture(mixture: Mixture, model: ExpertModel, client: Client, private: Private, message: Message,
                  fit: Fit) -> tuple[Reply, Private]:
    """Carry out a visit of stage 2 after both experts and the gate are loaded: train the private tensors and send the gate."""
    received, _ = mixture.validate(model, client)
    expert, gate = Group(model.trainable("local"), private_lr_of(client, message)), mixture.gate_group(model)
    fitted = fit(mixture, model, client, private, message, expert, gate)
    reached, weights = mixture.validate(model, client)
    shared = {name: t for name, t in model.read_gate().items() if name in message.tensors} if mixture.shares_gate else {}
    size = sum(p.numel() for p in (*expert.params.values(), *gate.params.values()))
    reply = make_reply(client, shared, received.accuracy, reached, loss=fitted.loss, **gate_numbers(weights), trained_params=size)
    own_gate = model.read_gate() if mixture.keeps_gate else {}
    return reply, Private({**fitted.kept, **own_gate, **fitted.moments})


def train_together(mixture: Mixture, model: ExpertModel, client: Client, private: Private, message: Message, expert: Group,
                   gate: Group) -> Fitted:
    """Train the local expert and the gate together on the same samples.

    By the validation loss of their mixture, either both are kept as trained or both are restored.
    """
    received, _ = mixture.validate(model, client)
    best = BestEpoch(model, client, received, lambda: mixture.validate(model, client)[0],
                     model.read_gate if mixture.trains_gate else dict)
    loss, moments, _ = train(model, client, message, private, [expert, gate], mixture.joint_loss(model), after_epoch=best.after_epoch)
    best.load(message)
    if mixture.trains_gate:
        model.load_gate(best.further)
    return Fitted(loss / (1 + mixture.config.stage2.own_loss), best.kept, moments)


class GateNumbers(TypedDict):
    """Mean weight of the local expert, and mean entropy of the weights in nats (at most log 2); None without units."""

    gate_mean: float | None
    gate_entropy: float | None


def gate_numbers(weights: Tensor) -> GateNumbers:
    """Return the numbers for the records from the weights (U, 2) of the global and the local expert."""
    if len(weights) == 0:
        return {"gate_mean": None, "gate_entropy": None}
    entropy = torch.special.entr(weights).sum(1).mean()
    return {"gate_mean": float(weights[:, 1].mean()), "gate_entropy": min(float(entropy), math.log(2))}
