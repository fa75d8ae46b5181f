"""FedDPA (Yang et al., NeurIPS 2024, arXiv 2403.19211), its sequential form FedDPA-F: a global LoRA by federated
averaging, then a private local one that starts as its copy, and at inference a weight of the local one for each sample:

    weight(x) = clip(scale * mean over s of cos(f(x), f(x_s)), 0, 1)

with x_s some training samples of the client and f the frozen foundation model's features. Nothing is learned about the
weights. The two are mixed inside each layer, as in the paper; no source gave the scale for our features, so it is
`[feddpa] scale`."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private
from fedms.federated.lockstep import Visiting
from fedms.federated.method import Prediction
from fedms.methods.fedavg_ft import FedAvgFT
from fedms.seeds import generator
from fedms.training.expert_model import ExpertModel
from fedms.training.layer_mixture import all_layer_mixture

REFERENCES = "feddpa/references"        # (S, D) features of training samples


class FedDPA(FedAvgFT):
    """FedDPA (see the module): both experts mixed by similarity to a client's own samples."""

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        reply, after = yield from super().visit(model, client, private, message)
        if message.stage == "stage2" and REFERENCES not in after.tensors:
            drawn = torch.randperm(len(client.train), generator=generator(self.config.run.seed, "feddpa", client.id))
            features = model.features(client.train).cpu()[drawn[:self.settings.samples]]
            after = replace(after, tensors={**after.tensors, REFERENCES: features.clone()})
        return reply, after

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        prediction = super().predict(model, part, private, final)
        if REFERENCES not in private.tensors:               # never visited in stage 2: the global one alone
            return replace(prediction, personalized=prediction.global_, local=None)
        own = self._weight(model.features(part), private.tensors[REFERENCES].to(model.device))
        weights = torch.stack([1 - own, own], dim=1)
        return replace(prediction, personalized=all_layer_mixture(model, part, weights), weights=weights)

    def _weight(self, features: Tensor, references: Tensor) -> Tensor:
        """Weights (n,) of the local expert for features (n, D)."""
        similar = F.normalize(features, dim=1) @ F.normalize(references, dim=1).T
        return (self.settings.scale * similar.mean(1)).clamp(0, 1)
