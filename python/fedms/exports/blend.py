"""Both experts of a client as one LoRA adapter, where the layers mix them by a fixed weight.

With W x + (1 - w) s_g B_g A_g x + w s_l B_l A_l x in each layer, s being the scales of the pairs, one pair does the same:

    A = [A_g; A_l],      B = [(1 - w) s_g B_g, w s_l B_l],      with the scale 1
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedms import methods
from fedms.config import RunConfig
from fedms.errors import ConfigError, RunFolderError
from fedms.exports.trained_run import TrainedRun
from fedms.tensors import Tensors
from fedms.training.expert_model import EXPERTS, ExpertModel


def check_blend(config: RunConfig) -> None:
    """Raise ConfigError unless the experts of a run's clients can be blended; the message names another format."""
    if config.task.kind != "causal_lm":
        why = f"the run is of task.kind {config.task.kind!r}, whose heads and class priors are mixed outside of the layers"
    elif config.method_row.weight is None:
        why = f"the method {config.run.method} mixes no experts inside the layers"
    elif config.expert_weight is None:
        why = "gate.weight is unset, so a gate chooses the weights anew for each token"
    elif config.gate.mixing != "layers":
        why = f'gate.mixing = "{config.gate.mixing}" runs the model once for each expert'
    else:
        return
    raise ConfigError(f"--format: got blend, but {why}, which one adapter cannot do; accepted: peft for an adapter of each "
                      "expert, merged for one expert in the weights, mixture for fedms predict and fedms.load; to blend, train "
                      'a run with the method fedms, gate.mixing = "layers" and gate.weight')


def blends(trained: TrainedRun, model: ExpertModel) -> dict[str, Tensors]:
    """Return the blended pairs of every client with an expert of its own.

    In layers where a client trains nothing, its pair is a copy of the global one, and the blend is that pair again.

    Args:
        trained: What the run trained; :func:`check_blend` accepts its configuration.
        model: The model that the tensors belong to.

    Returns:
        Tensors by name for each "client-ID": A (2r, in) and B (out, 2r), which are applied with the scale 1.

    Raises:
        RunFolderError: If no client's own expert is at hand.
    """
    method, own = methods.create(trained.task.config), trained.task.config.expert_weight
    found = {}
    for client, private in sorted(trained.private.items()):
        if not private.has_expert:
            continue
        model.clear()
        method.speaker(model, private, trained.final)       # loads both experts
        pairs = [model.read_applied(expert) for expert in EXPERTS]
        tensors: Tensors = {}
        for layer, module in model.layers.items():
            a, b = f"expert/{layer}.lora_a", f"expert/{layer}.lora_b"
            if a in pairs[0]:
                scales = [module.experts[expert].scale for expert in EXPERTS]
                factors = [(1 - own) * scales[0], own * scales[1]]
                tensors[a], tensors[b] = stacked([(pair[a], pair[b]) for pair in pairs], factors)
        found[f"client-{client}"] = tensors
    if not found:
        raise RunFolderError("the run has no client's own expert at hand that could be blended with the global one; name the "
                             "folder where a client keeps it by --states DIR, or write the global one by --format peft")
    return found


def stacked(pairs: Sequence[tuple[Tensor, Tensor]], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return one pair (A, B) with B A = sum over i of factors[i] * B_i A_i.

    Args:
        pairs: A_i (r_i, in) and B_i (out, r_i), which may differ in rank.
        factors: A factor for each pair.

    Returns:
        A (r, in) and B (out, r), where r is the sum of the ranks.
    """
    return torch.cat([a for a, _ in pairs]), torch.cat([factor * b for factor, (_, b) in zip(factors, pairs)], 1)
