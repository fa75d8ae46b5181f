"""Data of one's own: tables, folders of images, hub data sets; and what is said when something is wrong with them."""
from __future__ import annotations

import os
import struct
import zlib

import datasets
import numpy as np
import pandas as pd
import pytest
import saved_models
import torch
from PIL import Image

from fedms import data, models
from fedms.config import ClientsTable, ConfigError, DataTable, ModelTable, config_from_dict
from fedms.data import DataError, hub_access, user_data
from fedms.data.images import read_images
from fedms.runs.experiment import with_clients
from fedms.storage.run_folder import RunFolder, check_same_data

TEXTS = ["the film was good", "the dog was bad", "a plain cat", "not a great ear", "very bad", "good tail"]
LABELS = ["good", "bad", "plain", "good", "bad", "plain"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return models.load(ModelTable(id=str(saved_models.save("bert", tmp_path_factory.mktemp("bert")))))


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    return models.load(ModelTable(id=str(saved_models.save("clip", tmp_path_factory.mktemp("clip")))))


def frame(**columns):
    return pd.DataFrame({"text": TEXTS, "label": LABELS, **columns})


def write(table: pd.DataFrame, path):
    {".csv": lambda: table.to_csv(path, index=False), ".tsv": lambda: table.to_csv(path, index=False, sep="\t"),
     ".parquet": lambda: table.to_parquet(path), ".jsonl": lambda: table.to_json(path, orient="records", lines=True),
     }[path.suffix]()
    return path


def load(path, model, **keys):
    return data.load(DataTable(name=str(path), **keys), model)


def refused(path, model, **keys) -> str:
    with pytest.raises(DataError) as caught:
        load(path, model, **keys)
    return str(caught.value)


def photo(path, seed=0, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photos(root, *names):
    for seed, name in enumerate(names):
        photo(root / name, seed)
    return root


# Tables

@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_every_kind_of_table_gives_the_same_samples(suffix, tmp_path, reader):
    table = frame(who=["b2", "b10", "b2", "b10", "b2", "b2"])
    got = load(write(table, tmp_path / f"mine{suffix}"), reader, client="who")
    assert got.classes == ("bad", "good", "plain") and got.labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert got.group_names == ("b2", "b10") and got.groups.tolist() == [0, 1, 0, 1, 0, 0]
    assert got.prompts == (("bad",), ("good",), ("plain",))
    assert torch.equal(got.inputs.fields["input_ids"], reader.tokenize(TEXTS, 20).fields["input_ids"])
    csv = load(write(table, tmp_path / "other.csv"), reader, client="who")
    assert got.fingerprint == csv.fingerprint != load(tmp_path / "other.csv", reader).fingerprint


def test_a_table_a_client(tmp_path, reader):
    for name, rows in (("site10", slice(0, 2)), ("site9", slice(2, 6))):
        write(frame()[rows], tmp_path / f"{name}.csv")
    got = load(tmp_path, reader)
    assert got.group_names == ("site9", "site10") and got.groups.tolist() == [0, 0, 0, 0, 1, 1]
    split = data.partition(got, DataTable(global_test=0.0), ClientsTable(count=2), seed=0)
    assert [c.group for c in split.clients] == ["site9", "site10"]
    (tmp_path / "flat").mkdir()
    assert "no natural groups" in str(_partition_error(load(write(frame(), tmp_path / "flat/all.csv"), reader)))


def _partition_error(dataset):
    with pytest.raises(DataError) as caught:
        data.partition(dataset, DataTable(), ClientsTable(count=2), seed=0)
    return caught.value


def test_labels_that_are_numbers(tmp_path, reader):
    stars = frame().assign(label=[10, 9, 2, 10, 9, 2])
    for suffix in (".csv", ".parquet", ".jsonl"):
        got = load(write(stars, tmp_path / f"stars{suffix}"), reader)
        assert got.classes == ("2", "9", "10") and got.labels.tolist() == [2, 1, 0, 2, 1, 0] and got.prompts is None
    codes = write(frame().assign(label=[0, 1, 2, 0, 1, 2]), tmp_path / "codes.csv")
    named = load(codes, reader, classes=("good", "bad_one", "plain"), prompt="the film was {}")
    assert named.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert named.prompts == (("the film was good",), ("the film was bad one",), ("the film was plain",))


def test_words_that_pandas_takes_for_nothing(tmp_path, reader):
    got = load(write(frame().assign(label=["None", "NA"] * 3), tmp_path / "mine.csv"), reader)
    assert got.classes == ("NA", "None")


def test_a_subsample_keeps_classes_and_clients(tmp_path, reader):
    many = pd.concat([frame(who="a b".split() * 3)] * 10)
    path = write(many, tmp_path / "many.parquet")
    few = load(path, reader, client="who", max_samples=30)
    assert len(few) == 30 and torch.bincount(few.labels).tolist() == [10, 10, 10]
    assert few.fingerprint == load(path, reader, client="who", max_samples=30).fingerprint


@pytest.mark.parametrize("change, keys, message", [
    (lambda t: t.rename(columns={"text": "body"}), {}, "no column 'text' (data.text); its columns are: body, label"),
    (lambda t: t, {"label": "stars"}, "no column 'stars' (data.label); its columns are: text, label"),
    (lambda t: t, {"client": "who"}, "no column 'who' (data.client)"),
    (lambda t: t.assign(text=[*TEXTS[:4], None, " "]), {}, "line 6 has nothing in column 'text' (2 of 6 rows)"),
    (lambda t: t.assign(label=[None, *LABELS[1:]]), {}, "line 2 has nothing in column 'label' (1 of 6 rows)"),
    (lambda t: t[:0], {}, "holds no samples"),
    (lambda t: t.assign(label="good"), {}, "all samples are of one class, 'good'"),
    (lambda t: t.assign(label=[f"x{i}" for i in range(6)]), {}, "every sample has a label of its own"),
    (lambda t: t, {"classes": ("good", "bad", "plain", "ugly")}, "class 'ugly' is empty"),
    (lambda t: t, {"classes": ("good", "bad")}, "line 4: label 'plain' is no class; classes are: good, bad"),
])
def test_what_is_wrong_with_a_table(change, keys, message, tmp_path, reader):
    said = refused(write(change(frame()), tmp_path / "mine.csv"), reader, **keys)
    assert message in said and "mine.csv" in said


def test_tables_that_cannot_be_read(tmp_path, reader):
    for name, content in {"cut.parquet": b"PAR1 and no more", "latin.csv": b"text,label\ncaf\xe9,good\n", "empty.csv": b"",
                          "ragged.csv": b"text,label\na,b\na,b,c\n", "cut.jsonl": b'{"text": "a", "la'}.items():
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name, reader).startswith(f"{tmp_path / name}: cannot be read as ")
    assert "is no table; accepted: .csv" in refused(write(frame(), tmp_path / "mine.csv").rename(tmp_path / "m.xls"), reader)
    assert "no such file or folder" in refused(tmp_path / "missing.csv", reader)
    (tmp_path / "none").mkdir()
    assert "holds neither tables" in refused(tmp_path / "none", reader)
    write(frame().assign(text=range(6)), tmp_path / "numbers.parquet")
    assert "row 1: column 'text' is 0, expected a text" in refused(tmp_path / "numbers.parquet", reader)


# Images

def test_folders_of_images(tmp_path, viewer):
    got = load(photos(tmp_path / "flat", "cat/1.png", "cat/2.jpg", "big_dog/1.png", "big_dog/.hidden.png"), viewer)
    assert got.classes == ("big_dog", "cat") and got.labels.tolist() == [0, 1, 1] and got.groups is None
    assert got.prompts == (("a photo of a big dog.",), ("a photo of a cat.",))
    assert got.inputs.pixels.shape == (3, 3, 16, 16) and got.inputs.pixels.dtype == torch.uint8
    want = viewer.prepare([Image.open(tmp_path / "flat/cat/1.png")])
    assert torch.equal(got.inputs.pixels[1:2], want)
    deep = load(photos(tmp_path / "deep", "site2/cat/1.png", "site10/cat/1.png", "site10/dog/1.png"), viewer)
    assert deep.group_names == ("site2", "site10") and deep.labels.tolist() == [0, 1, 0]
    assert deep.groups.tolist() == [1, 1, 0]


def test_images_in_tables(tmp_path, viewer):
    files = [photo(tmp_path / f"files/{i}.png", i) for i in range(4)]
    table = pd.DataFrame({"image": [f"files/{i}.png" for i in range(4)], "label": ["cat", "dog"] * 2})
    by_name = load(write(table, tmp_path / "names.csv"), viewer)
    embedded = table.assign(image=[{"bytes": f.read_bytes(), "path": f.name} for f in files])
    by_bytes = load(write(embedded, tmp_path / "bytes.parquet"), viewer)
    assert by_name.fingerprint == by_bytes.fingerprint and by_name.labels.tolist() == [0, 1, 0, 1]
    assert "no column 'text'" not in refused(write(table[:1], tmp_path / "one.csv"), viewer)


def test_unreadable_images_are_named(tmp_path, viewer):
    root = photos(tmp_path / "all", "cat/1.png", "dog/1.png", "dog/2.png")
    whole = (root / "dog/1.png").read_bytes()
    (root / "dog/1.png").write_bytes(whole[:len(whole) // 2])
    (root / "cat/2.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(root / "cat/3.png")
    said = refused(root, viewer)
    assert "3 of 5 images cannot be read" in said
    for name in ("dog/1.png", "cat/2.png", "cat/3.png (I;16: more than 8 bits a channel"):
        assert str(root / name.split(" ")[0]) in said and name in said
    table = pd.DataFrame({"image": ["all/cat/1.png", "all/gone.png"], "label": ["cat", "dog"]})
    assert "gone.png" in refused(write(table, tmp_path / "mine.csv"), viewer)


def test_one_unreadable_image_of_many_is_left_out(tmp_path, viewer):
    root = photos(tmp_path / "all", *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)))
    (root / "cat/1.png").write_bytes(b"no image")
    got = load(root, viewer)
    assert got.labels.tolist() == [0, 0, 1, 1, 1] and len(got.inputs) == 5
    assert "1 image of 6 cannot be read and left out" in got.notes[0] and "cat/1.png" in got.notes[0]
    assert torch.equal(got.inputs.pixels[1:2], viewer.prepare([Image.open(root / "cat/2.png")]))
    image = Image.open(root / "dog/1.png")
    table = datasets.Dataset.from_dict({"image": [image] * 3 + [{"bytes": b"no image", "path": None}],
                                        "label": ["cat", "dog", "cat", "dog"]},
                                       features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}))
    samples = user_data.from_hub(table, DataTable(name="org/x"), "images")
    read = read_images(samples.content, samples.places, viewer, "org/x", strict=False)
    assert read.kept == [0, 1, 2] and "org/x, row 4" in read.notes[0]
    with pytest.raises(DataError, match="org/x, row 4"):
        read_images(samples.content, samples.places, viewer, "org/x", strict=True)


def test_links_are_followed_and_loops_refused(tmp_path, viewer):
    src = photos(tmp_path / "elsewhere", "p2/cat/a.png", "p2/dog/a.png")
    root = photos(tmp_path / "data", "p1/cat/a.png", "p1/dog/a.png", "p3/cat/a.png")
    (root / "p2").symlink_to(src / "p2")
    (root / "p3/dog").symlink_to(src / "p2/dog")
    got = load(root, viewer)
    assert len(got) == 6 and got.group_names == ("p1", "p2", "p3") and torch.bincount(got.groups).tolist() == [2, 2, 2]
    (root / "p1/dog/loop").symlink_to(root)
    assert "is a link to a folder above it" in refused(root, viewer)


def test_splits_of_images_are_no_clients(tmp_path, viewer):
    root = photos(tmp_path / "a", *(f"{split}/{kind}/1.png" for split in ("train", "test") for kind in ("cat", "dog")))
    got = load(root, viewer)
    assert len(got) == 2 and got.groups is None and "only the split 'train' is read" in got.notes[0]
    bare = photos(tmp_path / "b", "train/1.png", "test/1.png")
    assert "are splits (test, train), where classes are expected" in refused(bare, viewer)


@pytest.mark.parametrize("mode, kind", [("LA", "png"), ("RGBA", "png"), ("P", "png"), ("RGBA", "webp"), ("P", "gif"), ("PA", "tiff")])
def test_transparent_parts_become_white(mode, kind, tmp_path):
    if mode == "PA":
        image = Image.new("PA", (8, 8))         # Pillow writes none, so it is given as an object
        image.putalpha(0)
        assert user_data._open(image).getextrema() == ((255, 255),) * 3
        return
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 4, 8))
    path = tmp_path / f"a.{kind}"
    if mode == "P":
        flat = Image.new("P", (8, 8), 1)
        flat.putpalette([200, 0, 0, 0, 0, 0])
        flat.paste(0, (0, 0, 4, 8))
        flat.save(path, transparency=1)
    else:
        image.convert(mode).save(path, **({"lossless": True} if kind == "webp" else {}))
    seen = user_data._open(path)
    assert seen.mode == "RGB" and seen.getpixel((6, 4)) == (255, 255, 255) and seen.getpixel((1, 4)) != (255, 255, 255)


def test_more_than_8_bits_a_channel_are_refused(tmp_path):
    wide = np.random.default_rng(0).integers(0, 4096, (16, 16, 3))

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
                                     + chunk(b"IEND", b""))
    (tmp_path / "a.ppm").write_bytes(b"P6 16 16 4095\n" + wide.astype(">u2").tobytes())
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140), (277, 3, 1, 3),
            (278, 3, 1, 16), (279, 4, 1, 16 * 16 * 6)]
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + struct.pack("<HH" if tag[1] == 3 and tag[2] == 1 else "<I",
                                                                   *((tag[3], 0) if tag[1] == 3 and tag[2] == 1 else (tag[3],)))
                       for tag in tags)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    (tmp_path / "a.tiff").write_bytes(tiff.ljust(134, b"\0") + struct.pack("<HHH", 16, 16, 16) + wide.astype("<u2").tobytes())
    for name in ("a.png", "a.ppm", "a.tiff"):
        with pytest.raises(ValueError, match="more than 8 bits a channel"):
            user_data._open(tmp_path / name)
        with pytest.raises(ValueError, match="more than 8 bits a channel"):
            user_data._open((tmp_path / name).read_bytes())
    modes = {"b.png": "RGB", "b.ppm": "RGB", "c.png": "L", "c.tiff": "CMYK", "d.png": "1", "d.jp2": "RGB", "d.bmp": "RGB"}
    for name, mode in modes.items():
        Image.new(mode, (8, 8)).save(tmp_path / name)
        user_data._open(tmp_path / name)


def test_what_was_done_to_images_is_said(tmp_path, viewer):
    root = photos(tmp_path / "all", "cat/1.png", "dog/1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 12), "red").save(root / "cat/turned.jpg", exif=exif)
    Image.new("RGB", (8, 12), "red").save(root / "cat/pages.tiff", save_all=True, append_images=[Image.new("RGB", (8, 12))])
    Image.new("L", (8, 12)).save(root / "dog/gray.jfif", "JPEG")
    (root / "dog/note.txt").write_text("dogs")
    notes = "; ".join(load(root, viewer).notes)
    for said in ("1 file left out", "note.txt", "1 image has several pages", "1 image is turned", "1 image is gray"):
        assert said in notes
    assert user_data._open(root / "cat/turned.jpg").size == (12, 8)


def test_what_was_found_is_said(tmp_path, reader):
    table = pd.concat([frame(who="a b".split() * 3)] * 20).assign(label=[f"c{i % 60}" for i in range(120)])
    got = load(write(table, tmp_path / "mine.csv"), reader, client="who")
    assert any("60 classes for 120 samples; is data.label = 'label' the column of classes?" in note for note in got.notes)
    said = data.describe(got)
    assert said.startswith(f"{tmp_path / 'mine.csv'}: 120 samples; 60 classes of 2 samples each: c0 (2), c1 (2)")
    assert "and 50 more; 2 groups of 60 samples each: a (60), b (60)" in said


def test_the_number_of_clients_follows_the_data(tmp_path, reader):
    got = load(write(frame(who=list("abcdab")), tmp_path / "mine.csv"), reader, client="who")

    def count(**tables):
        return with_clients(config_from_dict({"data": {"name": str(tmp_path / "mine.csv")}, **tables}), got).clients.count

    assert count() == 4 and count(clients={"unseen": 1}) == 3 and count(clients={"count": 2}) == 2
    assert count(data={"name": "mine.csv", "partition": "iid"}) == 12
    with pytest.raises(ConfigError, match="clients.min: got 5, above clients.count = 4"):
        count(clients={"min": 5})


def test_other_data_have_another_stamp_and_fingerprint(tmp_path, reader):
    path = write(frame(who=list("ababab")), tmp_path / "mine.csv")
    table = DataTable(name=str(path), client="who")
    before, first = data.stamp(table), data.load(table, reader)
    assert before == data.stamp(table)
    write(frame(who=list("xyxyxy")), path)
    os.utime(path, ns=(1, 1))
    assert before != data.stamp(table) and data.load(table, reader).fingerprint != first.fingerprint


def test_what_is_wrong_with_a_folder(tmp_path, viewer, reader):
    root = photos(tmp_path / "a", "cat/1.png", "dog/1.png")
    (root / "bird").mkdir()
    assert "class 'bird' is empty: its folder holds no image" in refused(root, viewer)
    assert "holds images, but the model reads text" in refused(root, reader)
    mixed = photos(tmp_path / "b", "cat/1.png", "site/dog/1.png")
    assert "expected CLASS/IMAGE or CLIENT/CLASS/IMAGE throughout" in refused(mixed, viewer)
    assert "throughout" in refused(photos(tmp_path / "c", "1.png", "2.png"), viewer)


# The hub

def test_a_hub_data_set(monkeypatch, reader, viewer):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"]),
                                  "who": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 3, "who": [7, 7, 7, 3, 3, 3]}, features=features)
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = load("org/films", reader, client="who", subset="small", part="test")
    assert asked == [(("org/films", "small"), {"split": "test"})]
    assert got.classes == ("good", "bad") and got.labels.tolist() == [0, 1] * 3
    assert got.group_names == ("3", "7") and got.groups.tolist() == [1, 1, 1, 0, 0, 0]
    assert "no column 'body' (data.text); its columns are: text, label, who" in refused("org/films", reader, text="body")
    table = table.map(lambda row: {"label": -1})
    assert "org/films, row 1 has nothing in column 'label' (6 of 6 rows)" in refused("org/films", reader)

    image = Image.fromarray(np.full((20, 20, 3), 90, dtype=np.uint8))
    table = datasets.Dataset.from_dict({"image": [image] * 4, "label": ["cat", "dog"] * 2}).cast_column(
        "image", datasets.Image())
    seen = load("org/photos", viewer)
    assert seen.classes == ("cat", "dog") and torch.equal(seen.inputs.pixels[:1], viewer.prepare([image]))


def test_a_hub_data_set_that_cannot_be_had(monkeypatch, reader):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(hub_access, "_why_unreachable", lambda: "")
    said = refused("org/nothing", reader)
    assert "'org/nothing' is neither built in nor a file or folder in" in said and "ConnectionError: no route" in said
    monkeypatch.setattr(hub_access, "_why_unreachable", lambda: "the hub is on holiday")
    assert "the hub is on holiday, and the hub's cache" in refused("org/nothing", reader)


def test_a_run_folder_refuses_other_data_of_the_same_name(tmp_path):
    check_same_data(tmp_path, "a.csv", "1234")      # an older folder names none
    folder = RunFolder.create(tmp_path / "run", config_from_dict({}))
    try:
        folder.keep_data("a.csv", "1234")
        folder.keep_data("a.csv", "1234")
        with pytest.raises(ConfigError, match="'a.csv' now holds other data than when"):
            folder.keep_data("a.csv", "5678")
    finally:
        folder.close()
