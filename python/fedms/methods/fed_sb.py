"""Fed-SB (Singhal et al., arXiv 2502.15436): between two frozen frames only a square core R (r x r) is trained and averaged,

    y = W x + s B R A x,      mean(B R_i A) = B mean(R_i) A,

so averaging loses nothing, and a layer costs r^2 numbers to send, whatever its widths. Our choices: the frames are random, A with
orthonormal rows and B with orthonormal columns, drawn by everybody from the run's seed, and R begins at zero (the paper takes A, B
and the first R from a singular value decomposition of gradients on data, which our server does not have); the head is trained and
averaged as in FedAvg. The paper's ranks are larger than those of LoRA pairs: set `[lora] rank`."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, Message, Private, Reply, validate
from fedms.federated.local_training import Group, train
from fedms.federated.method import BroadcastPolicy, Prediction
from fedms.methods.fedavg import FedAvg
from fedms.methods.steps import lr_of, make_reply
from fedms.seeds import generator
from fedms.tensors import Tensors, is_a
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import own_loss_of


class FedSB(FedAvg):
    """Federated averaging of the cores between frozen frames (see the module).

    Messages and replies hold the core of a pair under the name of its B.
    """

    def initial(self, model: ExpertModel) -> Tensors:
        rank = self.config.lora.rank
        return {name: torch.zeros(rank, rank) if is_core(name) else
                frame(self.config.run.seed, name, tensor.shape).clone() if is_a(name) else tensor
                for name, tensor in super().initial(model).items()}

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        return BroadcastPolicy.NEVER if is_a(name) else super().broadcast_policy(stage, name)

    def assembled(self, model: ExpertModel, tensors: Tensors) -> Tensors:
        found = dict(tensors)
        for name in filter(is_core, tensors):
            layer = model.layers[name.removeprefix("expert/").removesuffix(".lora_b")]
            found[name] = frame(self.config.run.seed, name, layer.lora_b["global"].shape) @ tensors[name]
            found[a_of(name)] = frame(self.config.run.seed, a_of(name), layer.lora_a["global"].shape)
        return found

    def client_step(self, model: ExpertModel, client: Client, private: Private, message: Message) -> tuple[Reply, Private]:
        model.load("global", self.assembled(model, {**message.constants, **message.tensors}),
                   depth=client.trained_depth(message), applied_depth=message.applied_depth, keep=is_a)
        received, params = validate(model, client, "global"), model.trainable("global")
        cores = {name: Core(p, frame(self.config.run.seed, name, p.shape), message.tensors[name])
                 for name, p in params.items() if is_core(name)}
        trained = {**params, **{name: core.values for name, core in cores.items()}}

        def loss_on(part: Subset) -> Callable[[Tensor], Tensor]:
            of_products = own_loss_of(model, "global")(part)

            def loss(rows: Tensor) -> Tensor:
                for core in cores.values():
                    core.show()
                return of_products(rows)
            return loss
        try:
            mean, moments, size = train(model, client, message, private, [Group(trained, lr_of(client, message))], loss_on)
        finally:
            for core in cores.values():
                core.close()
        sent = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        return (make_reply(client, sent, received.accuracy, received, loss=mean, trained_params=size),
                Private({**private.tensors, **moments}))

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        return super().predict(model, part, private, replace(final, tensors=self.assembled(model, final.tensors)))

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        return super().speaker(model, private, replace(final, tensors=self.assembled(model, final.tensors)))


class Core:
    """The trained core of one pair. Its product with the frozen frame is the B that the model holds.

    Args:
        b: The model's B (N, r). Its gradient is turned into that of the core: dR = frame^T dB.
        frozen: The frame (N, r).
        values: The initial core (r, r).
    """

    def __init__(self, b: torch.nn.Parameter, frozen: Tensor, values: Tensor) -> None:
        self._b, self._frame = b, frozen.to(b.device)
        self.values = values.to(b.device, copy=True).requires_grad_()
        b.grad = None       # Another training of this B may have left its last gradient, to which the first one would be added.
        self.close: Callable[[], None] = b.register_post_accumulate_grad_hook(self._pass_on).remove

    @torch.no_grad()
    def show(self) -> None:
        """Copy the product into the model."""
        self._b.copy_(self._frame @ self.values)

    def _pass_on(self, b: Tensor) -> None:
        gradient = self._frame.T @ b.grad
        self.values.grad = gradient if self.values.grad is None else self.values.grad + gradient
        b.grad = None


@lru_cache(maxsize=1024)        # each visit needs the frames of all pairs
def frame(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Draw the frozen A (r, K) or B (N, r) of a pair. The tensor is shared: do not change it in place.

    Its rows or columns, whichever are fewer, are orthonormal.

    Args:
        seed: The seed of the run.
        name: Name of the A or B.
        shape: Its shape.
    """
    drawn = torch.randn(max(shape), min(shape), generator=generator(seed, "frame", name), dtype=torch.float64)
    found = torch.linalg.qr(drawn).Q.float()
    return found if found.shape == shape else found.T.contiguous()


def is_core(name: str) -> bool:
    """Return whether a tensor is the core of a pair."""
    return name.endswith(".lora_b")


def a_of(name: str) -> str:
    """Return the name of the A of the pair that a core belongs to."""
    return f"{name.removesuffix('.lora_b')}.lora_a"
