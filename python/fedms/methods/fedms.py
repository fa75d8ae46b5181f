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
from torch.nn import functional as F

from fedms.federated.client import Client, Group, Loss, LossOn, Message, Private, Reply, Score, score, train, validate
from fedms.methods.steps import (Method, Prediction, keep_better, lr_of, make_reply, shared_expert,
                                 train_shared)
from fedms.training.expert_model import ResidentModel, Subset, Tensors


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

    def client_step(self, model: ResidentModel, client: Client, private: Private,
                    message: Message) -> tuple[Reply, Private]:
        if message.stage == "stage1":
            return train_shared(model, client, private, message)
        return self._stage2(model, client, private, message)

    def _stage2(self, model: ResidentModel, client: Client, private: Private,
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

    def _fit(self, model: ResidentModel, client: Client, private: Private, message: Message, expert: Group,
             gate: Group) -> tuple[float, Tensors, Tensors]:
        """Trains the local expert and the gate; returns the mean loss, the expert's tensors that are kept, and the
        optimizer's state."""
        own_before, before = validate(model, client, "local"), model.read_applied("local")
        loss, moments = train(model, client, message, private, [expert, gate], self._loss(model))
        kept, _ = keep_better(model, client, message, before, own_before)
        return loss, kept, moments

    def predict(self, model: ResidentModel, part: Subset, private: Private, final: Message) -> Prediction:
        shared = shared_expert(model, final, self.config)
        if not private.has_expert:                          # no local expert: weight 1 on the global one
            model.load("global", shared, depth=final.depth, applied_depth=final.applied_depth)
            logits = model.all_logits("global", part)
            return Prediction(logits, global_=logits)
        self._load(model, private, final, final.depth)
        ours, own = model.both_logits(part)
        mixed, weights = self._mixture(model, part, (ours, own))
        return Prediction(mixed, ours, own, weights)

    # The mixture

    def _load(self, model: ResidentModel, private: Private, message: Message, depth: int) -> None:
        """Loads both experts, the local one to be trained at a depth, and the gate."""
        start = self.initial(model) if self.config.gate.training == "private" else {}
        shared = shared_expert(model, message, self.config)
        model.load("global", shared, depth=0, applied_depth=message.applied_depth)
        model.load("local", {**shared, **private.tensors}, depth=depth, applied_depth=message.applied_depth)
        if self.learns_gate:
            model.load_gate({**start, **private.tensors, **message.tensors})

    def _loss(self, model: ResidentModel) -> LossOn:
        """Mean over a batch of CE(mixture) + own_loss * CE(local). The global expert's logits and the gate's features
        are constants of a sample."""
        own_loss = self.config.stage2.own_loss

        def on(part: Subset) -> Loss:
            mixture = self._mixture_of(model, part)

            def loss(rows: Tensor) -> Tensor:
                labels, own = model.labels(part, rows), model.logits("local", part, rows)
                return F.cross_entropy(mixture(rows, own), labels) + own_loss * F.cross_entropy(own, labels)
            return loss
        return on

    def _mixture_of(self, model: ResidentModel, part: Subset) -> Callable[[Tensor, Tensor], Tensor]:
        """The mixture's logits for rows (B,) of a part, given the local expert's logits (B, C) there."""
        features = model.gate_features(part) if self.learns_gate else torch.empty(len(part), 0)
        if self.config.gate.mixing == "layers":
            return lambda rows, _: model.layer_mixture(part, rows, self._weights(model, features[rows]))
        shared = model.frozen_logits("global", part)

        def mixture(rows: Tensor, own: Tensor) -> Tensor:
            weights = self._weights(model, features[rows], shared[rows], own)
            return mix(weights, shared[rows], own, self.config.gate.on)
        return mixture

    def _weights(self, model: ResidentModel, features: Tensor, shared: Tensor | None = None,
                 own: Tensor | None = None) -> Tensor:
        """The weights (B, 2) of both experts for samples of which the gate sees features (B, D). shared, own (B, C): the
        experts' logits there, where they are known before the gate decides."""
        fixed = self.config.gate.weight
        if fixed is not None:
            return torch.tensor([1 - fixed, fixed]).expand(len(features), 2)
        return model.gate(features)

    @torch.no_grad()
    def _mixture(self, model: ResidentModel, part: Subset,
                 streams: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Logits (n, C) of the mixture and the gate's weights (n, 2) for a whole part. `streams`: the logits of both
        experts, where they are known already."""
        features = model.gate_features(part) if self.learns_gate else torch.empty(len(part), 0)
        if self.config.gate.mixing == "layers":
            weights = self._weights(model, features)
            return model.all_layer_mixture(part, weights), weights
        shared, own = streams or (model.frozen_logits("global", part), model.all_logits("local", part))
        weights = self._weights(model, features, shared, own)
        return mix(weights, shared, own, self.config.gate.on), weights

    def _validate(self, model: ResidentModel, client: Client) -> tuple[Score, Tensor]:
        logits, weights = self._mixture(model, client.validation)
        return score(logits, model.labels(client.validation)), weights


def mix(weights: Tensor, shared: Tensor, own: Tensor, on: str) -> Tensor:
    """Logits (B, C) of the mixture of two experts' logits by weights (B, 2), each sample on its own; on
    "probabilities" the result is the logarithm of the mixed class probabilities."""
    if on == "logits":
        return weights[:, :1] * shared + weights[:, 1:] * own
    both = torch.stack([F.log_softmax(shared, 1), F.log_softmax(own, 1)], dim=1)
    return torch.logsumexp(weights.clamp_min(1e-12).log().unsqueeze(-1) + both, dim=1)


def gate_numbers(weights: Tensor) -> dict[str, float | None]:
    """Mean weight of the local expert and mean entropy (nats; at most log 2) of weights (n, 2)."""
    if len(weights) == 0:
        return {"gate_mean": None, "gate_entropy": None}
    entropy = torch.special.entr(weights).sum(1).mean()
    return {"gate_mean": float(weights[:, 1].mean()), "gate_entropy": min(float(entropy), math.log(2))}
