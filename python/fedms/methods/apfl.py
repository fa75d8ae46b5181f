"""APFL (Deng et al., arXiv 2003.13461): a FedAvg model w, a private one v, and a weight alpha of each client's own,

    z(x) = alpha * z_v(x) + (1 - alpha) * z_w(x),

with v and alpha trained on CE(z). The weight is the same for all samples: FedMS without a gate.

Our choices: outputs are mixed, as FedMS does it (the paper mixes parameters, which is the same for linear models); while
v is trained, w is the one received, as it is the average that the client will mix with. alpha is the sigmoid of what is
trained, and begins at `[apfl] alpha`. Both models are trained at every visit, in both stages."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private, Reply
from fedms.federated.local_training import Group, train
from fedms.federated.lockstep import Visiting
from fedms.federated.method import Prediction
from fedms.methods.fedavg import FedAvg
from fedms.methods.steps import BestEpoch, load_private, make_reply, private_lr_of, shared_expert, shared_visit
from fedms.tasks import Score
from fedms.tensors import Tensors
from fedms.training.answering import Speaker
from fedms.training.both import both_opinions, mixed_opinions
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import Loss, own_loss_of
from fedms.training.streams import Batch

ALPHA = "apfl/alpha"        # the logit of alpha, scalar


class APFL(FedAvg):
    """APFL (see the module): shared expert, and a private one mixed with it by a trained scalar."""

    personal = ("stage1", "stage2")

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        shared = shared_expert(model, message, self.config)
        reply, private = yield from shared_visit(model, client, private, message)
        own, private = self._train_own(model, client, private, message, shared)
        size = reply.metrics["trained_params"] + own.metrics["trained_params"]
        return replace(reply, metrics={**own.metrics, "trained_params": size}), private

    def _train_own(self, model: ExpertModel, client: Client, private: Private, message: Message,
                   shared: Tensors) -> tuple[Reply, Private]:
        model.load("global", shared, depth=0, applied_depth=message.applied_depth)
        load_private(model, client, private, message, start=shared)
        alpha = self._alpha(private).to(model.device).requires_grad_()
        params = model.trainable("local")

        def loss_on(part: Subset) -> Loss:
            own, ours = own_loss_of(model, "local")(part), model.frozen_opinions("global", part)

            def compute(alpha: Tensor, ours: Tensor, batch: Batch, targets: Tensor, shift: Tensor | None) -> Tensor:
                opinion = model.opinion_of("local", batch, targets, shift)
                return model.task.loss(model.task.blend(alpha, opinion, ours), targets)
            return replace(own, key=(own.key, "blended"), compute=compute,
                           read=lambda rows: (alpha, ours[model.units(part, rows)], *own.read(rows)))

        def judge() -> Score:
            own = model.opinions("local", client.validation)
            mixed = model.task.blend(alpha.detach(), own, model.frozen_opinions("global", client.validation))
            return model.task.score(mixed, model.targets(client.validation))

        best = BestEpoch(model, client, judge(), judge, lambda: {ALPHA: alpha.detach().to("cpu", copy=True)})
        mean, moments, size = train(model, client, message, private, [
            Group({f"local/{name}": p for name, p in params.items()}, private_lr_of(client, message)),
            Group({ALPHA: alpha}, self.settings.lr)], loss_on, after_epoch=best.after_epoch)
        reply = make_reply(client, {}, None, best.score, loss=mean, trained_params=size)
        return reply, Private({**private.tensors, **best.kept, **best.further, **moments})

    def _alpha(self, private: Private) -> Tensor:
        return private.tensors.get(ALPHA, torch.tensor(self.settings.alpha).logit()).clone()

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        if not private.has_expert:                          # never visited: no model of its own
            return super().predict(model, part, private, final)
        shared = shared_expert(model, final, self.config)
        model.load("global", shared, depth=0, applied_depth=final.applied_depth)
        model.load("local", {**shared, **private.tensors}, depth=final.depth, applied_depth=final.applied_depth)
        alpha = self._alpha(private).to(model.device)
        weight = alpha.sigmoid()
        weights = torch.stack([1 - weight, weight])
        if not model.task.mixes_opinions:
            return Prediction(*mixed_opinions(model, part, lambda units, *_: weights.expand(len(units), 2)))
        ours, own = both_opinions(model, part)
        return Prediction(model.task.blend(alpha, own, ours), ours, own, weights.expand(len(own), 2))

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        speaker = super().speaker(model, private, final)
        if not private.has_expert:
            return speaker
        model.load("local", {**shared_expert(model, final, self.config), **private.tensors}, depth=final.depth,
                   applied_depth=final.applied_depth)
        weight = self._alpha(private).to(model.device).sigmoid()
        weights = torch.stack([1 - weight, weight])[None]
        return Speaker(("global", "local"), lambda features, shared, own: weights)
