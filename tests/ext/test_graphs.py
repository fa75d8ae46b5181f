"""`fedms_ext.graphed` on a GPU that is not there: replays give the bits of the step, whatever lies between them."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fake_device import FakeCuda
from fake_graph import FakeGraphs
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA, graphed


def network(dropout):
    torch.manual_seed(0)
    layers = [ExpertLinear.from_linear(nn.Linear(6, 5), {"global": LoRA(2, 4.0, dropout), "local": LoRA(3, 1.0, dropout)}),
              nn.GELU(), ExpertLinear.from_linear(nn.Linear(5, 4), {"global": LoRA(2, 4.0, dropout)})]
    model = nn.Sequential(*layers)
    for layer in (layers[0], layers[2]):
        layer.set_state("global", "trained")
        nn.init.normal_(layer.lora_b["global"])
    return model


def trained(graph, steps=6, sizes=(8,), dropout=0.0, micro_batches=1):
    """Trains on the GPU that is not there; returns the losses and what was trained, on the CPU, and the graphs."""
    with FakeCuda(), FakeGraphs() as graphs:
        model = network(dropout).to("cuda")
        for layer in (model[0], model[2]):      # `nn.Module.to` moves tensors below the fake device's sight
            for name, p in layer.named_parameters():
                p.data = p.data.to("cuda")
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=0.1)
        draw = torch.Generator().manual_seed(1)

        def loss_of(x, y):
            return F.cross_entropy(model(x), y)

        step = graphed(loss_of, params) if graph else loss_of
        torch.manual_seed(2)
        losses = []
        for i in range(steps):
            optimizer.zero_grad()
            for _ in range(micro_batches):
                x = torch.randn(sizes[i % len(sizes)], 6, generator=draw).to("cuda")
                y = torch.randint(4, (len(x),), generator=draw).to("cuda")
                with fedms_ext.nn.seeds.seeds_on_device():
                    loss = step(x, y)
                loss.backward()
                losses.append(float(loss.detach().cpu()))
            optimizer.step()
        return losses, [p.detach().cpu().clone() for p in params], graphs


class TestReplays:
    @pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"micro_batches": 2}, {"sizes": (8, 3, 8)}], ids=str)
    def test_give_the_bits_of_the_step(self, options):
        losses, params, graphs = trained(True, **options)
        want, wanted, none = trained(False, **options)
        assert losses == want and all(map(torch.equal, params, wanted))
        assert none.captured == 0 and graphs.replays > graphs.captured > 0
        assert len(set(losses)) == len(losses)

    def test_drop_other_values_each_time(self):
        with FakeCuda(), FakeGraphs() as graphs:
            layer = ExpertLinear.from_linear(nn.Linear(6, 4), {"global": LoRA(2, 4.0, 0.5)})
            layer.set_state("global", "trained")
            nn.init.normal_(layer.lora_b["global"])
            for p in layer.parameters():
                p.data = p.data.to("cuda")
            step, x = graphed(layer, layer.lora_b.values()), torch.ones(5, 6).to("cuda")
            found = [step(x).detach().cpu().clone() for _ in range(5)]
        assert graphs.captured == 2 and graphs.replays == 4
        assert len({tuple(y.flatten().tolist()) for y in found}) == 5


def test_the_oldest_graph_goes_and_a_moved_parameter_is_captured_anew():
    with FakeCuda(), FakeGraphs() as graphs:
        weight = nn.Parameter(torch.ones(4, 6).to("cuda"))
        step = graphed(lambda x: F.linear(x, weight).sum(), [weight], most=2)
        for rows in (1, 2, 3):
            for _ in range(2):
                step(torch.ones(rows, 6).to("cuda")).backward()
        assert graphs.captured == 6 and len(step.captures) == 2
        assert torch.equal(weight.grad.cpu(), torch.full((4, 6), 12.0))     # 2 * (1 + 2 + 3) rows of ones
        weight.data = torch.full((4, 6), 2.0).to("cuda")
        assert [float(step(torch.ones(3, 6).to("cuda")).detach().cpu()) for _ in range(3)] == [144.0] * 3
        assert graphs.captured == 8


def test_what_is_returned_is_not_overwritten_by_the_next_replay():
    with FakeCuda(), FakeGraphs() as graphs:
        weight = nn.Parameter(torch.ones(4, 6).to("cuda"))
        step = graphed(lambda x: F.linear(x, weight).square().sum(), [weight])
        found = []
        for value in (1.0, 2.0, 3.0):
            loss = step(torch.full((3, 6), value).to("cuda"))
            found.append((value, loss.detach(), torch.autograd.grad(loss, weight)[0]))
        assert graphs.replays == 4
        for value, loss, gradient in found:      # of 3 rows, each output is 6 values, and the gradient 2 * 6 value * value a row
            assert float(loss.cpu()) == 12 * 36 * value**2 and float(gradient.cpu()[0, 0]) == 36 * value**2


def test_a_backward_pass_after_another_replay_is_refused():
    with FakeCuda(), FakeGraphs():
        weight = nn.Parameter(torch.ones(4, 6).to("cuda"))
        step, x = graphed(lambda x: F.linear(x, weight).square().sum(), [weight]), torch.ones(3, 6).to("cuda")
        step(x).backward()
        first, second = step(x), step(x)
        second.backward()
        with pytest.raises(RuntimeError, match="the graph of this step was replayed again before this backward pass"):
            first.backward()


def test_without_gradients_only_the_forward_pass_is_captured():
    with FakeCuda(), FakeGraphs() as graphs:
        weight = torch.ones(4, 6).to("cuda")
        step = graphed(lambda x, y: F.linear(x, weight) if y is None else y)
        with torch.no_grad():
            for value in (1.0, 2.0, 3.0):
                assert torch.equal(step(torch.full((2, 6), value).to("cuda"), None).cpu(), torch.full((2, 4), 6 * value))
        assert graphs.captured == 1 and graphs.replays == 2


def test_on_a_cpu_it_is_the_step():
    calls = []
    model = network(0.3)
    twin = copy.deepcopy(model)

    def step(x):
        calls.append(x)
        return model(x)

    run, x = graphed(step, model.parameters()), torch.randn(3, 6)
    for _ in range(3):
        torch.manual_seed(3)
        found = run(x)
        torch.manual_seed(3)
        assert torch.equal(found, twin(x))
    assert len(calls) == 3 and not run.captures
    with pytest.raises(ValueError, match="most is 0, expected at least 1 graph"):
        graphed(step, most=0)
