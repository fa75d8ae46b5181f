"""Blocks that a thread skips while it replays a constant prefix, or whose input it changes: other threads, what is restored, and
torch.compile."""
from __future__ import annotations

import copy
import threading

import torch
from tiny_models import BLOCKS, WIDTH, stack, with_experts

from fedms_ext import ConstantPrefix, activate, detach, expert_layers, gated
from fedms_ext.sparse.skipping import entering


def test_each_thread_replays_its_own_prefix():
    model = with_experts(stack(), "global")
    prefix, want, barrier, found = ConstantPrefix(model, 2), model.run(), threading.Barrier(3), {}
    hidden = prefix.capture(model.run)

    def run(name: str, replayed: torch.Tensor) -> None:
        with prefix.replay(replayed):
            barrier.wait()
            found[name] = model.run()
            barrier.wait()

    workers = [threading.Thread(target=run, args=each) for each in [("same", hidden), ("flipped", hidden.flip(0))]]
    for worker in workers:
        worker.start()
    barrier.wait()
    found["none"] = model.run()
    barrier.wait()
    for worker in workers:
        worker.join()
    assert torch.equal(found["same"], want) and torch.equal(found["none"], want)
    assert not torch.allclose(found["flipped"], want)


def test_detach_gives_the_blocks_their_own_forward_again():
    model = with_experts(stack(), "global")
    blocks = model.inner.layers
    own = blocks[1].forward = blocks[1].forward     # such as a hook of an offloading library
    with ConstantPrefix(model, 2).replay(torch.zeros(3, 7, WIDTH)):
        model.run()
    want = model.run()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        blocks[0].up.weight.zero_()     # a copy runs its own blocks
    assert torch.equal(copied.run(), want) and not torch.equal(model.run(), want)
    detach(model)
    assert "forward" not in vars(blocks[0]) and vars(blocks[1])["forward"] == own


def test_a_replay_below_a_gate_is_one_graph():
    model = with_experts(stack(), "global", "local")
    activate(model, "local", depth=2, applied_depth=BLOCKS)
    prefix = ConstantPrefix(model)
    hidden, gated_layers = prefix.capture(model.run), expert_layers(model.inner.layers[2:])

    def step(hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        with prefix.replay(hidden), gated(gated_layers, gate):
            return model.run()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for seed in range(2):
        gate = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))
        want = step(hidden, gate)
        torch.testing.assert_close(compiled(hidden, gate), want)
        assert not torch.allclose(model.run(), want)    # the gate is gone


def test_a_thread_changes_what_a_block_is_given():
    model = with_experts(stack(), "global")
    blocks, want = model.inner.layers, model.run()
    seen = []

    def doubled(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return 2 * hidden

    with entering({blocks[2]: doubled}):
        found = model.run()
        with entering({blocks[2]: lambda hidden: hidden, blocks[0]: lambda hidden: hidden}):
            assert torch.equal(model.run(), want)
        other = []
        worker = threading.Thread(target=lambda: other.append(model.run()))
        worker.start()
        worker.join()
        assert torch.equal(other[0], want) and len(seen) == 1      # no other thread's pass is changed
        with ConstantPrefix(model, 3).replay(ConstantPrefix(model, 3).capture(model.run)):
            model.run()
        assert len(seen) == 2       # by `capture`; a block that is skipped is given nothing
    assert torch.equal(model.run(), want)
    with ConstantPrefix(model, 2).replay(2 * seen[0]):
        assert torch.equal(model.run(), found)
    detach(model)
    assert not any("forward" in vars(block) for block in blocks)
