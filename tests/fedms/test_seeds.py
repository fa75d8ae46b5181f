from __future__ import annotations

import torch

from fedms.seeds import derive_seed, generator


def test_draws_are_named():
    assert derive_seed(0, "shuffle", 1) == derive_seed(0, "shuffle", 1)
    names = [(0, "shuffle", 1), (0, "shuffle", 2), (1, "shuffle", 1), (0, "dropout", 1), (0, "shuffle", "1"), (0, "shuffle")]
    assert len({derive_seed(*name) for name in names}) == len(names)
    assert all(0 <= derive_seed(*name) < 2**63 for name in names)


def test_the_same_seed_on_every_machine():
    # Written down once: another hash or byte order would silently change every run.
    assert derive_seed(0, "shuffle") == 2930687252486249267
    assert torch.equal(torch.rand(3, generator=generator(5, "x")), torch.rand(3, generator=generator(5, "x")))
