"""A client's training step below `torch.compile`: one graph, with the fused operators inside."""
from __future__ import annotations

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from fedms import data, models
from fedms.config import load_config
from fedms.data.subset import Subset
from fedms.training.expert_model import ExpertModel

SETS = ["data.max_samples=24", 'model.targets=["q_proj", "fc1"]', "clients.count=1", "clients.unseen=0", "lora.rank=2",
        "run.threads=1"]


def test_a_training_step_is_one_graph_with_the_fused_operators_inside():
    config = load_config("digits", SETS)
    foundation = models.load(config.model)
    model = ExpertModel(foundation, data.load(config.data, foundation), config)
    draw = torch.Generator().manual_seed(0)
    model.load("global", {name: torch.randn(t.shape, generator=draw) / 4 if name.endswith("lora_b") else t
                          for name, t in model.initial(0).items()}, depth=2, applied_depth=3)
    part, rows = Subset(torch.arange(8)), torch.arange(8)
    inputs, targets, graphs = model.inputs(part.indices), model.targets(part, rows), []

    def loss(inputs, targets):
        opinion = model.task.opinion(model.heads["global"], model.foundation.features(inputs).float(), targets)
        return model.task.loss(opinion, targets)

    def keeping(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with model.stream("global"):
        compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keeping))
        params = list(model.trainable("global").values())
        found, wanted = (torch.autograd.grad(each(inputs, targets), params) for each in (compiled, loss))
    assert all(map(torch.equal, found, wanted)) and any(g.abs().max() > 0 for g in found)
    forward, backward = ([str(node.target) for node in graph.graph.nodes if "fedms_ext" in str(node.target)] for graph in graphs)
    assert forward == ["fedms_ext.expert_linear.default"] * 6       # two layers of each of the three blocks that are applied
    assert backward == ["fedms_ext.expert_linear_backward.default"] * 4     # two blocks are trained
