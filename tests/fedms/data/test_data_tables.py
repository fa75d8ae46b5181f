"""The strict table reader: what it refuses, by file and line, and that it never makes other rows of what is written."""
from __future__ import annotations

import csv
import gzip
import io
import json
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel
from datasets import Dataset as HubTable
from fedms.config import DataTable
from fedms.data import DataError, user_data
from fedms.data.labels import classes_of, name_of, natural
from fedms.data.tables import read_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MANY = 20_000 if os.environ.get("FEDMS_FULL") == "1" else 300
fuzzed = settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WANTED = {"data.text": "text", "data.label": "label"}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def look(path, **keys):
    """The texts, the class of each sample, and the clients."""
    config = DataTable(name=str(path), **keys)
    samples = user_data.read(config, "text")
    labels, classes = classes_of(config, samples)
    return samples.content, [classes[i] for i in labels], samples.clients


def refused(path, **keys) -> str:
    with pytest.raises(DataError) as caught:
        look(path, **keys)
    return str(caught.value)


def test_rows_with_empty_cells_are_refused_or_left_out_and_counted(tmp_path):
    path = put(tmp_path / "t.csv", "text,label\ngood,pos\n ,neg\nbad,\nfine,neg\n")
    assert 'data.empty = "drop"' in refused(path)
    config = DataTable(name=str(path), empty="drop")
    samples = user_data.read(config, "text")
    assert (samples.content, samples.labels) == (["good", "fine"], ["pos", "neg"])
    assert samples.places == [f"{path}, line 2", f"{path}, line 5"]
    assert samples.notes == (f"{path}: 2 of 4 rows left out, as a cell that is needed is empty (the first: {path}, line 3)",)
    assert "nothing in column" in refused(put(tmp_path / "none.csv", "text,label\n,a\n"))
    assert "holds no samples" in refused(put(tmp_path / "none.csv", "text,label\n,a\n"), empty="drop")
    with pytest.raises(DataError, match="nothing in column 'text'"):
        user_data.read(config, "text", labeled=False)


# Delimited text

@pytest.mark.parametrize("content, message", [
    ("text,label\ngood, really good,pos\nbad,neg\n", "line 2 has 3 fields, the header has 2"),
    ("text,label\ngood,pos\nbad\n", "line 3 has 1 field, the header has 2"),
    ("text,label\n\n\ngood,pos\nbad,neg,\n", "line 5 has 3 fields"),
    ('text,label\n"good\nfilm",pos\nbad,neg,more\n', "line 4 has 3 fields"),
    ('text,label\n"good,pos\nbad,neg\n', 'line 2: unexpected end of data'),
    ('text,label\n"He said "no"",pos\n', "line 2: ',' expected after '\"'"),
    ("text;label\ngood;pos\nbad;neg\n", "no column 'text' (data.text); its columns are: text;label. Its header holds \";\": "
                                        'set data.delimiter = ";"'),
    ("text;label\ngood, really;pos\n", 'Its header holds ";": set data.delimiter = ";"'),
    ("text|label\ngood|pos\n", 'set data.delimiter = "|"'),
    ("text,label\ncafé,pos\n".encode("cp1252"), 'line 2 is no text in the encoding utf-8; if it comes from Windows or Excel, set '
                                                'data.encoding = "cp1252"'),
    ("text,label\na,pos\n".encode("utf-16"), 'it begins as UTF-16 does: set data.encoding = "utf-16"'),
    (b"text,label\na\0b,pos\n", "line 2 holds a NUL character"),
    ("text,label,label\na,pos,neg\n", "has 2 columns 'label' (data.label); rename one"),
    ("text,label\na,\n", "line 2 has nothing in column 'label' (1 of 1 rows)"),
    ("text,label\na,pos\nb,neg\n  ,pos\n", "line 4 has nothing in column 'text'"),
    ("text,label\na,\"p\nq\"\nb,neg\nc,neg\n", "line 2: the label is 'p\\nq', which holds a line break"),
    ("text,label\na,\"['x', 'y']\"\nb,neg\nc,neg\n", "line 2: the label is \"['x', 'y']\", a written list"),
    ("", "the file is empty"), ("﻿", "the file is empty"), ("\n\n", "the file is empty"),
])
def test_what_does_not_fit_is_refused_with_its_line(content, message, tmp_path):
    said = refused(put(tmp_path / "a.csv", content))
    assert message in said and "a.csv" in said


def test_options_say_what_is_not_guessed(tmp_path):
    want = (["good, really", 'a "b'], ["pos", "neg"], None)
    assert look(put(tmp_path / "a.csv", 'text;label\ngood, really;pos\n"a ""b";neg\n'), delimiter=";") == want
    assert look(put(tmp_path / "a.tsv", 'text\tlabel\ngood, really\tpos\na "b\tneg\n'), quoting="none") == want
    assert look(put(tmp_path / "l.csv", "text,label\ncafé,pos\nb,neg\n".encode("latin-1")), encoding="latin-1")[0][0] == "café"
    assert look(put(tmp_path / "u.csv", "text,label\ncafé,pos\nb,neg\n".encode("utf-16")), encoding="utf-16")[0][0] == "café"
    assert look(put(tmp_path / "bom.csv", "﻿text,label\na,pos\nb,neg\n"))[0] == ["a", "b"]
    assert look(put(tmp_path / "z.csv.gz", gzip.compress(b"text,label\na,pos\nb,neg\n")))[0] == ["a", "b"]
    assert look(put(tmp_path / "z.jsonl.gz", gzip.compress(b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}')))[1] == ["1", "0"]
    whole = gzip.compress(b"text,label\na,pos\nb,neg\n" * 50)
    for broken in (b"x", whole[:-9], whole[:20] + b"\0" * 20):
        assert "is not whole as a gzip file" in refused(put(tmp_path / "cut.csv.gz", broken))


def test_a_row_that_may_have_swallowed_others_is_noted(tmp_path):
    path = put(tmp_path / "a.csv", 'text,label\n"good,pos\nbad,neg\nnice",pos\nworse,neg\n')
    notes = user_data.read(DataTable(name=str(path)), "text").notes
    assert len(notes) == 1 and "the row at line 2 goes on over lines that look like rows of their own" in notes[0]
    calm = put(tmp_path / "b.csv", 'text,label\n"good\nreally",pos\nworse,neg\n')
    assert user_data.read(DataTable(name=str(calm)), "text").notes == ()


# Other forms

@pytest.mark.parametrize("line, message", [
    ('{"text": "b", "la', "line 3: "), ('["b", "pos"]', "line 3 is "), ('{"text": "b", "label": NaN}', "NaN is no JSON number"),
    ('{"text": "b", "label": "x", "label": "y"}', "a name occurs twice"), ("[" * 100_000, "line 3: "),
    ('{"text": "b"}', "line 3 has nothing in column 'label'"), ('{"text": 5, "label": "x"}', "line 3: column 'text' is 5"),
    ('{"text": "b", "label": ["x", "y"]}', "line 3: the label is ['x', 'y'], a list"),
    ('{"text": "b", "label": {"v": 1}}', "a dict; expected one text or number a sample"),
    ('{"text": "b", "label": "\\ud800"}', "line 3: the label is"),
])
def test_json_lines_are_read_strictly(line, message, tmp_path):
    said = refused(put(tmp_path / "a.jsonl", '{"text": "a", "label": "x"}\n\n' + line + '\n{"text": "c", "label": "x"}\n'))
    assert message in said


def test_json_values_stay_as_they_are(tmp_path):
    big = 2**63 + 1
    rows = [{"text": "2020-01-01", "label": big, "client": "2020-01-01"}, {"text": "a\u2028b", "label": 1.0, "client": "b"}]
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert look(path, client="client") == (["2020-01-01", "a\u2028b"], [str(big), "1"], ["2020-01-01", "b"])


def test_parquet_columns_that_pandas_made_an_index(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"], "n": [1, 2]}).set_index(["label", "text"])
    (tmp_path / "label=z").mkdir()
    frame.to_parquet(tmp_path / "label=z/a.parquet")
    assert look(tmp_path / "label=z/a.parquet") == (["a", "b"], ["x", "y"], None)


@pytest.mark.parametrize("labels", [[["x", "z"], ["y"]], [{"v": 1}, {"v": 0}], [b"x", b"y"]])
def test_what_is_no_label_in_parquet_and_on_the_hub(labels, tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "a.parquet")
    assert "row 1: the label is" in refused(tmp_path / "a.parquet")
    config = DataTable(name="org/x")
    with pytest.raises(DataError, match="row 1: the label is"):
        classes_of(config, user_data.from_hub(HubTable.from_dict({"text": ["a", "b"], "label": labels}), config, "text"))


# Names

LABELS = {"whole": [1, 2, 1, 10], "floats": [1.0, 2.0, 1.0, 10.0], "halves": [0.5, 1.5, 0.5, 2.0], "words": ["b", "a ", "b", "Äpfel"],
          "truth": [True, False, True, True]}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_and_clients_have_the_same_names_in_every_form(kind, tmp_path):
    labels, texts = LABELS[kind], ["p", "q", "r", "s"]
    rows = list(zip(texts, labels, labels))
    columns = {"text": texts, "label": labels, "client": labels}
    found = []
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *rows])
    put(tmp_path / "a.jsonl", "\n".join(json.dumps(dict(zip(columns, row))) for row in rows))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        found.append(look(tmp_path / name, client="client"))
    config = DataTable(name="org/x", client="client")
    samples = user_data.from_hub(HubTable.from_dict(columns), config, "text")
    codes, classes = classes_of(config, samples)
    found.append((list(samples.content), [classes[i] for i in codes], samples.clients))
    assert found.count(found[0]) == 4
    assert found[0][1] == found[0][2] == [name_of(label) for label in labels]


def test_one_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD"))
    path = put(tmp_path / "a.csv", f"{nfd},label,who\na,{nfc},{nfc}\nb,neg,{nfd}\nc,{nfd},x\n")
    texts, labels, clients = look(path, text=nfc, client="who", classes=(nfd, "neg"))
    assert labels == [nfd, "neg", nfd] and clients == [nfc, nfc, "x"]
    for stem, other in ((nfc, "a"), (nfd, "b")):
        put(tmp_path / f"t/{stem}{other}.csv", "text,label\na,x\nb,y\n")
    assert set(look(tmp_path / "t")[2]) == {nfc + "a", nfc + "b"}


def test_hub_labels_are_positions_in_the_names(tmp_path):
    names = sorted(map(str, range(12)))
    table = HubTable.from_dict({"text": [f"t{i}" for i in range(24)], "label": [i % 12 for i in range(24)]})
    table = table.cast_column("label", ClassLabel(names=names))
    true = [names[i % 12] for i in range(24)]
    config = DataTable(name="org/x")
    codes, classes = classes_of(config, user_data.from_hub(table, config, "text"))
    assert [classes[i] for i in codes] == true and classes == tuple(names)
    table.to_parquet(tmp_path / "a.parquet")        # the names travel in the file
    assert look(tmp_path / "a.parquet")[1] == true
    words = tuple(f"word {i}" for i in range(12))   # the user's names win
    codes, classes = classes_of(DataTable(name="org/x", classes=words), user_data.from_hub(table, config, "text"))
    assert codes.tolist() == [i % 12 for i in range(24)] and classes == words
    codes, classes = classes_of(DataTable(name="org/x", classes=tuple(map(str, range(12)))), user_data.from_hub(table, config, "text"))
    assert [classes[i] for i in codes] == true


def test_hub_classes_without_samples_are_left_out():
    table = HubTable.from_dict({"text": list("abcdefgh"), "label": [1, 2, 3, 4] * 2}).cast_column(
        "label", ClassLabel(names=["1", "2", "3", "4", "5"]))
    config = DataTable(name="org/x")
    codes, classes = classes_of(config, user_data.from_hub(table, config, "text"))
    assert classes == ("2", "3", "4", "5") and codes.tolist() == [0, 1, 2, 3] * 2


def test_numbers_are_not_taken_for_positions_where_the_names_are_numbers(tmp_path):
    path = put(tmp_path / "a.csv", "text,label\na,0\nb,1\nc,2\n")
    assert "label '0' is no class; classes are: 1, 2, 3" in refused(path, classes=("1", "2", "3"))
    assert look(path, classes=("x", "y", "z"))[1] == ["x", "y", "z"]


@pytest.mark.parametrize("columns, message", [
    ({"label": [0.0, float("nan"), 1.0, 0.0]}, "row 2 has nothing in column 'label'"),
    ({"client": ["x", None, "y", None]}, "row 2 has nothing in column 'client' (2 of 4 rows)"),
    ({"client": [1.0, float("nan"), 2.0, 1.0]}, "row 2 has nothing in column 'client'"),
    ({"text": ["a", "  ", "c", "d"]}, "row 2 has nothing in column 'text'"),
])
def test_missing_values_are_refused_wherever_they_come_from(columns, message, tmp_path):
    whole = {"text": list("abcd"), "label": [0, 1, 0, 1], "client": list("xyxy"), **columns}
    pq.write_table(pa.table(whole), tmp_path / "a.parquet")
    assert message in refused(tmp_path / "a.parquet", client="client")
    config = DataTable(name="org/x", client="client")
    with pytest.raises(DataError) as caught:
        user_data.from_hub(HubTable.from_dict(whole), config, "text")
    assert message in str(caught.value)


def test_minus_one_is_a_label_where_classes_have_no_names():
    config = DataTable(name="org/x")
    samples = user_data.from_hub(HubTable.from_dict({"text": list("abcd"), "label": [-1, 0, 1, -1]}), config, "text")
    assert classes_of(config, samples)[1] == ("-1", "0", "1")


def test_natural_order():
    assert sorted(["c10", "c2", "10", "9", "-1", "c²", "c1"], key=natural) == ["-1", "9", "10", "c1", "c2", "c10", "c²"]


def test_a_client_named_by_a_number_is_found_by_its_name():
    from fedms.config import ConfigError
    from fedms.exports.trained_run import TrainedRun

    trained = SimpleNamespace(task=SimpleNamespace(groups={0: "1", 1: "2", 2: "3", 3: "Äpfel", 4: "3"}), elsewhere=frozenset())
    assert [TrainedRun.client(trained, name) for name in ("1", "2", "0", "id:1", 1)] == [0, 1, 0, 1, 1]
    assert TrainedRun.client(trained, unicodedata.normalize("NFD", "Äpfel")) == 3
    with pytest.raises(ConfigError, match="id:2, id:4"):
        TrainedRun.client(trained, "3")


# Folders

def test_files_that_are_not_read_are_noted(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / f"{name}.csv", "text,label\ngood,pos\nbad,neg\n")
    put(tmp_path / "c.xlsx", b"PK")
    put(tmp_path / "sub/d.csv", "text,label\ngood,pos\n")
    put(tmp_path / ".hidden.xlsx", b"PK")
    below, other = user_data.read(DataTable(name=str(tmp_path)), "text").notes
    assert "1 file left out, as they lie in a folder below it (.csv): sub/d.csv" in below
    assert "1 file left out, as they are no tables that can be read (.xlsx): c.xlsx" in other
    for name, advice in {"a.xlsx": "save its sheet as .csv", "a.csv.zip": "unpack it first", "a.json": "one JSON object a line"}.items():
        assert advice in refused(put(tmp_path / "x" / name, b"PK"))


def test_splits_are_no_clients(tmp_path):
    for name in ("train", "validation", "test"):
        put(tmp_path / f"files/{name}.csv", f"text,label\n{name},pos\nbad,neg\n")
        put(tmp_path / f"folders/{name}/a.csv", f"text,label\n{name},pos\nbad,neg\n")
    for root in ("files", "folders"):
        samples = user_data.read(DataTable(name=str(tmp_path / root)), "text")
        assert samples.content == ["train", "bad"] and samples.clients is None
        assert "only the split 'train' is read (data.part)" in samples.notes[0] and "left out: test" in samples.notes[0]
        assert look(tmp_path / root, part="val")[0] == ["validation", "bad"]
        assert "data.part: got 'all'" in refused(tmp_path / root, part="all")
    put(tmp_path / "files/other.csv", "text,label\na,pos\n")
    assert "are they splits or clients?" in refused(tmp_path / "files")
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        put(tmp_path / f"shards/{name}.csv", f"text,label\n{name},pos\nbad,neg\n")
    content, _, clients = look(tmp_path / "shards")
    assert len(content) == 4 and clients is None
    unlabeled = user_data.read(DataTable(name=str(tmp_path / "folders/test")), "text", labeled=False)
    assert unlabeled.content == ["test", "bad"] and unlabeled.labels is None


# Fuzzing

words = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
cells = words.filter(lambda text: text.strip())


@fuzzed
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]),
       st.sampled_from(["\n", "\r\n"]))
def test_what_a_csv_writer_writes_is_read_again(tmp_path, rows, delimiter, ending):
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    path = put(tmp_path / "a.csv", buffer.getvalue())
    table = read_table(path, DataTable(name=str(path), delimiter=delimiter), WANTED)
    assert list(zip(table.columns["text"], table.columns["label"])) == rows


@fuzzed
@given(st.lists(st.dictionaries(st.sampled_from(["text", "label", "other"]),
                                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
                                | st.lists(st.integers(), max_size=2), max_size=3), max_size=5))
def test_what_a_json_writer_writes_is_read_again(tmp_path, rows):
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) or "\n")
    try:
        table = read_table(path, DataTable(name=str(path)), WANTED)
    except DataError:
        assert not rows
        return
    for name, column in table.columns.items():
        assert column == [row.get(name) for row in rows]


@fuzzed
@given(st.sampled_from([".csv", ".tsv", ".jsonl", ".csv.gz", ".parquet"]),
       st.binary(max_size=80) | st.text(st.sampled_from('ab,;\t\n\r"{}[]:0'), max_size=60).map(
           lambda text: b"text,label\n" + text.encode()))
def test_any_bytes_are_read_or_refused_in_words(tmp_path, suffix, content):
    path = put(tmp_path / f"a{suffix}", content)
    try:
        texts, labels, _ = look(path)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert len(texts) == len(labels) and all(text.strip() for text in texts)
    if suffix == ".csv":        # no row is lost: each field is somewhere in the file
        assert all(text in content.decode("utf-8-sig").replace('""', '"') for text in texts)


@settings(max_examples=MANY // 3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_refused_in_words(tmp_path, data):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": ["x", "y", "x"]}), buffer)
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = put(tmp_path / "a.parquet", bytes(whole))
    try:
        look(path)
    except DataError as error:
        assert str(path) in str(error)


@fuzzed
@given(st.one_of(words, st.integers(), st.floats(), st.booleans(), st.none(), st.binary(), st.lists(st.integers()),
                 st.decimals(), st.dates(), st.sampled_from([np.int64(3), np.float32(2.0), np.nan])))
def test_a_name_is_one_of_its_own_kind_or_refused(value):
    try:
        name = name_of(value)
    except ValueError as error:
        assert "expected" in str(error) or "holds" in str(error)
        return
    assert name and name_of(name) == name == name.strip() == unicodedata.normalize("NFC", name)
