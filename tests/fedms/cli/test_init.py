"""`fedms init`: run files for a user's own data, asked for and not."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedms import cli, errors
from fedms.cli import init, run_files
from fedms.config import load_config

ROWS = [f"please pay {i};{'bill' if i % 2 else 'query'};{'Bern' if i < 20 else 'Graz'}" for i in range(40)]


@pytest.fixture(autouse=True)
def mail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mail.csv").write_text("text,folder,office\n" + "\n".join(ROWS).replace(";", ",") + "\n")


def fedms(*words, answers=None):
    return CliRunner().invoke(cli.app, ["init", *words], input=answers)


def test_flags_and_guesses_make_a_run_file(tmp_path):
    result = fedms("mine.toml", "--data", "mail.csv", "--label", "folder")
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "mine.toml")
    assert (config.data.name, config.data.text, config.data.label, config.data.client) == ("mail.csv", "text", "folder", "office")
    assert (config.model.id, config.data.partition, config.clients.count) == ("minilm", "natural", None)
    assert "found: 40 samples; 2 labels: query (20), bill (20); 2 clients" in result.stderr
    assert "mine.toml: written. Now:  fedms run mine.toml" in result.stdout
    text = (tmp_path / "mine.toml").read_text()
    assert all("#" in line for line in text.splitlines() if line.startswith(("id", "name", "text", "label", "client")))


def test_without_owners_clients_are_simulated(tmp_path):
    assert fedms("--data", "mail.csv", "--label", "folder", "--client", "none", "--yes").exit_code == 0
    config = load_config(tmp_path / "my-run.toml")
    assert (config.data.partition, config.data.client, config.clients.count) == ("dirichlet", None, run_files.SIMULATED_CLIENTS)


def test_columns_are_not_compared_where_the_text_is_given(tmp_path, monkeypatch):
    def compared(table):
        raise AssertionError("it was asked for by --text")

    monkeypatch.setattr("fedms.data.guess.longest_texts", compared)
    (tmp_path / "odd.csv").write_text((tmp_path / "mail.csv").read_text().replace("text,folder", "words,kind", 1))
    result = fedms("--data", "odd.csv", "--text", "words", "--label", "kind", "--yes")
    assert result.exit_code == 0, result.output


def test_questions_are_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "has_terminal", lambda: True)
    result = fedms(answers="mail.csv\n\n\nfolder\n\n\n")
    assert result.exit_code == 0, result.output
    assert [number for number in "123456" if f"{number}. W" in result.stderr] == list("123456")
    assert load_config(tmp_path / "my-run.toml").data.client == "office"


def test_a_folder_of_images_needs_no_columns(tmp_path):
    for client in ("x", "y"):
        for label in ("cat", "dog"):
            place = tmp_path / "photos" / client / label
            place.mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(place / "1.png")
    result = fedms("--data", "photos", "--model", "vit-fashion")
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "my-run.toml")
    assert (config.data.name, config.data.client, config.data.partition) == ("photos", None, "natural")


@pytest.mark.parametrize("words, code, said", [
    ((), errors.USAGE, "--data: without a terminal to ask on, name the data"),
    (("--data", "mial.csv"), errors.UNAVAILABLE, "mial.csv: no such file or folder"),
    (("--data", "mail.csv", "--label", "fodler"), errors.UNAVAILABLE, "fodler"),
    (("mail.csv", "--data", "mail.csv"), errors.FOLDER, "mail.csv: exists already"),
    (("--data", "my.pdf"), errors.UNAVAILABLE, "my.pdf is neither a table"),
    (("--data", "one.csv"), errors.UNAVAILABLE, "one.csv: all samples are of one class, 'a'; at least two are needed"),
    (("--data", "lines.csv"), errors.UNAVAILABLE, r"line 2: the label is 'a\nb', which holds a line break"),
])
def test_mistakes_leave_no_file(tmp_path, words, code, said):
    (tmp_path / "my.pdf").write_text("x")
    (tmp_path / "one.csv").write_text("text,label\n1,a\n2,a\n")
    (tmp_path / "lines.csv").write_text('text,label\n1,"a\nb"\n2,c\n3,c\n')
    before = sorted(tmp_path.iterdir())
    result = fedms(*words)
    assert result.exit_code == code and said in result.stderr and sorted(tmp_path.iterdir()) == before


def test_awkward_names_are_quoted(tmp_path):
    answers = run_files.Answers('a "b"\\c\n', {"text": "te xt", "label": "l="}, "c#", "minilm")
    (tmp_path / "run.toml").write_text(run_files.run_file(answers))
    data = load_config(tmp_path / "run.toml").data
    assert (data.name, data.text, data.label, data.client) == ('a "b"\\c\n', "te xt", "l=", "c#")


def test_delimiter_and_encoding_are_guessed_said_and_written(tmp_path):
    (tmp_path / "excel.csv").write_bytes(("text;folder;office\n" + "\n".join(ROWS).replace("pay", "zahlen für") + "\n").encode("cp1252"))
    result = fedms("mine.toml", "--data", "excel.csv", "--label", "folder", "--yes")
    assert result.exit_code == 0, result.output
    data = load_config(tmp_path / "mine.toml").data
    assert (data.delimiter, data.encoding, data.client) == (";", "cp1252", "office")
    assert 'guessed: data.delimiter = ";"; another one is given by --delimiter' in result.stderr
    assert 'guessed: data.encoding = "cp1252"' in result.stderr and "found: 40 samples; 2 labels" in result.stderr
    told = fedms("other.toml", "--data", "excel.csv", "--label", "folder", "--yes", "--encoding", "latin-1", "--delimiter", ";")
    assert told.exit_code == 0 and "data.delimiter" not in told.stderr and "data.encoding" not in told.stderr
    assert load_config(tmp_path / "other.toml").data.encoding == "latin-1"


def test_columns_are_guessed_by_what_they_hold_and_rows_with_gaps_are_left_out(tmp_path):
    rows = [f"{i};please answer this message, number {i};{'' if i % 8 == 0 else 'AB'[i % 2]};{'NS'[i % 4 // 2]}" for i in range(40)]
    (tmp_path / "desk.csv").write_text("Nr;Nachricht;Kategorie;Filiale\n" + "\n".join(rows) + "\n;;;\n")
    refused = fedms("--data", "desk.csv", "--yes")
    assert refused.exit_code == errors.USAGE and "Kategorie (2 values), Filiale (2 values)" in refused.stderr
    result = fedms("--data", "desk.csv", "--label", "Kategorie", "--client", "Filiale", "--yes")
    assert result.exit_code == 0, result.output
    assert 'guessed: data.text = "Nachricht"; another one is given by --text' in result.stderr
    assert "desk.csv: 6 of 41 rows left out, as a cell that is needed is empty (the first: desk.csv, line 2)" in result.stderr
    assert load_config(tmp_path / "my-run.toml").data.empty == "drop"
