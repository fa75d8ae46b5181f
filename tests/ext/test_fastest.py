"""The backend that measures the CUDA kernels against what would run otherwise. Here other backends stand in for both."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fedms_ext
from fedms_ext import QuantizedWeight, expert_linear
from fedms_ext.backends import cpu, cuda, eager, fastest
from fedms_ext.backends.autotune import Choices
from fedms_ext.operators.frozen import frozen_linear


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """What ran, in order: "cuda", or "other"."""
    ran: list[str] = []

    def noting(name, function):
        return lambda *given: ran.append(name) or function(*given)

    other = SimpleNamespace(__name__="other")
    for name in ("forward", "backward", "frozen_forward", "frozen_backward"):
        monkeypatch.setattr(cuda, name, noting("cuda", getattr(eager, name)))
        setattr(other, name, noting("other", getattr(cpu, name)))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "supports", lambda x: x.device.type == "cpu")
    monkeypatch.setattr(cuda, "capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "other", lambda x: other)
    monkeypatch.setattr(fastest, "_kept", {})
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    caches = (cuda.passed, fastest.unavailable, fastest._choices)
    for cache in caches:
        cache.cache_clear()
    yield ran
    for cache in caches:
        cache.cache_clear()


def test_only_after_the_tests_of_this_build_have_passed(stand_ins, tmp_path):
    assert "make gpu" in fastest.unavailable() and not fastest.supports(torch.empty(1))
    fastest.unavailable.cache_clear()
    record = cuda.record_pass()
    assert record.parent == tmp_path and fastest.unavailable() is None and fastest.supports(torch.empty(1))
    assert not cuda.passed((8, 9))  # another GPU
    record.write_text(record.read_text().replace(cuda.build_id()[:8], "another "))
    cuda.passed.cache_clear()
    assert not cuda.passed((9, 0))  # another build
    record.write_text("{")
    cuda.passed.cache_clear()
    with pytest.warns(UserWarning, match="not valid JSON"):
        assert not cuda.passed((9, 0))


def test_the_faster_one_runs_and_is_measured_once_for_each_shape(stand_ins, monkeypatch):
    cuda.record_pass()
    keys: list[str] = []

    def choose(self, key, names, run):
        assert names == ["other", "fedms_ext.backends.cuda"]
        keys.append(key)
        return names[0] if key.startswith("forward") else names[1]

    monkeypatch.setattr(Choices, "choose", choose)
    x, weight = torch.randn(70, 24, requires_grad=True), torch.randn(16, 24)
    a, b = torch.randn(3, 24, requires_grad=True), torch.randn(16, 3, requires_grad=True)
    frozen = QuantizedWeight(weight, "fp16")

    def run(rows, call):
        y = call(x[:rows])
        return [y, *torch.autograd.grad(y.square().sum(), [x, a, b])]

    for call in (lambda x: expert_linear(x, weight, None, [a], [b], [0.5]),
                 lambda x: expert_linear(x, weight, None, [a], [b], [0.5], segments=(len(x),)),
                 lambda x: frozen_linear(x, frozen, None, [a], [b], [0.5])):  # fmt: skip
        want = run(70, call)
        keys.clear()
        for rows in (70, 65, 60):
            stand_ins.clear()
            with fedms_ext.use_backend("measured"):
                got = run(rows, call)
            assert stand_ins == ["other", "cuda"]
            if rows == 70:
                assert all(torch.allclose(g, w, rtol=1e-3, atol=1e-3) for g, w in zip(got, want))
        assert len(keys) == 4 and len(set(keys)) == 4  # forward and backward, up to 128 rows and up to 64
