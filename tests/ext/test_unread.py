"""What makes the input of a cached prefix is not run, unless somebody reads it."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fedms_ext
from fedms_ext import ConstantPrefix, LoRA
from fedms_ext.sparse.unread import Unread

IDS = torch.arange(12).view(2, 6)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.calls = nn.Embedding(12, 8), nn.LayerNorm(8), 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.table(ids))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x)


class Model(nn.Module):
    """`use`: "shape" asks the embeddings' output for its shape, "values" adds it to the output, "twice" embeds once more."""

    def __init__(self, use: str = "shape") -> None:
        super().__init__()
        self.use, self.embeddings, self.blocks = use, Embeddings(), nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        start = x = self.embeddings(ids)
        for block in self.blocks:
            x = block(x)
        if self.use == "twice":
            return x[:, -1:] + self.embeddings(ids[:, :1])
        return x + start if self.use == "values" else x * start.shape[-1] + start.size(1)


def replayed(model: Model, times: int = 2) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return what the model gives, what it gives in so many replays, and how often its embeddings ran in each."""
    with torch.no_grad():
        want = model(IDS)
        prefix = ConstantPrefix(model, 2)
        hidden = prefix.capture(lambda: model(IDS))
        got, ran = [], []
        for _ in range(times):
            before = model.embeddings.calls
            with prefix.replay(hidden):
                got.append(model(IDS))
            ran.append(model.embeddings.calls - before)
    return want, got, ran


def made(use: str = "shape") -> Model:
    model = Model(use).eval().requires_grad_(False)
    fedms_ext.attach(model, ["up"], {"e": LoRA(2, 4)})
    return model


@pytest.mark.parametrize("use, ran", [("shape", [1, 0, 0]), ("values", [1, 1, 1]), ("twice", [2, 1, 1])])
def test_embeddings_run_where_they_are_read(use, ran):
    want, got, found = replayed(made(use), 3)
    assert all(torch.equal(each, want) for each in got) and found == ran


def test_embeddings_that_run_more_than_once_before_the_blocks_are_not_put_off():
    model = made()
    model.register_forward_pre_hook(lambda module, args: (module.embeddings(args[0][:, :2]), None)[1])
    want, got, ran = replayed(model)
    assert all(torch.equal(each, want) for each in got) and ran == [2, 2]


@pytest.mark.parametrize("change", [lambda model: model.embeddings.requires_grad_(True), lambda model: model.embeddings.train()])
def test_embeddings_that_are_trained_run(change):
    model = made()
    change(model)
    want, got, ran = replayed(model)
    assert all(torch.equal(each, want) for each in got) and ran == [1, 1]


def test_copies_run_their_own_embeddings_and_detach_gives_them_back():
    model = made("values")
    want, _, _ = replayed(model)
    other = copy.deepcopy(model)
    other.embeddings.table.weight.zero_()
    assert torch.equal(replayed(model)[1][1], want) and not torch.equal(other(IDS), want)
    fedms_ext.detach(model)
    assert "forward" not in vars(model.embeddings)


def test_an_unread_tensor_is_made_once_by_the_first_operation():
    calls = []
    value = torch.arange(6.0).view(2, 3)
    unread = Unread.of(torch.zeros(2, 3), lambda: calls.append(1) or value)
    assert unread.shape == (2, 3) and unread.size(-1) == 3 and len(unread) == 2 and unread.dtype == torch.float32
    assert unread.device == torch.device("cpu") and not unread.requires_grad and calls == []
    assert torch.equal(torch.stack([unread, value]), torch.stack([value, value])) and torch.equal(unread * 2, value * 2)
    assert unread.tolist() == value.tolist() and type(unread + 1) is Tensor and calls == [1]
