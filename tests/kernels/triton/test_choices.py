"""The file of measured choices, and the tiles that are legal, without any kernel."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from fedms_ext.backends import autotune as module  # noqa: E402
from fedms_ext.backends import triton as backend  # noqa: E402
from fedms_ext.backends.autotune import Choices  # noqa: E402
from fedms_ext.backends.device import DeviceProperties  # noqa: E402
from fedms_ext.backends.triton.tiles import Gemm, Tile, band, legal_tiles  # noqa: E402

H100 = DeviceProperties((9, 0), 132, 232448)


GPU = torch.device("cuda", 0)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The names that were measured on a pretended GPU; a longer name takes longer."""
    names: list[str] = []

    def milliseconds(run):
        names.append(run())
        return len(names[-1])

    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMS_TUNE", raising=False)
    monkeypatch.setattr(module, "milliseconds", milliseconds)
    monkeypatch.setattr(module.devices, "is_capturing", lambda device: False)
    monkeypatch.setattr(module.devices, "guard", lambda device: nullcontext())
    return names


def choose(choices, shape, names, device=GPU):
    return choices.choose(device, (shape,), lambda: {name: name for name in names}, lambda name: name)


def test_measured_once_and_kept(measured):
    choices = Choices("gemm.json")
    assert choose(choices, "shape", ["long name", "short"]) == "short" == choose(choices, "shape", ["long name", "short"])
    assert measured == ["long name", "short"]
    assert choose(Choices("gemm.json"), "shape", ["long name", "short"]) == "short"
    assert len(measured) == 2
    # A choice that no longer exists is measured anew, and other shapes stay.
    choose(Choices("gemm.json"), "other", ["a", "bb"])
    assert choose(Choices("gemm.json"), "shape", ["long name", "medium"]) == "medium"
    assert json.loads(Choices("gemm.json").path.read_text()) == {"shape": "medium", "other": "a"}


def test_a_broken_file_is_written_anew(measured):
    path = Choices("gemm.json").path
    path.write_text("{")
    with pytest.warns(UserWarning, match="not valid JSON"):
        assert choose(Choices("gemm.json"), "shape", ["bb", "a"]) == "a"
    assert json.loads(path.read_text()) == {"shape": "a"}


def test_nothing_is_kept_of_a_capture(measured, monkeypatch):
    choices = Choices("gemm.json")
    with monkeypatch.context() as capture:
        capture.setattr(module.devices, "is_capturing", lambda device: True)
        assert choose(choices, "shape", ["bb", "a"]) == "bb" and measured == []
    assert choose(choices, "shape", ["bb", "a"]) == "a" and measured == ["bb", "a"]
    with monkeypatch.context() as capture:
        capture.setattr(module.devices, "is_capturing", lambda device: True)
        assert choose(choices, "shape", ["bb", "a"]) == "a"  # measured before


def test_nothing_is_measured_where_it_cannot_be(measured, monkeypatch):
    assert choose(Choices("gemm.json"), "shape", ["bb", "a"], torch.device("cpu")) == "bb"
    monkeypatch.setenv("FEDMS_TUNE", "0")
    assert choose(Choices("gemm.json"), "shape", ["bb", "a"]) == "bb"
    assert measured == [] and not Choices("gemm.json").path.exists()


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf"), 1.1], ids=str)
def test_a_way_with_another_result_is_left_out(measured, wrong):
    """It would be the fastest. Rounding, and numbers that are not finite in the first result, make no difference."""
    right = torch.tensor([1.0, -2.0, float("nan"), float("inf")])
    results = {"the first": right, "rounded": right * 1.001, "bad": right * wrong}

    def result(name):
        return [torch.zeros(3), results[name]]

    with pytest.warns(UserWarning, match="'bad' gives another result than 'the first' for shape, so it is not used"):
        chosen = Choices("gemm.json").choose(GPU, ("shape",), lambda: {name: name for name in results}, lambda name: name, result)
    assert chosen == "rounded" and measured == ["the first", "rounded"]


def test_ways_are_timed_on_the_gpus_own_clock_and_device(monkeypatch, tmp_path):
    """The GPU sleeps until all calls are queued, so that no time of Python lies between the events."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            return 4.0

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            said.append(f"on {self.device}")

        def __exit__(self, *_):
            said.append("left")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep"), raising=False)
    assert module.milliseconds(lambda: said.append("run")) == 1.0
    assert said == ["run", *["sleep", "record", *["run"] * 4, "record", "wait"] * 5]
    said.clear()
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMS_TUNE", raising=False)
    monkeypatch.setattr(module.devices, "is_capturing", lambda device: False)
    monkeypatch.setattr(module.devices, "guard", Guard)
    choose(Choices("gemm.json"), "shape", ["a", "b"], torch.device("cuda", 1))
    assert said[0] == "on cuda:1" and said[-1] == "left" and said.count("sleep") == 10


def test_files_differ_by_capability(measured):
    paths = [backend._choices.__wrapped__(capability).path for capability in ((9, 0), (8, 9))]
    assert [path.name.partition("-triton")[0] for path in paths] == ["gemm-sm90", "gemm-sm89"]


def test_bands_are_wide_for_wide_tiles():
    bands = {(128, 256): 16, (128, 128): 8, (64, 128): 16}
    assert {(bm, bn): band(Tile("pointer", bm, bn, 64, 8, 3), H100) for bm, bn in bands} == bands


CHIPS = [((8, 0), 108, 166912), ((8, 6), 84, 101376), ((12, 0), 170, 101376), ((10, 0), 148, 232448)]


@pytest.mark.parametrize("chip", [H100, *[DeviceProperties(*chip) for chip in CHIPS]], ids=str)
def test_every_chip_has_legal_tiles(chip):
    """An unknown GPU works: what decides is its shared memory, not its name."""
    for gemm in [Gemm(8192, 4096, 4096, 32), Gemm(65, 8, 8, 1), Gemm(12608, 768, 768, 256)]:
        for aligned in (False, True):
            for inline in (False, True):
                for drop in (False, True):
                    tiles = legal_tiles(gemm, chip, aligned=aligned, inline=inline, drop=drop)
                    kinds = {tile.kind for tile in tiles}
                    assert "pointer" in kinds and all(t.shared_memory(chip, gemm.rank) <= chip.shared_memory for t in tiles)
                    assert ("descriptor" in kinds) == (aligned and chip.capability == (9, 0) and gemm.rank <= 128)
                    assert ("inline" in kinds) == (inline and gemm.n <= 1024 and gemm.rank <= 32)


def test_the_cost_model_prefers_large_tiles_for_large_problems_and_small_ones_for_small():
    large = legal_tiles(Gemm(8192, 4096, 4096, 32), H100, aligned=True, inline=False, drop=False)
    small = legal_tiles(Gemm(128, 256, 4096, 32), H100, aligned=True, inline=False, drop=False)
    assert (large[0].kind, large[0].bm, large[0].bn) == ("descriptor", 128, 256)
    assert small[0].bm * small[0].bn < 128 * 256
