"""FedMS: federated fine-tuning with a Mixture of Foundation Models (arXiv 2312.15926; IEEE TMC 2024).

Stage 1 trains a global LoRA expert by federated averaging, its blocks activated one after the other. In stage 2 that
expert is frozen; each client trains a private local expert, which starts as its copy, together with the gate adapter

    z(x) = G_0(x) z_global(x) + G_1(x) z_local(x),      G = softmax(gate(features(x)) / temperature)

on CE(z) + own_loss * CE(z_local), and sends the gate adapter alone. Our choices where the abstracts are silent: the
mixture is taken on logits, and the local expert has a loss of its own (the mixture's alone leaves it weak).

Its ablations are settings: a gate that each client keeps to itself (`[gate] training`), a fixed weight in the gate's place
(`[gate] weight`), the order and schedule of activation (`[sal]`).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, Group, Loss, LossOn, Message, Private, Reply, train, validate
from fedms.methods.steps import (Method, Prediction, keep_better, lr_of, make_reply, shared_expert,
                                 train_shared)
from fedms.tasks import Score
from fedms.tensors import Tensors
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class FedMS(Method):
    name = "fedms"
    personal = ("stage2",)

    def broadcast_policy(self, stage: str, name: str) -> str | None:
        if name.startswith("gate/"):
            return "round" if stage != "stage1" and self._shares_gate else None
        return "round" if stage == "stage1" else "once"

    @property
    def learns_gate(self) -> bool:
        return self.config.gate.weight is None

    @property
    def _shares_gate(self) -> bool:
        return self.learns_gate and self.config.gate.training == "aggregated"

    def client_step(self, model: ExpertModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        if message.stage == "stage1":
            return train_shared(model, client, private, message)
        return self._stage2(model, client, private, message)

    def _stage2(self, model: ExpertModel, client: Client, private: Private,
                message: Message) -> tuple[Reply, Private]:
        self._load(model, private, message, client.trained_depth(message))
        received, _ = self._validate(model, client)
        expert = Group(model.trainable("local"), lr_of(client, message))
        gate = Group({f"gate/{n}": p for n, p in model.gate.named_parameters()} if self.learns_gate else {},
                     self.config.gate.lr)
        loss, kept, moments = self._fit(model, client, private, message, expert, gate)
        reached, weights = self._validate(model, client)
        numbers: dict[str, Any] = gate_numbers(weights)
        shared = {name: t for name, t in model.read_gate().items() if name in message.tensors} if self._shares_gate else {}
        reply = make_reply(client, shared, received.accuracy, reached, loss=loss,
                           **numbers,
                           trained_params=sum(p.numel() for p in (*expert.params.values(), *gate.params.values())))
        own_gate = model.read_gate() if self.config.gate.training == "private" else {}
        return reply, Private({**kept, **own_gate, **moments})

    def _fit(self, model: ExpertModel, client: Client, private: Private, message: Message, expert: Group,
             gate: Group) -> tuple[float, Tensors, Tensors]:
        """Trains the local expert and the gate; returns the mean loss, the expert's tensors that are kept, and the
        optimizer's state."""
        own_before, before = validate(model, client, "local"), model.read_applied("local")
        loss, moments = train(model, client, message, private, [expert, gate], self._loss(model))
        kept, _ = keep_better(model, client, message, before, own_before)
        return loss, kept, moments

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        shared = shared_expert(model, final, self.config)
        if not private.has_expert:                          # no local expert: weight 1 on the global one
            model.load("global", shared, depth=final.depth, applied_depth=final.applied_depth)
            opinion = model.opinions("global", part)
            return Prediction(opinion, global_=opinion)
        self._load(model, private, final, final.depth)
        both = model.both_opinions(part)
        mixed, weights = self._mixture(model, part, both)
        if self.config.gate.mixing == "outputs" and not model.task.mixes_opinions:
            mixed = model.mixed_opinions(part, weights)
        return Prediction(mixed, *both, weights)

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        if not private.has_expert:
            model.load("global", shared_expert(model, final, self.config), depth=0, applied_depth=final.applied_depth)
            return Speaker(("global",))
        self._load(model, private, final, final.depth)

        @torch.no_grad()
        def weigh(features: Tensor, shared: Tensor | None, own: Tensor | None) -> Tensor:
            return self._weights(model, features, shared, own)
        return Speaker(("global", "local"), weigh, self.config.gate.features if self.learns_gate else None,
                       self.config.gate.mixing == "layers")

    # The mixture

    def _load(self, model: ExpertModel, private: Private, message: Message, depth: int) -> None:
        """Loads both experts, the local one to be trained at a depth, and the gate."""
        start = self.initial(model) if self.config.gate.training == "private" else {}
        shared = shared_expert(model, message, self.config)
        model.load("global", shared, depth=0, applied_depth=message.applied_depth)
        model.load("local", {**shared, **private.tensors}, depth=depth, applied_depth=message.applied_depth)
        if self.learns_gate:
            model.load_gate({**start, **private.tensors, **message.tensors})

    def _loss(self, model: ExpertModel) -> LossOn:
        """Mean over a batch of loss(mixture) + own_loss * loss(local). The global expert's opinion and the gate's features
        are constants of a sample."""
        own_loss, loss_of = self.config.stage2.own_loss, model.task.loss

        def on(part: Subset) -> Loss:
            mixture = self._mixture_of(model, part)

            def loss(rows: Tensor) -> Tensor:
                targets, own = model.targets(part, rows), model.opinion("local", part, rows)
                return loss_of(mixture(rows, own), targets) + own_loss * loss_of(own, targets)
            return loss
        return on

    def _mixture_of(self, model: ExpertModel, part: Subset) -> Callable[[Tensor, Tensor], Tensor]:
        """The mixture's opinion about rows (B,) of a part, given the local expert's opinion (U, K) there."""
        features = self._gate_features(model, part)
        if self.config.gate.mixing == "layers":
            return lambda rows, _: model.layer_mixture(part, rows, self._weights(model, features[model.units(part, rows)]))
        shared = model.frozen_opinions("global", part)

        def mixture(rows: Tensor, own: Tensor) -> Tensor:
            units = model.units(part, rows)
            weights = self._weights(model, features[units], shared[units], own)
            return model.task.mix(weights, shared[units], own, self.config.gate.on)
        return mixture

    def _gate_features(self, model: ExpertModel, part: Subset) -> Tensor:
        if self.learns_gate:
            return model.gate_features(part)
        return torch.empty(model.count_units(part, torch.arange(len(part))), 0, device=model.device)

    def _weights(self, model: ExpertModel, features: Tensor, shared: Tensor | None = None,
                 own: Tensor | None = None) -> Tensor:
        """The weights (U, 2) of both experts for units of which the gate sees features (U, D). shared, own (U, K): the
        experts' opinions there, where they are known before the gate decides."""
        fixed = self.config.gate.weight
        if fixed is not None:
            return torch.tensor([1 - fixed, fixed], device=model.device).expand(len(features), 2)
        return model.gate(features)

    @torch.no_grad()
    def _mixture(self, model: ExpertModel, part: Subset,
                 streams: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Opinion (U, K) of the mixture and the gate's weights (U, 2) for a whole part. `streams`: the opinions of both
        experts, where they are known already."""
        features = self._gate_features(model, part)
        if self.config.gate.mixing == "layers":
            weights = self._weights(model, features)
            return model.all_layer_mixture(part, weights), weights
        shared, own = streams or (model.frozen_opinions("global", part), model.opinions("local", part))
        weights = self._weights(model, features, shared, own)
        return model.task.mix(weights, shared, own, self.config.gate.on), weights

    def _validate(self, model: ExpertModel, client: Client) -> tuple[Score, Tensor]:
        opinion, weights = self._mixture(model, client.validation)
        return model.task.score(opinion, model.targets(client.validation)), weights


def gate_numbers(weights: Tensor) -> dict[str, float | None]:
    """Mean weight of the local expert and mean entropy (nats; at most log 2) of weights (U, 2)."""
    if len(weights) == 0:
        return {"gate_mean": None, "gate_entropy": None}
    entropy = torch.special.entr(weights).sum(1).mean()
    return {"gate_mean": float(weights[:, 1].mean()), "gate_entropy": min(float(entropy), math.log(2))}
