"""Compile clients' training steps for a GPU that is not there: python compiled_for_cuda.py absent_gpu.so FOLDER

The tensors are fake: they have shapes and a device, and no values. An operator whose tensors lie on two devices is an error.
"""
import ctypes
import importlib.util
import sys
from pathlib import Path

# Before PyTorch is imported; see absent_gpu.cpp.
libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
for library in (libraries / "libc10.so", libraries / "libtorch_cpu.so", sys.argv[1]):
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

from unittest import mock  # noqa: E402

import torch  # noqa: E402
from compiled_steps import CASES, ROWS, Case, assert_fused, compiled, fused, loss_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from fedms_ext.token_loss import FrozenHead  # noqa: E402

GPU = torch.device("cuda", 0)
MODE = FakeTensorMode()


def fake(value):
    """A tensor's place on the GPU; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    with MODE:
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
        return nn.Parameter(there, value.requires_grad) if isinstance(value, nn.Parameter) else there


def move(module: nn.Module, moved: dict[Tensor, Tensor]) -> None:
    """Replace the parameters and buffers of a module, in place; `moved` notes what became of each."""
    for part in module.modules():
        if isinstance(part, FrozenHead):    # which may share its tensors with the model
            part._shared = tuple(None if tensor is None else moved.setdefault(tensor, fake(tensor)) for tensor in part._shared)
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved.setdefault(tensor, fake(tensor))


def check(case: Case, folder: Path) -> None:
    loss, moved = loss_of(case, folder), {}
    batch = tree_map(fake, tuple(loss.read(ROWS)))
    model = loss.model
    for module in (model.foundation.module, model.heads, model.gate, getattr(model.task, "head", nn.Identity())):
        move(module, moved)
    model.device = GPU
    with compiled(loss.compute) as (compute, graphs), MODE:
        gradients = torch.autograd.grad(compute(*batch), [moved[p] for p in loss.params])
    assert {g.device for g in gradients} == {GPU}
    assert_fused(case, graphs)
    for graph in graphs:
        made = [(node, node.meta["val"]) for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        # Only the scales of experts are on the CPU: they are numbers, which pass the dispatcher as a tensor.
        assert {tuple(value.shape) for _, value in made if value.device != GPU} <= {(1,), (2,)}
        for node in fused(graph):
            found = [value for value in node.meta["val"] if value is not None and value.numel()]
            assert {value.device for value in found} == {GPU}
            assert "run.dtype=bf16" not in case.sets or found[0].dtype == torch.bfloat16


if __name__ == "__main__":
    names = ["classification", "bf16", "mixture in layers", "language", "mixture of language in layers"]
    # Autocast asks whether this PyTorch has CUDA.
    with mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False), \
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True):
        for number, name in enumerate(names):
            folder = Path(sys.argv[2]) / str(number)
            folder.mkdir()
            check(CASES[name], folder)
    print(f"{len(names)} steps are compiled for {GPU}")
