"""Fashion-MNIST: its files, its public half, and what is said when they are missing or damaged."""

from __future__ import annotations

import gzip
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedms.data import DataError, digits, fashion

MODEL = SimpleNamespace(name="vit-fashion", reads="images", image_tokens=17, pixel_shape=(1, 28, 28),
                        pretrained_on="fashion-mnist")


def settings_of(path, max_samples=None):
    return SimpleNamespace(name="fashion-mnist", path=str(path), max_samples=max_samples)


def write_idx(path, array, packed=True):
    data = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data, 1) if packed else data)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """90 images in the published format, 60 in the training file, of which 40 are public; some files not gzipped."""
    monkeypatch.setattr(fashion, "PUBLIC", 40)
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 30)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(n) % 10, packed=False)
    return tmp_path


def test_clients_get_what_is_not_public(folder):
    whole = fashion.load(settings_of(folder), MODEL, 0)
    public = fashion.public_half(str(folder))
    assert public.shape == (40, 1, 28, 28) and len(whole) == 50
    assert whole.labels.tolist() == [i % 10 for i in (*range(40, 60), *range(30))]
    seen = {image.numpy().tobytes() for image in public}
    assert not any(image.numpy().tobytes() in seen for image in whole.inputs.pixels)
    assert whole.inputs.pixels.min() >= 0 and whole.inputs.pixels.max() <= 1
    few = fashion.load(settings_of(folder, 20), MODEL, 0)
    assert torch.bincount(few.labels).tolist() == [2] * 10


def test_digits_clients_of_a_pretrained_model_never_see_its_half():
    settings = SimpleNamespace(name="digits", path=None, max_samples=None)
    public = digits.public_half()
    model = SimpleNamespace(name="m", reads="images", image_tokens=17, pixel_shape=(1, 8, 8), pretrained_on="digits")
    private = digits.load(settings, model, 0)
    everything = digits.load(settings, SimpleNamespace(**{**vars(model), "pretrained_on": None}), 0)
    assert len(public) + len(private) == len(everything) == 1797
    assert torch.equal(torch.cat([public, private.inputs.pixels]), everything.inputs.pixels)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("train-images-idx3-ubyte.gz", b"no gzip", "cannot be read .*; replace it by a whole copy"),
    # Without the time, which the two processes that collect this test would not agree on.
    ("t10k-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x08\x03" + b"\0" * 40, mtime=0), "not a whole IDX file"),
    ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x02\1\2", "60, 28, 28.* and 2 labels, expected one label an image"),
    ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0", "not a whole IDX file"),
    ("t10k-labels-idx1-ubyte", None, "has no file t10k-labels-idx1-ubyte .*or unset data.path to have it fetched"),
])
def test_damaged_files_are_named(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        fashion.load(settings_of(folder), MODEL, 0)


def test_a_model_of_another_size_sees_the_images_by_its_own_processor(folder):
    seen = []

    def prepare(images):
        seen.extend(images)
        return torch.stack([torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1) for image in images])
    scale, shift = torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), -1.0)
    other = SimpleNamespace(**{**vars(MODEL), "pixel_shape": (3, 8, 8), "prepare": prepare, "pixel_transform": (scale, shift)})
    own, found = (fashion.load(settings_of(folder), model, 0) for model in (MODEL, other))
    assert torch.equal(torch.tensor(np.stack([np.array(image) for image in seen])), (own.inputs.pixels[:, 0] * 255).round().byte())
    assert found.inputs.pixels.shape == (len(own), 3, 8, 8) and torch.equal(found.labels, own.labels)
    batch = found.inputs.batch(torch.tensor([0]))["pixel_values"]
    assert torch.equal(batch, found.inputs.pixels[:1].float() * 2 - 1)


def test_without_apt_get_both_ways_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path))
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("no apt-get")))
    with pytest.raises(DataError, match="apt-get download dataset-fashion-mnist` work(.|\n)*data.path=FOLDER"):
        fashion.default_folder()
    assert list(tmp_path.iterdir()) == []
