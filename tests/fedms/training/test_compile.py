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
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import own_loss_of

SETS = ["data.max_samples=24", 'model.targets=["q_proj", "fc1"]', "clients.count=1", "clients.unseen=0", "lora.rank=2",
        "run.threads=1", "sal.cache=off"]


def digits(_):
    return load_config("digits", SETS)


def language(folder):
    tiny.write_federation(folder, ["amy", "bob"], 16, lambda who, number: who * (1 + number % 3))
    return tiny.configuration(folder, 'model.targets=["q_proj","down_proj"]', "lora.rank=2")


# Two layers of each of three blocks are applied. The step starts from the inputs: without a cache, or as all blocks are trained.
@pytest.mark.parametrize("configuration, depth", [(digits, 2), pytest.param(language, 3, marks=pytest.mark.skipif(
    "FEDMS_FULL" not in os.environ, reason="6 seconds: make test-full"))], ids=["classification", "causal_lm"])
def test_a_training_step_is_one_graph_with_the_fused_operators_inside(configuration, depth, tmp_path):
    config = configuration(tmp_path)
    foundation = models.load(config.model, config.task.kind)
    model = ExpertModel(foundation, data.load(config.data, foundation), config)
    draw = torch.Generator().manual_seed(0)
    model.load("global", {name: torch.randn(t.shape, generator=draw) / 4 if name.endswith("lora_b") else t
                          for name, t in model.initial(0).items()}, depth=depth, applied_depth=3)
    loss, graphs = own_loss_of(model, "global")(Subset(torch.arange(8))), []

    def keeping(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    batch = loss.read(torch.arange(8))
    compiled = torch.compile(loss.compute, fullgraph=True, backend=aot_autograd(fw_compiler=keeping))
    found, wanted = (torch.autograd.grad(each(*batch), loss.params) for each in (compiled, loss.compute))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert any(g.abs().max() > 0 for g in found)
    forward, backward = ([str(node.target) for node in graph.graph.nodes if "expert_linear" in str(node.target)]
                         for graph in graphs)
    assert forward == ["fedms_ext.expert_linear.default"] * 6
    assert backward == ["fedms_ext.expert_linear_backward.default"] * (2 * depth)
