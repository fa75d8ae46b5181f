"""Activation of blocks, the constant prefix and the cache of its outputs."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import BLOCKS, MODELS, WIDTH, Stack, stack, tuple_stack, with_experts
from torch import nn

from fedms_ext import (
    ConstantCache,
    ConstantPrefix,
    LoRA,
    PairState,
    Ragged,
    activate,
    activation_order,
    attach,
    deactivate,
    expert_layers,
    gated,
    merge,
    prefix_depth,
    prefix_hash,
    unmerge,
)

OFF, FROZEN, TRAINED = PairState.OFF, PairState.FROZEN, PairState.TRAINED


def states(model: nn.Module, expert: str) -> list[PairState]:
    """The state of each block's pairs, which must agree."""
    by_block: dict[int, set[PairState]] = {}
    for layer in expert_layers(model).values():
        by_block.setdefault(layer.block, set()).add(layer.states[expert])
    assert all(len(found) == 1 for found in by_block.values())
    return [by_block[block].pop() for block in sorted(by_block)]


# Orders and states


@pytest.mark.parametrize(
    "count, order, want",
    [
        (4, "top_down", [4, 3, 2, 1]),
        (4, "bottom_up", [1, 2, 3, 4]),
        (6, "interleaved", [6, 4, 2, 5, 3, 1]),
        (5, "interleaved", [5, 3, 1, 4, 2]),
        (1, "interleaved", [1]),
        (4, [2, 4], [2, 4]),
        (4, (3,), [3]),
        (4, [], []),
    ],
)
def test_activation_order(count, order, want):
    assert activation_order(count, order) == want


@pytest.mark.parametrize("count", range(1, 9))
def test_named_orders_hold_every_block_once(count):
    for order in ("top_down", "bottom_up", "interleaved"):
        assert sorted(activation_order(count, order)) == list(range(1, count + 1))


@pytest.mark.parametrize(
    "order, message",
    [
        ("topdown", "order must be one of top_down, bottom_up, interleaved or a list .*'topdown'"),
        ([1, 1], r"distinct block numbers from 1 to 4, got \[1, 1\]"),
        ([0], r"from 1 to 4, got \[0\]"),
        ([5], r"from 1 to 4, got \[5\]"),
    ],
)
def test_refused_orders(order, message):
    with pytest.raises(ValueError, match=message):
        activation_order(4, order)


@pytest.mark.parametrize(
    "how, trained, want",
    [
        (dict(depth=0), [], [OFF, OFF, OFF, OFF]),
        (dict(depth=1), [4], [OFF, OFF, OFF, TRAINED]),
        (dict(depth=4), [1, 2, 3, 4], [TRAINED] * 4),
        (dict(depth=1, applied_depth=3), [4], [OFF, FROZEN, FROZEN, TRAINED]),
        (dict(depth=0, applied_depth=4), [], [FROZEN] * 4),
        (dict(depth=2, order="bottom_up"), [1, 2], [TRAINED, TRAINED, OFF, OFF]),
        (dict(depth=2, applied_depth=3, order="interleaved"), [2, 4], [OFF, TRAINED, FROZEN, TRAINED]),
        (dict(depth=1, applied_depth=2, order=[3, 1]), [3], [FROZEN, OFF, TRAINED, OFF]),
    ],
)
def test_activate(how, trained, want):
    model = with_experts(stack(), "global", "local")
    activate(model, "global", depth=3, order="bottom_up")  # what came before leaves no trace
    assert activate(model, "global", **how) == trained
    assert states(model, "global") == want and states(model, "local") == [FROZEN] * 4
    for layer in expert_layers(model).values():
        training = layer.states["global"] is TRAINED
        assert layer.lora_a["global"].requires_grad == layer.lora_b["global"].requires_grad == training
        assert not layer.lora_a["local"].requires_grad


def test_deactivate():
    model = with_experts(stack(), "global")
    activate(model, "global", depth=2)
    deactivate(model, "global")
    assert states(model, "global") == [OFF] * 4


def test_activate_refuses():
    model = with_experts(stack(), "global")
    for how in (dict(depth=5), dict(depth=-1), dict(depth=2, applied_depth=1), dict(depth=0, applied_depth=5)):
        with pytest.raises(ValueError, match="need 0 <= depth <= applied_depth <= 4 blocks"):
            activate(model, "global", **how)
    with pytest.raises(TypeError, match="depth is a number of blocks, got 1.5"):
        activate(model, "global", depth=1.5)
    with pytest.raises(ValueError, match="<= 2 blocks"):
        activate(model, "global", depth=3, order=[4, 2])
    assert states(model, "global") == [FROZEN] * 4
    with pytest.raises(ValueError, match="no experts are attached to this model; call fedms_ext.attach"):
        activate(stack(), "global", depth=1)


# The constant prefix


def test_prefix_depth_ends_below_the_first_trained_or_gated_pair():
    model = with_experts(stack(), "global", "local")
    assert prefix_depth(model) == BLOCKS  # nothing is trained
    for how, want in [
        (dict(depth=1), 3),
        (dict(depth=3, applied_depth=4), 1),
        (dict(depth=4), 0),
        (dict(depth=1, order="bottom_up"), 0),
        (dict(depth=2, order="interleaved"), 1),
        (dict(depth=0, applied_depth=4), 4),
    ]:
        activate(model, "global", **how)
        assert prefix_depth(model) == want, how
    activate(model, "local", depth=2)
    assert prefix_depth(model) == 2
    with gated([model.inner.layers[1].up], torch.ones(1, 2)):
        assert prefix_depth(model) == 1
    assert prefix_depth(model) == 2


def test_prefix_hash_follows_the_applied_pairs_inside_the_prefix():
    model = with_experts(stack(), "global", "local", targets=["up"])
    deactivate(model, "local")
    layers = model.inner.layers
    digests = [prefix_hash(model, depth) for depth in range(BLOCKS + 1)]
    assert len(set(digests)) == BLOCKS + 1 and all(len(digest) == 64 for digest in digests)

    def changes() -> list[bool]:
        return [prefix_hash(model, depth) != digest for depth, digest in enumerate(digests)]

    assert changes() == [False] * 5
    with torch.no_grad():
        layers[3].up.lora_a["global"][2, 5] += 1e-3
        assert changes() == [False, False, False, False, True]
        layers[1].up.lora_b["global"][0, 0] += 1e-3
        assert changes() == [False, False, True, True, True]
        layers[1].up.lora_b["global"][0, 0] -= 1e-3
        layers[3].up.lora_a["global"][2, 5] -= 1e-3
        layers[0].up.lora_a["local"].zero_()  # off: not part of the function
    digests = [prefix_hash(model, depth) for depth in range(BLOCKS + 1)]
    layers[2].up.set_state("local", FROZEN)
    assert changes() == [False, False, False, True, True]
    layers[2].up.set_state("local", OFF)
    layers[0].up.set_state("global", TRAINED)  # frozen or trained: the same function now
    assert changes() == [False] * 5
    layers[0].up.set_state("global", OFF)
    assert changes() == [False, True, True, True, True]
    layers[0].up.set_state("global", FROZEN)
    for layer in layers:
        layer.up.set_state("local", FROZEN)
    merge(model, "local")
    assert changes() == [False, True, True, True, True]
    unmerge(model)
    deactivate(model, "local")
    assert changes() == [False] * 5


def test_prefix_hash_knows_no_names_of_experts_but_scales():
    one, other, scaled = Stack(), Stack(), Stack()
    attach(one, ["up"], {"global": LoRA(2, 4)})
    attach(other, ["up"], {"local": LoRA(2, 4)})
    attach(scaled, ["up"], {"local": LoRA(2, 5)})
    for layer in range(BLOCKS):
        for twin in (other, scaled):
            twin.layers[layer].up.lora_a["local"] = one.layers[layer].up.lora_a["global"]
            twin.layers[layer].up.lora_b["local"] = one.layers[layer].up.lora_b["global"]
    assert prefix_hash(one, 2) == prefix_hash(other, 2) != prefix_hash(scaled, 2)


@pytest.fixture(params=MODELS)
def model(request):
    return with_experts(MODELS[request.param](), "global", "local")


@pytest.mark.parametrize("depth", range(BLOCKS + 1))
def test_capture_and_replay_are_the_full_forward(model, depth):
    activate(model, "global", depth=BLOCKS - depth, applied_depth=BLOCKS)
    deactivate(model, "local")
    want = model.run()
    prefix = ConstantPrefix(model)
    assert prefix.depth == depth
    hidden = prefix.capture(model.run)
    assert hidden.shape[0] == 3 and hidden.shape[-1] == WIDTH and not hidden.requires_grad

    ran = set()
    handles = [layer.register_forward_hook(lambda m, *_: ran.add(m.block)) for layer in expert_layers(model).values()]
    with prefix.replay(hidden):
        replayed = model.run()  # the first replay of a class may run one block, to learn the form of what it returns
        ran.clear()
        model.run()
    assert ran == set(range(depth + 1, BLOCKS + 1))
    for handle in handles:
        handle.remove()
    assert torch.equal(replayed, want)
    assert torch.equal(model.run(), want)  # nothing is left behind

    # The gradients of what is trained are those of the full pass.
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (len(trained) > 0) == (depth < BLOCKS)
    if trained:
        dy = torch.randn_like(want)
        with prefix.replay(hidden):
            got = torch.autograd.grad(model.run(), trained, dy)
        assert all(torch.equal(g, w) for g, w in zip(got, torch.autograd.grad(want, trained, dy)))


def test_states_on_the_way_are_those_of_shorter_prefixes(model):
    want = {depth: ConstantPrefix(model, depth).capture(model.run) for depth in range(BLOCKS + 1)}
    for depth in range(1, BLOCKS + 1):
        seen = {}
        last = ConstantPrefix(model, depth).capture(
            model.run, {number: lambda hidden, number=number: seen.update({number: hidden.clone()}) for number in range(depth)})
        assert torch.equal(last, want[depth]) and list(seen) == list(range(depth))
        assert all(torch.equal(hidden, want[number]) for number, hidden in seen.items())
    for number in (-1, 2):
        with pytest.raises(ValueError, match=rf"numbers of blocks below the depth 2, got \[{number}\]"):
            ConstantPrefix(model, 2).capture(model.run, {number: print})


def test_what_is_replayed_decides(model):
    prefix = ConstantPrefix(model, 2)
    hidden, want = prefix.capture(model.run), model.run()
    with prefix.replay(hidden.flip(0)):
        assert not torch.allclose(model.run(), want)


@pytest.mark.parametrize("kind", [stack, tuple_stack])
def test_the_blocks_own_form_is_learned_without_their_class_being_known(kind):
    model = with_experts(kind(), "global")
    prefix = ConstantPrefix(model, 3)
    hidden, want = prefix.capture(model.run), model.run()
    with prefix.replay(hidden):
        assert torch.equal(model.run(), want)


def test_the_prefix_is_restored_after_an_error():
    model = with_experts(stack(), "global")
    want = model.run()
    prefix = ConstantPrefix(model, 2)
    with pytest.raises(ZeroDivisionError), prefix.replay(torch.zeros(3, 7, WIDTH)):
        1 / 0
    with pytest.raises(ZeroDivisionError):
        prefix.capture(lambda: 1 / 0)
    assert torch.equal(model.run(), want)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.inner.layers)


def test_prefix_refuses():
    model = with_experts(stack(), "global")
    for depth in (-1, BLOCKS + 1):
        with pytest.raises(ValueError, match=rf"depth must lie in 0..4, got {depth}"):
            ConstantPrefix(model, depth)
    with pytest.raises(RuntimeError, match="the forward pass never reached block 3"):
        ConstantPrefix(model, 2).capture(lambda: model.inner.layers[0](torch.zeros(1, WIDTH)))

    class ByKeyword(Stack):
        def forward(self, x):
            hidden = self.embed(x)
            for block in self.layers:
                hidden = block(hidden=hidden)
            return hidden

    model = with_experts(ByKeyword(), "global")
    with pytest.raises(RuntimeError, match="hidden state is NoneType, expected a tensor; it must be the first positional"):
        ConstantPrefix(model, 2).capture(lambda: model(torch.zeros(1, 5)))


# Storage


def test_ragged():
    rows = [torch.randn(random.randint(0, 6), 2, 3) for _ in range(9)]
    ragged = Ragged(rows)
    assert len(ragged) == 9
    assert all(torch.equal(ragged.row(i), rows[i]) for i in range(9))
    assert ragged.row(3).data_ptr() == ragged.values[ragged.offsets[3] :].data_ptr()  # a view
    assert ragged.nbytes == sum(row.nbytes for row in rows) + 2 * 9 * 8
    chosen = torch.tensor([4, 0, 4, 8])
    padded = ragged.pad(chosen)
    longest = max(len(rows[i]) for i in (4, 0, 8))
    assert padded.shape == (4, longest, 2, 3)
    for out, i in zip(padded, chosen.tolist()):
        assert torch.equal(out[: len(rows[i])], rows[i]) and not out[len(rows[i]) :].any()


def test_a_padded_prefix_is_the_batch_it_came_from():
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 1, 5)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert torch.equal(Ragged(rows).pad(torch.arange(3)), padded)


class Counting:
    """Computes tensors of so many floats and counts how often."""

    def __init__(self, cache: ConstantCache) -> None:
        self.cache, self.calls = cache, []

    def get(self, key: str, floats: int) -> torch.Tensor:
        def compute():
            self.calls.append(key)
            return torch.full((floats,), float(ord(key)))

        value = self.cache.get(key, compute)
        assert torch.equal(value, torch.full((floats,), float(ord(key))))
        assert self.cache.nbytes == sum(v.nbytes for v in self.cache.entries.values()) <= self.cache.max_bytes
        return value


def test_cache_computes_once():
    counting = Counting(ConstantCache(100))
    assert counting.get("a", 3) is counting.get("a", 3)
    assert counting.calls == ["a"]


def test_cache_lets_go_of_what_was_used_longest_ago():
    counting = Counting(ConstantCache(40))  # ten floats
    for key in "ab":
        counting.get(key, 4)
    counting.get("a", 4)  # now b is the oldest
    counting.get("c", 4)
    assert list(counting.cache.entries) == ["a", "c"]
    counting.get("b", 4)
    assert counting.calls == ["a", "b", "c", "b"] and list(counting.cache.entries) == ["c", "b"]
    counting.get("d", 10)  # needs all the room there is
    assert list(counting.cache.entries) == ["d"]


def test_a_value_above_the_budget_is_computed_every_time_and_pushes_nothing_out():
    counting = Counting(ConstantCache(40))
    counting.get("a", 4)
    counting.get("z", 11), counting.get("z", 11), counting.get("a", 4)
    assert counting.calls == ["a", "z", "z"]


def test_no_budget_no_cache():
    counting = Counting(ConstantCache(0))
    counting.get("a", 1), counting.get("a", 1)
    assert counting.calls == ["a", "a"] and not counting.cache.entries


def test_cache_gives_up_what_was_only_offered_first():
    counting = Counting(ConstantCache(40))
    counting.get("a", 4)
    for key in "bcd":       # of four floats each, of which there is room for one
        counting.cache.offer(key, torch.full((4,), float(ord(key))))
    assert list(counting.cache.entries) == ["b", "a"] and counting.cache.nbytes == 32
    counting.get("b", 4)        # asked for: from now on a value like any other
    counting.cache.offer("a", torch.zeros(4))
    counting.cache.offer("e", torch.full((1,), float(ord("e"))))
    assert list(counting.cache.entries) == ["e", "a", "b"]
    counting.get("f", 2)
    assert list(counting.cache.entries) == ["a", "b", "f"] and counting.calls == ["a", "f"]
    counting.get("a", 4)


def test_cache_holds_ragged_rows_and_keys_of_many_parts():
    cache = ConstantCache(1000)
    first = cache.get(("part", 3, "hash"), lambda: Ragged([torch.zeros(2, 5), torch.zeros(3, 5)]))
    assert cache.get(("part", 3, "hash"), lambda: 1 / 0) is first and cache.nbytes == first.nbytes
    assert cache.get(("part", 2, "hash"), lambda: torch.ones(1)) is not first


def test_cache_within_random_use_keeps_its_promises():
    cache = ConstantCache(64 * 4)
    counting = Counting(cache)
    sizes = {key: random.randint(1, 40) for key in "abcdefgh"}
    kept: list[str] = []  # a model of it: least recently used first
    for _ in range(300):
        key = random.choice("abcdefgh")
        missing = key not in kept
        before = len(counting.calls)
        counting.get(key, sizes[key])
        assert (len(counting.calls) > before) == missing
        kept = [k for k in kept if k != key] + [key]
        while sum(sizes[k] for k in kept) > 64:
            kept.pop(0)
        assert list(cache.entries) == kept
