"""ExpertLinear beside PEFT's LoRA layer and the float64 reference, on the shapes that are benchmarked and odd ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fedms_ext import ExpertLinear, LoRA, PairState, gated, reference

peft = pytest.importorskip("peft")

TOLERANCE = 1e-5  # of the largest element of the float64 result

# (rows, K, N). Rows are fewer than in the benchmarks where a test would take long.
BENCHMARKED = [
    (16, 4096, 4096), (2, 4096, 14336), (1, 4096, 14336),  # decoders
    (197, 768, 768), (197, 768, 3072), (197, 3072, 768), (64, 768, 768), (16, 768, 768), (1, 768, 768),  # ViT-B
    (256, 384, 384), (256, 384, 1536), (256, 1536, 384), (2048, 384, 384),  # MiniLM
]  # fmt: skip
# Every pair of widths, and the row counts taken in turn.
ODD_WIDTHS = (1, 8, 100, 431, 768, 3072, 4104)
ODD_ROWS = itertools.cycle((0, 1, 2, 15, 17, 63, 127, 197))
ODD = [(next(ODD_ROWS), k, n) for k, n in itertools.product(ODD_WIDTHS, repeat=2)]
RANKS = (1, 4, 8, 16, 64)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.dtype == torch.float32
    if got.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()


def pair(k: int, n: int, ranks: tuple[int, ...], bias: bool = True) -> tuple[ExpertLinear, nn.Module]:
    """The same layer twice, ours and PEFT's, with the experts e0, e1, ... as its adapters."""
    base = nn.Linear(k, n, bias)
    configs = {
        f"e{i}": peft.LoraConfig(r=rank, lora_alpha=2 * rank + i, target_modules=["0"], init_lora_weights=False)
        for i, rank in enumerate(ranks)
    }
    model = peft.get_peft_model(nn.Sequential(base), configs["e0"], adapter_name="e0")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    theirs = model.base_model.model[0]
    ours = ExpertLinear.from_linear(base, {name: LoRA(c.r, c.lora_alpha) for name, c in configs.items()})
    with torch.no_grad():
        for name in configs:
            ours.lora_a[name].copy_(theirs.lora_A[name].weight)
            ours.lora_b[name].copy_(theirs.lora_B[name].weight)
    return ours, theirs


def set_states(ours: ExpertLinear, theirs: nn.Module, states: tuple[PairState, ...]) -> None:
    applied = [name for name, state in zip(ours.experts, states) if state is not PairState.OFF]
    theirs.set_adapter(applied)
    for name, state in zip(ours.experts, states):
        ours.set_state(name, state)
        for adapter in (theirs.lora_A, theirs.lora_B):
            adapter[name].requires_grad_(state is PairState.TRAINED)


def lora_tensors(ours: ExpertLinear) -> list[Tensor]:
    return [*ours.lora_a.values(), *ours.lora_b.values()]


def peft_tensors(theirs: nn.Module, ours: ExpertLinear) -> list[Tensor]:
    return [adapter[name].weight for adapter in (theirs.lora_A, theirs.lora_B) for name in ours.experts]


def results(y: Tensor, x: Tensor, tensors: list[Tensor], dy: Tensor) -> list[Tensor | None]:
    """y, dx and the gradient of each tensor: None for those that are not trained."""
    wanted = [x, *(tensor for tensor in tensors if tensor.requires_grad)]
    found = iter(torch.autograd.grad(y, wanted, dy))
    return [y.detach(), next(found), *(next(found) if tensor.requires_grad else None for tensor in tensors)]


def float64_results(ours: ExpertLinear, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in lora_tensors(ours)]
    x = x.detach().double().requires_grad_()
    experts = len(ours.experts)
    y = reference.expert_linear(
        x, ours.weight.double(), None if ours.bias is None else ours.bias.double(),
        doubles[:experts], doubles[experts:], [lora.scale for lora in ours.experts.values()],
        active=[state is not PairState.OFF for state in ours.states.values()],
    )  # fmt: skip
    return results(y, x, doubles, dy.double())


def check(ours: ExpertLinear, theirs: nn.Module, rows: int) -> None:
    x = torch.randn(rows, ours.in_features, requires_grad=True)
    dy = torch.randn(rows, ours.out_features)
    got = results(ours(x), x, lora_tensors(ours), dy)
    other = results(theirs(x), x, peft_tensors(theirs, ours), dy)
    want = float64_results(ours, x, dy)
    for g, o, w in zip(got, other, want, strict=True):
        assert (g is None) == (o is None) == (w is None)
        if g is not None:
            # A sum that cancels is as uncertain in PEFT's arithmetic: with one row and rank 1, dS is a single number.
            allowed = max(TOLERANCE, 2 * error(o, w))
            assert error(g, w) <= allowed
            assert error(g, o) <= allowed


@pytest.mark.parametrize("index, shape", list(enumerate(BENCHMARKED + ODD)))
def test_one_trained_expert(index, shape):
    rows, k, n = shape
    ours, theirs = pair(k, n, (RANKS[index % len(RANKS)],), bias=index % 3 > 0)
    set_states(ours, theirs, (PairState.TRAINED,))
    check(ours, theirs, rows)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 384, 384), (17, 768, 100), (1, 768, 768)])
def test_ranks(rank, bias, shape):
    rows, k, n = shape
    ours, theirs = pair(k, n, (rank,), bias)
    set_states(ours, theirs, (PairState.TRAINED,))
    check(ours, theirs, rows)


@pytest.mark.parametrize(
    "states", [states for states in itertools.product(PairState, repeat=3) if set(states) != {PairState.OFF}]
)
def test_states_of_several_experts(states):
    ours, theirs = pair(384, 431, (8, 1, 16))
    set_states(ours, theirs, states)
    check(ours, theirs, 63)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("bias", [True, False])
def test_merged(rank, bias):
    ours, theirs = pair(384, 431, (rank, 4), bias)
    set_states(ours, theirs, (PairState.FROZEN, PairState.FROZEN))
    x = torch.randn(63, 384)
    want, weight = theirs(x), ours.weight.clone()
    ours.merge("e0")
    got, merged = ours(x), ours.weight.clone()
    ours.unmerge()
    assert torch.equal(ours.weight, weight)
    theirs.merge(adapter_names=["e0"])  # in place, into the base layer that both share
    assert error(merged, theirs.base_layer.weight) <= TOLERANCE
    assert error(got, want) <= TOLERANCE


@pytest.mark.parametrize("rows", [(63,), (8, 17)])
@pytest.mark.parametrize("states", list(itertools.product([PairState.FROZEN, PairState.TRAINED], repeat=2)))
def test_gate_of_ones_is_no_gate_and_a_gate_of_zeros_and_ones_chooses(rows, states):
    ours, theirs = pair(100, 431, (8, 3))
    set_states(ours, theirs, states)
    x = torch.randn(*rows, 100)
    with gated([ours], torch.ones(rows[0], 2)):
        assert error(ours(x), theirs(x)) <= TOLERANCE
    choice = torch.randint(0, 2, (rows[0],))
    with gated([ours], nn.functional.one_hot(choice, 2).float()):
        got = ours(x)
    for chosen in (0, 1):
        theirs.set_adapter([f"e{chosen}"])
        if (choice == chosen).any():
            assert error(got[choice == chosen], theirs(x)[choice == chosen]) <= TOLERANCE


@pytest.mark.parametrize("shape", [(197, 768, 768), (256, 384, 1536), (16, 4096, 4096), (63, 431, 100)])
@pytest.mark.parametrize("ranks", [(8,), (4, 64), (1, 16, 8)])
def test_gated_experts_against_the_float64_reference(shape, ranks):
    rows, k, n = shape
    ours, _ = pair(k, n, ranks)
    x, dy = torch.randn(rows, k, requires_grad=True), torch.randn(rows, n)
    gate = torch.softmax(torch.randn(rows, len(ranks)), dim=-1).requires_grad_()
    for name in ours.experts:
        ours.set_state(name, PairState.TRAINED)
    with gated([ours], gate):
        got = results(ours(x), x, [gate, *lora_tensors(ours)], dy)
    doubles = [t.detach().double().requires_grad_() for t in (x, gate, *lora_tensors(ours))]
    y = reference.expert_linear(
        doubles[0], ours.weight.double(), ours.bias.double(), doubles[2 : 2 + len(ranks)], doubles[2 + len(ranks) :],
        [lora.scale for lora in ours.experts.values()], doubles[1],
    )  # fmt: skip
    for g, w in zip(got, results(y, doubles[0], doubles[1:], dy.double()), strict=True):
        assert error(g, w) <= TOLERANCE
