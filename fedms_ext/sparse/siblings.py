"""`group`: compute layers that share their input together."""
from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedms_ext.nn.linear import class_name
from fedms_ext.nn.siblings import SharesInput, Siblings


def group(layers: Sequence[SharesInput], *, on_cpu: bool = True) -> Siblings:
    """Compute layers that are called with the same input together, such as the query, key and value of an attention layer.

    The first of the layers that is called with x computes the outputs of all of them, and the others return theirs. On a CPU, with
    weights in 8 bits and many rows, x is then quantized once, and the kernels add up the gradient of x. Each output has the same bits
    as by itself, but for dropout, whose masks come from one seed for the group; the gradient of x is added up in another order.

    On a GPU of compute capability 9.0 the CUDA kernels compute up to four layers in bf16 or fp16 with one product forward, and the
    gradient of x is one product. They do so in training, where they are chosen for each of the layers, and where both passes together
    were measured to be faster than one by one, at the first call of a shape. There must be no dropout, and at most 64 ranks in all,
    where those of a layer count up to a multiple of 16. The outputs may differ from those of a layer by itself in their rounding.

    Under autocast on a GPU x is converted to its dtype once for all layers, and each weight by itself; the outputs and gradients have
    the dtypes that they have one by one, and A and B are not converted, so their gradients are not rounded to 16 bits.

    In all other cases (other weights, few rows or autocast on a CPU, torch.compile, inference mode, profiling, segments, hooks that
    run before a layer, or dropout or a gate in some of the layers only) each layer is computed by itself.

    A layer that is called with another tensor than its siblings, or after x was changed in place, is computed for its own input.
    So grouping layers that are no siblings is slower, but never wrong. The outputs share one node of autograd's graph, as those of
    `torch.unbind` do: two backward passes, each from another output, need `retain_graph=True` in the first.

    Args:
        layers: At least two layers with the same number of input features. A layer leaves the group that it was in.
        on_cpu: Whether to compute them together on a CPU, too.

    Returns:
        The group. Its method `part` undoes the grouping.

    Raises:
        TypeError: If one of them is neither an `ExpertLinear` nor a layer of PEFT that `accelerate` took over.
        ValueError: If there are fewer than two layers, one of them twice, or their numbers of input features differ.
    """
    for layer in layers:
        if not isinstance(layer, SharesInput):
            raise TypeError(f"group takes layers with experts; this is a {class_name(layer)}; call fedms_ext.attach first, or "
                            "fedms_ext.accelerate on a PEFT model")
    if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"got {len(layers)} layers, {len({id(layer) for layer in layers})} of them distinct; a group is at least "
                         "two layers, each of them once")
    widths = [layer.in_features for layer in layers]
    if len(set(widths)) > 1:
        raise ValueError(f"the layers have {widths} input features; layers that share their input have the same number")
    for layer in layers:
        if layer.siblings is not None:
            layer.siblings.part()
    siblings = Siblings(layers, on_cpu)
    for layer in layers:
        layer.siblings = siblings
    return siblings


# Names of layers beside one another that read the same input: the query, key and value of an attention layer, and the two
# layers of a gated MLP that are multiplied.
_NAMES = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"),
    ("q", "k", "v"), ("wq", "wk", "wv"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)


def group_siblings(model: nn.Module, on_cpu: bool = True) -> list[Siblings]:
    """Group the layers with experts that share their input, as far as their names tell.

    They are children of one module, have one of the usual sets of names and the same number of input features. Where the names
    mislead, as in the attention of a decoder to its encoder, the layers notice it at their first call; see `Siblings`.

    Args:
        model: Any module. Layers that are in a group already stay there.
        on_cpu: As in `group`. If it is true, those groups are computed together on a CPU from now on, too.

    Returns:
        The new groups, in the model's order.
    """
    groups = []
    for module in model.modules():
        for names in _NAMES:
            layers = [layer for name in names if isinstance(layer := module._modules.get(name), SharesInput)]
            same = len({layer.in_features for layer in layers}) == 1
            there = {layer.siblings for layer in layers}
            if len(layers) > 1 and same and there == {None}:
                groups.append(group(layers, on_cpu=on_cpu))
            for old in there - {None}:
                old.on_cpu |= on_cpu
    return groups
