"""Fed-SB (Singhal et al., arXiv 2502.15436): between two frozen frames only a square core R (r x r) is trained and averaged,

    y = W x + s B R A x,      mean(B R_i A) = B mean(R_i) A,

so averaging loses nothing, and a layer costs r^2 numbers to send, whatever its widths. Our choices: the frames are random, A with
orthonormal rows and B with orthonormal columns, drawn by everybody from the run's seed, and R begins at zero (the paper takes A, B
and the first R from a singular value decomposition of gradients on data, which our server does not have); the head is trained and
averaged as in FedAvg. The paper's ranks are larger than those of LoRA pairs: set `[lora] rank`."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedms.data.subset import Subset
from fedms.federated.client import Client, Group, Loss, Message, Private, Reply, train, validate
from fedms.federated.method import BroadcastPolicy, Prediction
from fedms.methods.fedavg import FedAvg
from fedms.methods.steps import lr_of, make_reply
from fedms.seeds import generator
from fedms.tensors import Tensors, is_a
from fedms.training.answering import Speaker
from fedms.training.expert_model import ExpertModel


class FedSB(FedAvg):
    """Federated averaging of the cores between frozen frames (see the module). Under a pair's name for B travels its core."""

    def initial(self, model: ExpertModel) -> Tensors:
        rank = self.config.lora.rank
        return {name: torch.zeros(rank, rank) if is_core(name) else self._frame(name, tensor.shape) if is_a(name) else tensor
                for name, tensor in super().initial(model).items()}

    def broadcast_policy(self, stage: str, name: str) -> BroadcastPolicy:
        return BroadcastPolicy.NEVER if is_a(name) else super().broadcast_policy(stage, name)

    def assembled(self, model: ExpertModel, tensors: Tensors) -> Tensors:
        found = dict(tensors)
        for name in filter(is_core, tensors):
            layer = model.layers[name.removeprefix("expert/").removesuffix(".lora_b")]
            found[name] = self._frame(name, layer.lora_b["global"].shape) @ tensors[name]
            found[a_of(name)] = self._frame(a_of(name), layer.lora_a["global"].shape)
        return found

    def client_step(self, model: ExpertModel, client: Client, private: Private, message: Message) -> tuple[Reply, Private]:
        model.load("global", self.assembled(model, {**message.constants, **message.tensors}),
                   depth=client.trained_depth(message), applied_depth=message.applied_depth, keep=is_a)
        received, params = validate(model, client, "global"), model.trainable("global")
        cores = {name: Core(p, self._frame(name, p.shape), message.tensors[name]) for name, p in params.items() if is_core(name)}
        trained = {**params, **{name: core.values for name, core in cores.items()}}

        def loss_on(part: Subset) -> Loss:
            def loss(rows: Tensor) -> Tensor:
                for core in cores.values():
                    core.show()
                return model.task.loss(model.opinion("global", part, rows), model.targets(part, rows))
            return loss
        try:
            mean, moments = train(model, client, message, private, [Group(trained, lr_of(client, message))], loss_on)
        finally:
            for core in cores.values():
                core.close()
        sent = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        size = sum(p.numel() for p in trained.values())
        return (make_reply(client, sent, received.accuracy, received, loss=mean, trained_params=size),
                Private({**private.tensors, **moments}))

    def predict(self, model: ExpertModel, part: Subset, private: Private, final: Message) -> Prediction:
        return super().predict(model, part, private, replace(final, tensors=self.assembled(model, final.tensors)))

    def speaker(self, model: ExpertModel, private: Private, final: Message) -> Speaker:
        return super().speaker(model, private, replace(final, tensors=self.assembled(model, final.tensors)))

    def _frame(self, name: str, shape: torch.Size) -> Tensor:
        """The frozen A (r, K) or B (N, r) of a pair, with orthonormal rows or columns as far as there are dimensions for them."""
        drawn = torch.randn(max(shape), min(shape), generator=generator(self.config.run.seed, "frame", name), dtype=torch.float64)
        frame = torch.linalg.qr(drawn).Q.float()
        return frame if frame.shape == shape else frame.T.contiguous()


class Core:
    """The trained square of one pair, whose product with the frame is the B that the model holds.

    Args:
        b: the model's B (N, r). Its gradient becomes that of the core: dR = frame^T dB.
        frame: (N, r), frozen.
        values: (r, r), what the core begins as.
    """

    def __init__(self, b: torch.nn.Parameter, frame: Tensor, values: Tensor) -> None:
        self._b, self._frame = b, frame.to(b.device)
        self.values = values.to(b.device, copy=True).requires_grad_()
        b.grad = None       # Another training of this B may have left its last gradient, to which the first one would be added.
        self.close: Callable[[], None] = b.register_post_accumulate_grad_hook(self._pass_on).remove

    @torch.no_grad()
    def show(self) -> None:
        """Puts the product into the model."""
        self._b.copy_(self._frame @ self.values)

    def _pass_on(self, b: Tensor) -> None:
        gradient = self._frame.T @ b.grad
        self.values.grad = gradient if self.values.grad is None else self.values.grad + gradient
        b.grad = None


def is_core(name: str) -> bool:
    """Whether a tensor is the core of a pair."""
    return name.endswith(".lora_b")


def a_of(name: str) -> str:
    """The name of the A beside a core."""
    return f"{name.removesuffix('.lora_b')}.lora_a"
