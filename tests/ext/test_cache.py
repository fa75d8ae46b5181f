"""Caches of constants on disk, and reduced precision."""
from __future__ import annotations

import errno
import os
import sys
import time

import pytest
import torch

from fedms_ext import ConstantCache, DiskCache, Ragged


def rows(count=7, width=24):
    return [torch.randn(int(n), width) * 3 for n in torch.randint(1, 9, (count,))]


def files(folder):
    """The files of values, and whatever else lies there but the lock file."""
    return [file for file in folder.iterdir() if file.name != ".lock"]


def same(a, b):
    if isinstance(a, Ragged):
        return a.tensors().keys() == b.tensors().keys() and all(
            torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items()) and torch.equal(a.offsets, b.offsets)
    return torch.equal(a, b)


@pytest.mark.parametrize("storage, error, size", [("fp32", 0, 4), ("bf16", 2**-8, 2), ("int8", 0.5 / 127, 1)])
def test_storage(storage, error, size):
    exact, ragged = rows(), None
    ragged = Ragged(exact, storage)
    for i, row in enumerate(exact):
        got = ragged.row(i)
        # bf16 rounds each value relative to itself, int8 relative to the largest of its vector.
        scale = row.abs() if storage == "bf16" else row.abs().amax(1, keepdim=True)
        assert got.dtype == torch.float32 and bool(((got - row).abs() <= error * scale * 1.001).all())
    assert ragged.values.nbytes == size * sum(row.numel() for row in exact)
    with pytest.raises(ValueError, match="storage must be one of fp32, bf16, int8, got 'fp8'"):
        Ragged(exact, "fp8")


def test_int8_storage_keeps_zeros_and_signs():
    row = torch.tensor([[0.0, 0.0, 0.0], [1e-30, -1e-30, 0.0], [127.0, -127.0, 1.0]])
    assert torch.allclose(Ragged([row], "int8").row(0), row, rtol=1e-5)


@pytest.mark.parametrize("value", [torch.randn(3, 4), torch.empty(0, 5), Ragged(rows()), Ragged(rows(), "int8"),
                                   Ragged(rows(), "bf16")], ids=["tensor", "empty", "fp32", "int8", "bf16"])
def test_what_is_kept_comes_back_in_another_process(tmp_path, value):
    first = DiskCache(tmp_path, 10**6, "model")
    assert same(first.get(("part", 3), lambda: value), value)
    again = DiskCache(tmp_path, 10**6, "model")
    assert same(again.get(("part", 3), lambda: 1 / 0), value)
    with pytest.raises(ZeroDivisionError):
        DiskCache(tmp_path, 10**6, "another model").get(("part", 3), lambda: 1 / 0)


def test_damage_is_computed_again(tmp_path):
    value = torch.randn(50)
    DiskCache(tmp_path, 10**6, "").get(("a",), lambda: value)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:]):
            file.write_bytes(damaged)
            computed = []
            got = DiskCache(tmp_path, 10**6, "").get(("a",), lambda: computed.append(1) or value)
            assert torch.equal(got, value) and (computed or damaged == whole or b"__metadata__" in damaged)
    assert file.read_bytes() == whole


def test_the_budget_is_never_exceeded(tmp_path):
    cache = DiskCache(tmp_path, 3000, "")
    for i in range(20):
        cache.get((i % 7,), lambda: torch.full((100 + i % 7,), float(i % 7)))
        assert cache.nbytes <= 3000
        assert torch.equal(cache.get((i % 7,), lambda: 1 / 0), torch.full((100 + i % 7,), float(i % 7)))
        time.sleep(0.002)
    kept = cache.nbytes
    for _ in range(2):
        assert len(cache.get(("large",), lambda: torch.zeros(1000))) == 1000
    assert cache.nbytes == kept      # larger than the budget: not kept, and nothing made room for it


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    old, new = (tmp_path / f"{name}.tmp" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    DiskCache(tmp_path, 3000, "")
    assert not old.exists() and new.exists()        # a process may be writing the new one


def test_what_is_offered_takes_the_room_that_is_left(tmp_path):
    cache, value = DiskCache(tmp_path, 3000, ""), torch.ones(200)
    kept = cache.get(("asked for",), lambda: value)
    for name in "abc":      # one file has a little more than 800 bytes
        cache.offer((name,), value * ord(name))
    assert cache.nbytes <= 3000 and len(files(tmp_path)) == 3
    assert torch.equal(cache.get(("a",), lambda: 1 / 0), value * ord("a"))
    cache.offer(("a",), torch.zeros(1))
    cache.get(("d",), lambda: value)     # b is dropped for it, which nobody has asked for
    for name, want in (("asked for", kept), ("a", value * ord("a")), ("d", value)):
        assert torch.equal(cache.get((name,), lambda: 1 / 0), want)
    assert len(files(tmp_path)) == 3


def test_a_full_disk_costs_time_only(tmp_path, monkeypatch):
    cache, computed = DiskCache(tmp_path, 10**6, ""), []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for _ in range(2):
        assert torch.equal(cache.get(("a",), lambda: computed.append(1) or torch.ones(3)), torch.ones(3))
    assert len(computed) == 2 and files(tmp_path) == []


def test_a_process_waits_for_the_value_that_another_one_computes(tmp_path):
    cache, value = DiskCache(tmp_path, 10**6, ""), torch.ones(3)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        def compute():
            assert torch.equal(cache.get(("inner",), lambda: value), value)     # a value may depend on others
            os.write(told, b"!")
            time.sleep(0.3)
            return value
        cache.get(("a",), compute)
        os._exit(0)
    os.read(ready, 1)
    assert cache.find(("a",)) is None
    assert torch.equal(cache.get(("b",), lambda: value * 2), value * 2)     # another value is not waited for
    assert cache.find(("a",)) is None
    assert torch.equal(cache.get(("a",), lambda: 1 / 0), value)
    assert os.waitpid(child, 0)[1] == 0


def test_memory_counts_what_it_stores():
    cache = ConstantCache(10**6)
    value = cache.get(("a",), lambda: Ragged(rows(), "int8"))
    assert cache.nbytes == value.nbytes == value.values.nbytes + value.scales.nbytes + 2 * 7 * 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_mapped_only_while_their_values_are_in_use(tmp_path):
    cache = DiskCache(tmp_path, 10**7, "")

    def mapped():
        with open("/proc/self/maps") as maps:
            return cache.SUFFIX in maps.read()

    value = cache.get(("a",), lambda: Ragged(rows(50)))
    kept = value.pad(torch.arange(3)).clone()
    assert mapped()
    del value
    assert not mapped()
    assert torch.equal(cache.get(("a",), lambda: 1 / 0).pad(torch.arange(3)), kept)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [0, 0], [2, 5, 1]])
def test_padded_rows_are_the_rows(storage, lengths):
    ragged = Ragged([torch.randn(n, 2, 6) for n in lengths], storage)
    chosen = torch.tensor([len(lengths) - 1, 0, len(lengths) - 1])
    padded = ragged.pad(chosen)
    assert padded.shape == (3, max(lengths[i] for i in chosen), 2, 6)
    for i, got in zip(chosen.tolist(), padded):
        assert torch.equal(got[:lengths[i]], ragged.row(i)) and not got[lengths[i]:].any()


def test_rows_are_put_in_any_order():
    exact = rows()
    for storage in ("fp32", "bf16", "int8"):
        ragged = Ragged.empty(torch.tensor([len(row) for row in exact]), exact[0], storage)
        for i in torch.randperm(len(exact)).tolist():
            ragged.put(i, exact[i])
        assert same(ragged, Ragged(exact, storage))
