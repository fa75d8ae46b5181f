"""FedQuad (Li et al., arXiv 2506.01001) as a method of one's own: federated averaging in which each device trains as many blocks
from the output on as it has time and memory for, and keeps what the backward pass needs of the activations in int8.

    FEDMS_PLUGINS=fedquad PYTHONPATH=examples fedms compare digits --methods fedavg,fedquad --set sal.schedule=all

The depth of each device is a setting of every method: `sal.schedule = "all"`, with `sal.visit_seconds` and `flops`, or `memory`, in
`clients.budgets`. Of the paper the abstract was at hand, which names int8 nowhere. Our choices: all trained blocks keep int8 with
one scale a row, where the paper chooses for how many blocks it does so; `memory` does not know that less is kept.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
from fedms import register_method
from fedms.methods.fedavg import FedAvg


def quantize(tensor):
    """Return int8 values with one scale for each row of the last dimension; the error is at most half a scale."""
    scale = tensor.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny) / 127
    return (tensor / scale).round().to(torch.int8), scale


@contextmanager
def int8_activations(weights):
    """Keep in int8 what autograd keeps for the backward pass of matrices of floats, but for those that live on: the weights."""
    kept = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor):
        large = tensor.dtype == torch.float32 and tensor.dim() > 1 and tensor.shape[-1] > 1
        return quantize(tensor) if large and tensor.untyped_storage().data_ptr() not in kept else tensor

    def unpack(packed):
        return packed[0] * packed[1] if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class FedQuad(FedAvg):
    """Federated averaging with activations in int8 (see the module)."""

    def client_step(self, model, client, private, message):
        module = model.foundation.module
        with int8_activations([*module.parameters(), *module.buffers(), *model.heads.parameters()]):
            return super().client_step(model, client, private, message)


register_method("fedquad", FedQuad, "federated averaging that keeps activations in int8",
                trained="as fedavg, its activations kept in int8", sent="all of it", color="#4338ca")
