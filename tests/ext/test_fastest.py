"""The choice between the CUDA kernels and what would run otherwise. Here other backends stand in for both."""

from __future__ import annotations

import pytest
import torch

import fedms_ext
from fedms_ext import QuantizedWeight, backends, expert_linear
from fedms_ext.backends import autotune, cpu, cuda, device, eager, fastest, registry


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """What ran, in order: "cuda", or "eager"."""
    ran: list[str] = []

    def noting(name, function):
        return lambda call: ran.append(name) or function(call)

    for name in ("forward", "backward"):
        monkeypatch.setattr(cuda, name, noting("cuda", getattr(eager, name)))
        monkeypatch.setattr(eager, name, noting("eager", getattr(cpu, name)))
    monkeypatch.setattr(cuda, "supports", lambda call: None)
    monkeypatch.setattr(registry, "_usable", [cuda, eager])
    monkeypatch.setattr(device, "build_id", lambda: "0123456789abcdef of this build")
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMS_TUNE", raising=False)
    caches = (device.has_passed, fastest._choices)
    for cache in caches:
        cache.cache_clear()
    yield ran
    for cache in caches:
        cache.cache_clear()


def test_only_after_the_tests_of_this_build_have_passed(stand_ins, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "current", lambda: torch.device("cpu"))
    assert not device.has_passed((9, 0))
    device.has_passed.cache_clear()
    record = device.record_pass()
    assert record.parent == tmp_path and device.has_passed((9, 0))
    assert not device.has_passed((8, 9))  # another GPU
    record.write_text(record.read_text().replace("of this build", "of another"))
    device.has_passed.cache_clear()
    assert not device.has_passed((9, 0))
    record.write_text("{")
    device.has_passed.cache_clear()
    with pytest.warns(UserWarning, match="not valid JSON"):
        assert not device.has_passed((9, 0))


def test_a_kernel_that_never_ran_is_no_default(stand_ins):
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    expert_linear(x, weight, None, [torch.randn(2, 8)], [torch.randn(4, 2)], [1.0])
    assert stand_ins == ["eager"]


def test_the_faster_one_runs_and_is_measured_once_for_each_shape(stand_ins, monkeypatch):
    monkeypatch.setattr(device, "has_passed", lambda capability: True)
    monkeypatch.setattr(device, "is_real", lambda device: True)
    monkeypatch.setattr(device, "properties", lambda _: fastest.devices._STAND_IN)
    monkeypatch.setattr(device, "guard", lambda device: device_guard)
    monkeypatch.setattr(device, "is_capturing", lambda device: False)
    measured: list[str] = []

    def milliseconds(run):
        before = len(stand_ins)
        run()
        measured.append(stand_ins[before])
        is_backward = len(measured) % 4 > 2 or len(measured) % 4 == 0  # two ways forward, then two backward
        return 1.0 if (stand_ins[before] == "cuda") == is_backward else 2.0

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    x, weight = torch.randn(70, 24, requires_grad=True), torch.randn(16, 24)
    a, b = torch.randn(3, 24, requires_grad=True), torch.randn(16, 3, requires_grad=True)
    frozen = QuantizedWeight(weight, "fp16")

    def run(rows, call):
        y = call(x[:rows])
        return [y, *torch.autograd.grad(y.square().sum(), [x, a, b])]

    for call in (lambda x: expert_linear(x, weight, None, [a], [b], [0.5]),
                 lambda x: expert_linear(x, weight, None, [a], [b], [0.5], segments=(len(x),)),
                 lambda x: expert_linear(x, frozen, None, [a], [b], [0.5])):  # fmt: skip
        with fedms_ext.use_backend("cpu"):
            want = run(70, call)
        for rows, measures in ((70, True), (65, False), (60, True)):  # up to 128 rows, and up to 64
            measured.clear(), stand_ins.clear()
            got = run(rows, call)
            assert measured == (["eager", "cuda"] * 2 if measures else [])
            assert [stand_ins[i] for i in ((2, 5) if measures else (0, 1))] == ["eager", "cuda"]
            if rows == 70:
                assert all(torch.allclose(g, w, rtol=1e-3, atol=1e-3) for g, w in zip(got, want))
    assert backends.known()[0] == "cuda"


class _Guard:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


device_guard = _Guard()
