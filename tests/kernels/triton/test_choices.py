"""The file of measured choices, and the tiles that are legal, without any kernel."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from fedms_ext.backends import autotune as module  # noqa: E402
from fedms_ext.backends import triton as backend  # noqa: E402
from fedms_ext.backends.autotune import Choices  # noqa: E402
from fedms_ext.backends.triton.tiles import DeviceProperties, Gemm, legal_tiles  # noqa: E402

H100 = DeviceProperties((9, 0), 132, 232448)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The names that were measured; a longer name takes longer."""
    names: list[str] = []

    def milliseconds(run):
        names.append(run())
        return len(names[-1])

    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMS_TUNE", raising=False)
    monkeypatch.setattr(module, "milliseconds", milliseconds)
    monkeypatch.setattr(module.torch.cuda, "is_current_stream_capturing", lambda: False)
    return names


def test_measured_once_and_kept(measured):
    assert Choices("gemm.json").choose("shape", ["long name", "short"], lambda name: name) == "short"
    assert measured == ["long name", "short"]
    assert Choices("gemm.json").choose("shape", ["long name", "short"], lambda name: name) == "short"
    assert len(measured) == 2
    # A choice that no longer exists is measured anew, and other shapes stay.
    Choices("gemm.json").choose("other", ["a", "bb"], lambda name: name)
    assert Choices("gemm.json").choose("shape", ["long name", "medium"], lambda name: name) == "medium"
    assert json.loads(Choices("gemm.json").path.read_text()) == {"shape": "medium", "other": "a"}


def test_a_broken_file_is_written_anew(measured):
    path = Choices("gemm.json").path
    path.write_text("{")
    with pytest.warns(UserWarning, match="not valid JSON"):
        assert Choices("gemm.json").choose("shape", ["bb", "a"], lambda name: name) == "a"
    assert json.loads(path.read_text()) == {"shape": "a"}


def test_nothing_is_measured_where_it_cannot_be(measured, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert Choices("gemm.json").choose("shape", ["bb", "a"], lambda name: name) == "bb"
    monkeypatch.setenv("FEDMS_TUNE", "0")
    assert Choices("gemm.json").choose("shape", ["bb", "a"], lambda name: name) == "bb"
    assert measured == [] and not Choices("gemm.json").path.exists()


def test_files_differ_by_capability(measured):
    paths = [backend._choices.__wrapped__(chip).path for chip in (H100, DeviceProperties((8, 9), 128, 101376))]
    assert [path.name.partition("-triton")[0] for path in paths] == ["gemm-sm90", "gemm-sm89"]


@pytest.mark.parametrize("chip", [H100, DeviceProperties((8, 0), 108, 166912), DeviceProperties((8, 6), 84, 101376), DeviceProperties((12, 0), 170, 101376),
                                  DeviceProperties((10, 0), 148, 232448)], ids=str)
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
