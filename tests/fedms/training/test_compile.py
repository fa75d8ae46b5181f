"""A client's training step below `torch.compile`: one graph, with the fused operators inside."""
from __future__ import annotations

import os

import pytest
import tiny_language_models as tiny
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from fedms import data, models
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.methods.mixing import Mixture
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import own_loss_of

SETS = ["data.max_samples=24", 'model.targets=["q_proj", "fc1"]', "clients.count=1", "clients.unseen=0", "lora.rank=2",
        "run.threads=1", "run.device=cpu"]
APPLIED, ROWS = 3, torch.arange(8)


def digits(_, *sets):
    return load_config("digits", [*SETS, *sets])


def language(folder, *sets):
    tiny.write_federation(folder, ["amy", "bob"], 16, lambda who, number: who * (1 + number % 3))
    return tiny.configuration(folder, 'model.targets=["q_proj","down_proj"]', "lora.rank=2", *sets)


def loss_of(config, depth, mixed):
    """The loss of a step of stage 1, or of a step that trains the mixture; no pair's B is zero."""
    foundation = models.load(config.model, config.task.kind)
    model = ExpertModel(foundation, data.load(config.data, foundation), config)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=draw) / 4 if name.endswith("lora_b") else t for name, t in model.initial(0).items()}
    model.load("global", tensors, depth=0 if mixed else depth, applied_depth=APPLIED)
    if not mixed:
        return own_loss_of(model, "global")(Subset(ROWS))
    model.load("local", tensors, depth=depth, applied_depth=APPLIED)
    return Mixture(config).joint_loss(model)(Subset(ROWS))


def gradients(loss, compute, batch):
    torch.manual_seed(3)    # of dropout
    return torch.autograd.grad(compute(*batch), loss.params)


# Settings, the number of trained blocks of the three that are applied, whether it is the step of a mixture, and the operators that are
# expected in both passes. Two layers of each block have pairs, or all of them an int8 weight; a step starts from the cached prefix.
# Mixed inside its layers, the mixture has a pass of its own besides that of the local expert.
IN_LAYERS = ["gate.mixing=layers", "gate.features=prefix"]
CASES = {
    "classification": (digits, ["lora.dropout=0.5"], 2, False, (4, 4)),
    "from the inputs": (digits, ["sal.cache=off"], 2, False, (6, 4)),
    "all blocks": (digits, [], 3, False, (6, 6)),
    "int8": (digits, ["model.frozen=int8"], 2, False, (12, 10)),
    "bf16": (digits, ["run.dtype=bf16"], 2, False, (4, 4)),
    "mixture": (digits, [], 2, True, (4, 4)),
    "mixture in layers": (digits, IN_LAYERS, 2, True, (8, 8)),
    "language": (language, [], 2, False, (4, 4)),
    "mixture of language": (language, [], 2, True, (4, 4)),
    "mixture of language in layers": (language, IN_LAYERS, 2, True, (8, 8)),
}
LONG = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="35 seconds in all: make test-full")


@pytest.mark.parametrize("name", [name if name == "classification" else pytest.param(name, marks=LONG) for name in CASES])
def test_a_training_step_is_one_graph_with_the_fused_operators_inside(name, tmp_path):
    configuration, sets, depth, mixed, (ahead, back) = CASES[name]
    loss, graphs = loss_of(configuration(tmp_path, *sets), depth, mixed), []

    def keeping(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    batch = loss.read(ROWS)
    compiled = torch.compile(loss.compute, fullgraph=True, backend=aot_autograd(fw_compiler=keeping))
    wanted = gradients(loss, loss.compute, batch)
    for _ in range(2):
        found = gradients(loss, compiled, batch)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert any(g.abs().max() > 0 for g in found)
    forward, backward = ([str(node.target) for node in graph.graph.nodes if "expert_linear" in str(node.target)]
                         for graph in graphs)
    assert forward == ["fedms_ext.expert_linear.default"] * ahead
    assert backward == ["fedms_ext.expert_linear_backward.default"] * back
