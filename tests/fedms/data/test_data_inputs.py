"""Ragged storage, checks of inputs and labels, fingerprints, the digits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedms.config import DataTable
from fedms.data import DataError, ImageInputs, TextInputs, load, make_dataset
from fedms.data.dataset import stratified_sample
from hypothesis import given, settings
from hypothesis import strategies as st

IMAGE_MODEL = SimpleNamespace(name="vit-digits", reads="images", image_tokens=17, pixel_shape=(1, 8, 8), pretrained_on=None)
TEXT_MODEL = SimpleNamespace(name="minilm", reads="text", image_tokens=None)


def data_config(**changes):
    return SimpleNamespace(**{**DataTable(name="digits").model_dump(), **changes})


def ragged(lengths: list[int], seed: int = 0) -> tuple[TextInputs, list[torch.Tensor]]:
    rows = [torch.randint(1, 1000, (n,), generator=torch.Generator().manual_seed(seed + n)) for n in lengths]
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    ids = torch.cat(rows)
    return TextInputs({"input_ids": ids, "extra": -ids}, offsets, {"input_ids": 0, "extra": 7}), rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_a_batch_holds_each_row_then_padding(lengths, data):
    inputs, rows = ragged(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    batch = inputs.batch(torch.tensor(chosen))
    width = max(lengths[i] for i in chosen)
    assert {name: tuple(x.shape) for name, x in batch.items()} == dict.fromkeys(
        ("input_ids", "extra", "attention_mask"), (len(chosen), width)
    )
    for b, i in enumerate(chosen):
        n = lengths[i]
        assert batch["input_ids"][b].tolist() == rows[i].tolist() + [0] * (width - n)
        assert batch["extra"][b].tolist() == (-rows[i]).tolist() + [7] * (width - n)
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (width - n)


def test_an_empty_batch_is_empty():
    inputs, _ = ragged([3, 1])
    assert inputs.batch(torch.empty(0, dtype=torch.int64))["input_ids"].shape == (0, 0)


def test_a_sample_without_tokens_is_refused():
    with pytest.raises(DataError, match="sample 1 has no tokens"):
        ragged([3, 0, 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_pixel_is_named(value):
    pixels = torch.rand(5, 1, 8, 8)
    pixels[3, 0, 4, 4] = value
    with pytest.raises(DataError, match=r"scans: image 3 holds NaN or infinity \(1 of 5"):
        ImageInputs(pixels, 17, "scans")


@pytest.mark.parametrize("pixels", [torch.rand(5, 8, 8), torch.zeros(5, 1, 8, 8, dtype=torch.uint8)])
def test_images_of_wrong_shape_or_type_are_refused(pixels):
    with pytest.raises(DataError, match=r"expected torch.float32 of shape \(n, channels, height, width\)"):
        ImageInputs(pixels, 17, "scans")


def test_the_fingerprint_follows_the_content():
    def build(pixel=0.0, label=0, group=0):
        pixels = torch.zeros(4, 1, 2, 2)
        pixels[2, 0, 1, 1] = pixel
        labels, groups = torch.tensor([0, 1, label, 1]), torch.tensor([0, 0, 1, group])
        inputs = ImageInputs(pixels, 1, "test")
        return make_dataset(
            "t", inputs, labels, ("a", "b"), groups=groups, group_names=("g", "h")
        ).fingerprint

    assert build() == build()
    assert len({build(), build(pixel=1e-6), build(label=1), build(group=1)}) == 4
    first, _ = ragged([2, 3])
    second, _ = ragged([2, 3], seed=1)
    moved = TextInputs(first.fields, torch.tensor([0, 3, 5]), first.pad_values)
    assert len({first.digest(), second.digest(), moved.digest()}) == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), "sample 2 has label 2, expected 0..1"),
        (torch.tensor([0, -1, 1]), "sample 1 has label -1"),
        (torch.tensor([0, 1]), r"expected torch.int64 of shape \(3,\)"),
        (torch.tensor([0.0, 1.0, float("nan")]), "labels are torch.float32"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(DataError, match=message):
        make_dataset("t", ImageInputs(torch.zeros(3, 1, 2, 2), 1, "test"), labels, ("a", "b"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 3))
def test_a_stratified_sample_keeps_the_shares(strata, total, seed):
    strata = np.array(strata)
    drawn = stratified_sample(strata, total, np.random.default_rng(seed))
    assert len(drawn) == min(total, len(strata)) and len(set(drawn.tolist())) == len(drawn)
    assert (np.diff(drawn) > 0).all()
    for code in np.unique(strata):
        quota = (strata == code).sum() * len(drawn) / len(strata)
        assert abs((strata[drawn] == code).sum() - quota) < 1


def test_digits():
    digits = load(data_config(), IMAGE_MODEL)
    assert len(digits) == 1797 and digits.groups is None and digits.prompts is None
    assert digits.inputs.pixels.shape == (1797, 1, 8, 8)
    assert 0 == digits.inputs.pixels.min() and digits.inputs.pixels.max() == 1
    assert torch.equal(digits.inputs.lengths, torch.full((1797,), 17))
    assert torch.equal(
        digits.inputs.batch(torch.tensor([5, 2]))["pixel_values"], digits.inputs.pixels[torch.tensor([5, 2])]
    )

    few = load(data_config(max_samples=100), IMAGE_MODEL)
    again = load(data_config(max_samples=100), IMAGE_MODEL)
    other = load(data_config(max_samples=100), IMAGE_MODEL, seed=1)
    assert len(few) == 100 and few.fingerprint == again.fingerprint != other.fingerprint
    assert torch.bincount(few.labels).tolist() == pytest.approx([10] * 10, abs=1)


def test_digits_of_ones_own(tmp_path):
    images = np.random.default_rng(0).integers(0, 17, (30, 8, 8)).astype(float)
    labels = np.arange(30) % 10
    np.savez(tmp_path / "good.npz", images=images, labels=labels)
    own = load(data_config(path=str(tmp_path / "good.npz")), IMAGE_MODEL)
    assert (
        np.array_equal(own.inputs.pixels[:, 0].numpy() * 16, images)
        and own.labels.tolist() == labels.tolist()
    )

    images[7, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", images=images, labels=labels)
    whole = (tmp_path / "nan.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "shape.npz", images=images[:, :4], labels=labels)
    np.savez(tmp_path / "names.npz", pictures=images, labels=labels)
    for name, message in {
        "nan.npz": r"nan\.npz: image 7 holds NaN",
        "half.npz": r"half\.npz: expected a \.npz file",
        "shape.npz": r"shape\.npz: images are float64 of shape \(30, 4, 8\)",
        "names.npz": r"names\.npz: expected a \.npz file with the arrays `images` and `labels`",
        "none.npz": r"none\.npz: expected a \.npz file",
    }.items():
        with pytest.raises(DataError, match=message):
            load(data_config(path=str(tmp_path / name)), IMAGE_MODEL)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (data_config(name="./sentimnt"), TEXT_MODEL, "sentimnt: no such file or folder"),
        (data_config(), TEXT_MODEL, "'digits' holds images, but model.id 'minilm' reads text"),
        (data_config(name="sentiment"), IMAGE_MODEL, "'sentiment' holds text"),
        (data_config(max_samples=0), IMAGE_MODEL, "data.max_samples: expected at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit(config, model, message):
    with pytest.raises(DataError, match=message):
        load(config, model)


def test_images_are_mirrored_and_moved():
    rows = torch.arange(24.0).expand(400, 3, 16, 24)            # every pixel says in which column it is
    images = ImageInputs(rows + torch.arange(16.0)[:, None] * 100, 1, "test")
    chosen = torch.arange(399, -1, -1)
    assert torch.equal(images.augmented(chosen, ()).pixels, images.pixels[chosen])

    flipped = images.augmented(chosen, ("flip",)).pixels
    mirrored = torch.tensor([torch.equal(new, old.flip(2)) for new, old in zip(flipped, images.pixels)])
    assert 150 < mirrored.sum() < 250 and torch.equal(flipped[~mirrored], images.pixels[~mirrored])

    torch.manual_seed(3)
    moved = images.augmented(chosen, ("shift",)).pixels
    places = moved[:, :, 8, 12]
    dx, dy = places[:, 0] % 100 - 12, places[:, 0] // 100 - 8
    assert set(dx.tolist()) == set(range(-3, 4)) and set(dy.tolist()) == set(range(-2, 3))
    columns, rows = (torch.arange(24) + dx[:, None]).clamp(0, 23), (torch.arange(16) + dy[:, None]).clamp(0, 15)
    want = columns[:, None] + 100 * rows[..., None]
    assert torch.equal(moved, want[:, None].expand(-1, 3, -1, -1))
    torch.manual_seed(3)
    assert torch.equal(images.augmented(chosen, ("shift",)).pixels, moved)

    levels = ImageInputs(torch.randint(0, 256, (5, 1, 3, 3), dtype=torch.uint8), 1, "test",
                         (torch.full((1, 1), 0.5), torch.zeros(1, 1)))
    varied = levels.augmented(torch.tensor([4, 0]), ("flip", "shift")).batch(torch.arange(2))["pixel_values"]
    assert varied.shape == (2, 1, 3, 3) and varied.dtype == torch.float32
