"""How a table is written is guessed from its first lines, for `fedms init` alone."""
from __future__ import annotations

import gzip

import pytest

from fedms.data.guess import Format, guess_format

ROWS = [["text", "label"], ["Schöne Grüße, aus Graz", "good"], ["kaputt | leider", "bad"]]


def written(path, delimiter, encoding, quote='"'):
    text = "".join(delimiter.join(f"{quote}{cell}{quote}" for cell in row) + "\r\n" for row in ROWS)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name, delimiter, encoding, found", [
    ("a.csv", ",", "utf-8", Format()), ("a.csv", ";", "cp1252", Format("cp1252", ";")), ("a.csv", "\t", "utf-16", Format("utf-16", "\t")),
    ("a.csv", "|", "utf-8-sig", Format("utf-8", "|")), ("a.tsv", "\t", "utf-8", Format()), ("a.tsv", ",", "utf-8", Format("utf-8", ",")),
    ("a.csv.gz", ";", "utf-8", Format("utf-8", ";")),
])
def test_the_first_lines_tell(tmp_path, name, delimiter, encoding, found):
    assert guess_format(written(tmp_path / name, delimiter, encoding)) == found


def test_a_comma_in_texts_is_no_delimiter(tmp_path):
    assert guess_format(written(tmp_path / "a.csv", ";", "utf-8", quote="")) == Format("utf-8", ";")


@pytest.mark.parametrize("name, data", [("a.csv", b""), ("a.csv", b"one column\nonly\n"), ("a.parquet", b"PAR1"), ("gone.csv", None),
                                        ("a.csv.gz", b"no gzip"), ("a.jsonl", b'{"text": "a;b"}\n')])
def test_what_says_nothing_gives_the_defaults(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert guess_format(tmp_path / name) == Format()


def test_a_character_is_not_cut_at_the_end_of_what_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(("text;label\n" + "é;ü\n" * 300_000).encode())
    assert guess_format(tmp_path / "a.csv") == Format("utf-8", ";")
