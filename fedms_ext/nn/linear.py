"""Decide which modules are linear layers that can get experts or a quantized weight, and why others cannot."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, with the Python module that defines it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's Conv1D, a linear layer that stores its weight as (K, N).

    The class is recognized by its name, so that transformers need not be installed.
    """
    return class_name(module) == "transformers.pytorch_utils.Conv1D"


def is_transposed(layer: nn.Module) -> bool:
    """Return whether the original class of a layer stores its weight as (K, N)."""
    return not isinstance(layer, nn.Linear) or not issubclass(getattr(layer, "plain", nn.Linear), nn.Linear)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Linear`, a subclass of it, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features, (K, N), of a linear layer (see `is_linear`)."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    inputs, outputs = layer._parameters["weight"].shape
    return inputs, outputs


def replaced_forward(module: nn.Module) -> str | None:
    """Return why a module does not compute what its class defines, or None if it does."""
    if "forward" not in vars(module):
        return None
    return "its forward method was replaced, which offloading and patching do; undo that first"


def passed_by(module: nn.Module) -> str | None:
    """Return why computing a module from its parameters differs from calling it, or None if it does not.

    Hooks (activation steering, FSDP, ZeRO-3) and a `forward` that was replaced on the instance (offloading) run only when
    the module is called.
    """
    if reason := replaced_forward(module):
        return reason
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would not run; remove them first"
    return None


def unplain(module: nn.Module) -> str | None:
    """Return why the weight or the bias is not an ordinary parameter, or None if both are."""
    for name in ("weight", "bias"):
        tensor = module._parameters.get(name)
        if tensor is not None and type(tensor) is not nn.Parameter:
            return f"its {name} is a {type(tensor).__name__}, which does not hold its values itself"
    return None


def obstacle(layer: nn.Module) -> str | None:
    """Return why a layer cannot get experts or a quantized weight in place, or None if it can.

    Accepted are `nn.Linear`, subclasses of it that compute the same function, and GPT-2's Conv1D, if their only tensors are
    a weight and a bias that are parameters. Not accepted are layers whose weight is computed (pruned, parametrized or
    normalized) and layers that hold other tensors. Hooks are no obstacle, since the layer stays the same object.
    """
    if not is_linear(layer):
        return "it is not a linear layer"
    if reason := replaced_forward(layer):
        return reason
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter but computed (pruned or parametrized); make it permanent first"
    extra = [name for name, _ in layer.named_parameters(recurse=False) if name not in ("weight", "bias")]
    extra += [name for name, _ in layer.named_buffers(recurse=False)] + [name for name, _ in layer.named_children()]
    if extra:
        return f"besides its weight and bias it holds {', '.join(extra)}, on which its output may depend"
    if reason := unplain(layer):
        return reason
    if weight.dim() != 2:
        return f"its weight has the shape {tuple(weight.shape)}, not that of a matrix"
    if isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward and not _computes_linear(layer):
        return "its class has a forward method of its own, which does not compute x W^T + b"
    return None


@torch.no_grad()
def _computes_linear(layer: nn.Linear) -> bool:
    """Return whether a subclass computes what `nn.Linear` computes, tried on two random rows."""
    weight: Tensor = layer.weight
    if weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        found = type(layer).forward(layer, x)
    except Exception:  # code of a stranger may raise anything
        return False
    expected = F.linear(x, weight, layer.bias)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, 1e-2, 1e-4)


# Attributes and methods of a weight that do not use its values.
_FACTS = {"dtype", "device", "shape", "size", "requires_grad", "ndim", "dim", "numel", "is_meta", "layout", "element_size"}
# Methods whose name holds one of these words do not take part in a forward pass.
_BESIDE = ("init", "reset", "tie", "load", "save", "repr", "prune")


def reader(model: nn.Module, name: str) -> str | None:
    """Return the class whose code reads `<layer>.weight` instead of calling the layer, or None if there is none.

    The source code of all modules that contain the layer is searched. PyTorch's encoder layer is not reported, because
    `attach` and `quantize` switch off the fused path in which it reads the weights.
    """
    steps = name.split(".")
    for depth in range(len(steps)):
        outer = model.get_submodule(".".join(steps[:depth]))
        if not isinstance(outer, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            kind: type = type(outer)
            if tuple(steps[depth:]) in _weights_read(kind, _own_forward(outer)):
                return class_name(outer)
    return None


def _own_forward(module: nn.Module) -> object:
    """Return the function of a forward method that was set on the instance, or None. What decorates it is left out."""
    found = vars(module).get("forward")
    if found is None:
        return None
    found = inspect.unwrap(found)
    return inspect.unwrap(getattr(found, "__func__", found))


@lru_cache(maxsize=1024)
def _weights_read(kind: type, replaced: object) -> frozenset[tuple[str, ...]]:
    """Return the attribute paths from `self` to the submodules whose weight the methods of a class read.

    `replaced` is the function of the forward method that was set on the instance, or None.
    """
    methods = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items() if base is not nn.Module}
    if replaced is not None:
        methods["forward"] = replaced
    found: set[tuple[str, ...]] = set()
    for name, method in methods.items():
        method = inspect.unwrap(method) if callable(method) else method
        beside = name.startswith("__") or any(word in name for word in _BESIDE)
        if isinstance(method, FunctionType) and not beside and "weight" in method.__code__.co_names:
            found |= _paths_read(method)
    return frozenset(found)


def _paths_read(method: FunctionType) -> set[tuple[str, ...]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return set()
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
            harmless.update(node.args)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            harmless.add(node.left)
    return {
        path for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in harmless
        and (path := _path(node.value))
    }


def _path(node: ast.expr) -> tuple[str, ...]:
    """("a", "b") for the expression self.a.b; empty for any other."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()
