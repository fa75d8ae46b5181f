"""FedRep (Collins et al., arXiv 2102.07078): FedPer's parts, trained one after the other. At each visit the private head
is fitted to the body as it arrives, for `[fedrep] head_epochs`; then the head stays and the body, the LoRA expert, is
trained and sent. Needs the linear head."""
from __future__ import annotations

from fedms.federated.client import Client, Message, Private, validate
from fedms.federated.lockstep import Training, Visiting
from fedms.methods.fedper import FedPer
from fedms.methods.steps import improves, lr_of, make_reply, shared_expert
from fedms.training.expert_model import ExpertModel


class FedRep(FedPer):
    """FedRep (see the module): the private head is trained first, then the shared pairs."""

    personal = ("stage1", "stage2")

    def most_training(self, name: str) -> tuple[float, int]:
        lr, epochs = super().most_training(name)
        return lr, epochs + self.settings.head_epochs

    def visit(self, model: ExpertModel, client: Client, private: Private, message: Message) -> Visiting:
        start, body = model.initial(self.config.run.seed), shared_expert(model, message, self.config)
        # At the depth that is trained afterwards, though the body stays now: the blocks below it are constant in both parts.
        depth, pairs = client.trained_depth(message), lambda name: name.startswith("expert/")
        model.load("global", {**start, **private.tensors, **body}, depth=depth, applied_depth=message.applied_depth, keep=pairs)
        received, before = validate(model, client, "global"), model.read_trained("global")
        _, head_moments, head_size = yield Training("global", message, lr_of(client, message), epochs=self.settings.head_epochs)
        trained = model.read_trained("global")
        own = trained if improves(client, received, validate(model, client, "global")) else before

        model.load("global", {**body, **own}, depth=depth, applied_depth=message.applied_depth, keep=lambda name: name in own)
        loss, moments, size = yield Training("global", message, lr_of(client, message))
        reply = make_reply(client, model.read_trained("global"), received.accuracy, received, loss=loss,
                           trained_params=size + head_size)
        return reply, Private({**own, **head_moments, **moments})
