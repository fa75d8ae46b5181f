"""FedALT (Bian et al., arXiv 2503.11880) as a method of one's own: an individual LoRA, which the client trains and sends, beside
a frozen rest-of-world LoRA, the average of all other clients' individual ones, and a private mixer that weighs the two for
each input. Our choice: one weight a sample, by which outputs are mixed, or layers by `gate.mixing = "layers"`.

    FEDMS_PLUGINS=fedalt PYTHONPATH=examples fedms compare digits --methods fedavg,fedms,fedalt
"""
from __future__ import annotations

from dataclasses import replace

import torch
from fedms import BroadcastPolicy, Constant, Method, register_method
from fedms.federated.client import Private
from fedms.methods.mixing import Mixture, train_mixture, train_together
from fedms.methods.steps import class_counts

COUNTS = "class_counts"


class FedALT(Method):
    personal = ("stage1", "stage2")

    def __init__(self, config):
        super().__init__(config)
        private_gate = config.gate.model_copy(update={"training": "private"})
        self.mixture = Mixture(config.model_copy(update={"gate": private_gate}))

    def broadcast_policy(self, stage, name):
        return BroadcastPolicy.NEVER if name.startswith("gate/") else BroadcastPolicy.EVERY_ROUND

    def statistics(self, classes):                  # the server adds up how many samples there are
        return {COUNTS: torch.zeros(classes, dtype=torch.float64)}

    def most_training(self, name):                  # individual LoRAs drift apart over the whole run
        lr, epochs = super().most_training(name)
        return lr, 2 * epochs * (self.config.stage1.rounds + self.config.stage2.rounds)

    def client_step(self, model, client, private, message):
        counts, rest = {COUNTS: class_counts(model, client.train)}, self.rest_of_world(private, message)
        self.mixture.load(model, private, rest, client.trained_depth(message), self.initial(model))
        reply, after = train_mixture(self.mixture, model, client, private, rest, train_together)
        reply = replace(reply, tensors=model.read_trained("local"), statistics={} if COUNTS in private.tensors else counts)
        return reply, Private({**after.tensors, **counts})

    def predict(self, model, part, private, final):
        return self.mixture.predict(model, part, private, self.rest_of_world(private, final), self.initial(model))

    def rest_of_world(self, private, message):
        """The message without the client's own share of the average; exact where all clients take part in each round."""
        if COUNTS not in private.tensors or COUNTS not in message.statistics:
            return message                          # a first visit: all begin alike
        own = float(private.tensors[COUNTS].sum() / message.statistics[COUNTS].sum())       # its share
        rest = {name: (t - own * private.tensors[name]) / (1 - own) if name in private.tensors and own < 1 else t
                for name, t in message.tensors.items()}
        return replace(message, tensors=rest)


register_method("fedalt", FedALT, "an individual and a rest-of-world expert, mixed by each client's own gate",
                trained="a private expert and gate beside the average of all others", sent="the private expert",
                tuned=(Constant("gate.lr", 1e-4, 1e-2),), weight=lambda config: config.gate.weight, color="#0d9488")
