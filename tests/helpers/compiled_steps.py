"""Training steps of clients, and the graphs that `torch.compile` makes of them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tiny_language_models as tiny
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from fedms import data, models
from fedms.config import RunConfig, load_config
from fedms.data.subset import Subset
from fedms.methods.mixing import Mixture
from fedms.training.expert_model import ExpertModel
from fedms.training.losses import Loss, own_loss_of

SETS = ["data.max_samples=24", 'model.targets=["q_proj", "fc1"]', "clients.count=1", "clients.unseen=0", "lora.rank=2",
        "run.threads=1", "run.device=cpu"]
APPLIED, ROWS = 3, torch.arange(8)


def digits(_: Path, *sets: str) -> RunConfig:
    return load_config("digits", [*SETS, *sets])


def language(folder: Path, *sets: str) -> RunConfig:
    tiny.write_federation(folder, ["amy", "bob"], 16, lambda who, number: who * (1 + number % 3))
    return tiny.configuration(folder, 'model.targets=["q_proj","down_proj"]', "lora.rank=2", *sets)


class Case(NamedTuple):
    """A step of a model of which three blocks are applied, from the cached prefix unless the settings say otherwise.

    Two layers of each block have pairs. With an int8 weight the operator computes all of its six layers.

    Attributes:
        sets: Settings of the run.
        depth: Number of trained blocks.
        mixed: Whether it is the step of a mixture. Mixed inside its layers it has a pass of its own, besides the local expert's.
        operators: How often the fused operator is expected in the forward pass, and in the backward pass.
    """

    configuration: Callable[..., RunConfig]
    sets: Sequence[str]
    depth: int
    mixed: bool
    operators: tuple[int, int]


IN_LAYERS = ["gate.mixing=layers", "gate.features=prefix"]
CASES = {
    "classification": Case(digits, ["lora.dropout=0.5"], 2, False, (4, 4)),
    "from the inputs": Case(digits, ["sal.cache=off"], 2, False, (6, 4)),
    "all blocks": Case(digits, [], 3, False, (6, 6)),
    "int8": Case(digits, ["model.frozen=int8"], 2, False, (12, 10)),
    "bf16": Case(digits, ["run.dtype=bf16"], 2, False, (4, 4)),
    "mixture": Case(digits, [], 2, True, (4, 4)),
    "mixture in layers": Case(digits, IN_LAYERS, 2, True, (8, 8)),
    "language": Case(language, [], 2, False, (4, 4)),
    "mixture of language": Case(language, [], 2, True, (4, 4)),
    "mixture of language in layers": Case(language, IN_LAYERS, 2, True, (8, 8)),
}


def loss_of(case: Case, folder: Path) -> Loss:
    """The loss of a step; no pair's B is zero."""
    config = case.configuration(folder, *case.sets)
    foundation = models.load(config.model, config.task.kind)
    model = ExpertModel(foundation, data.load(config.data, foundation), config)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=draw) / 4 if name.endswith("lora_b") else t for name, t in model.initial(0).items()}
    model.load("global", tensors, depth=0 if case.mixed else case.depth, applied_depth=APPLIED)
    if not case.mixed:
        return own_loss_of(model, "global")(Subset(ROWS))
    model.load("local", tensors, depth=case.depth, applied_depth=APPLIED)
    return Mixture(config).joint_loss(model)(Subset(ROWS))


@contextmanager
def compiled(compute: Callable[..., Tensor]) -> Iterator[tuple[Callable[..., Tensor], list[fx.GraphModule]]]:
    """A function compiled to one graph, and the list that its graphs are added to: of the forward pass, then of the backward pass."""
    graphs: list[fx.GraphModule] = []

    def keeping(graph: fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    yield torch.compile(compute, fullgraph=True, backend=aot_autograd(fw_compiler=keeping)), graphs
    torch._dynamo.reset()


def fused(graph: fx.GraphModule) -> list[fx.Node]:
    """The fused operators of a graph."""
    return [node for node in graph.graph.nodes if "fedms_ext" in str(node.target)]


def assert_fused(case: Case, graphs: Sequence[fx.GraphModule]) -> None:
    forward, backward = ([str(node.target).removesuffix(".default") for node in fused(graph)] for graph in graphs)
    assert forward.count("fedms_ext.expert_linear") == case.operators[0]
    assert backward == ["fedms_ext.expert_linear_backward"] * case.operators[1]
    assert set(forward) == {"fedms_ext.expert_linear"} | ({"fedms_ext.token_log_prob"} if case.configuration is language else set())
