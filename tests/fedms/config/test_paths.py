"""Paths of a run file: a run folder says where its files lie, whichever folder one works in."""
from __future__ import annotations

import pytest
import tiny_language_models as tiny

from fedms.config import ConfigError, dump_toml, load_config
from fedms.config.paths import with_absolute_paths, with_bare_names
from fedms.exports import export
from fedms.exports.manifest import MANIFEST
from fedms.exports.language_model import open_language_model
from fedms.models.generation import Sampling
from fedms.runs import run as runs
from fedms.storage.records import RunRecords
from fedms.storage.run_folder import RunFolder


def test_every_path_becomes_absolute_and_no_other_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "my-model").mkdir()
    (tmp_path / "minilm").mkdir()       # beside the built-in model of this name
    there = with_absolute_paths(load_config("sentiment", ["model.id=my-model", "data.name=org/set", "lora.start=~/adapter"]))
    assert (there.model.id, there.data.name) == (str(tmp_path / "my-model"), "org/set")
    assert there.lora.start == str(tmp_path / "home" / "adapter")
    assert there.privacy.key == "privacy.key"       # which a run without privacy does not read
    built_in = with_absolute_paths(load_config("sentiment", ["data.path=files"]))
    assert (built_in.model.id, built_in.data.name, built_in.data.path) == ("minilm", "sentiment", str(tmp_path / "files"))
    private = load_config("digits", ["privacy.mode=secure", "clients.count=4", "aggregate.weights=uniform", "aggregate.rule=mean"])
    assert with_absolute_paths(private).privacy.key == str(tmp_path / "privacy.key")
    given = with_bare_names(there)
    assert (given.model.id, given.data.name, given.lora.start) == ("my-model", "org/set", "adapter")


def test_a_run_goes_on_and_answers_from_another_folder(tmp_path, monkeypatch):
    tiny.write_federation(tmp_path / "home", ("a", "b"), 12, lambda who, i: f"{who} {i}")
    monkeypatch.chdir(tmp_path / "home")
    config = load_config("sentiment", ["model.id=model", "data.name=data.jsonl", *tiny.SETS])
    summary = runs.run(config, "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "home" / "out"
    assert "".join(open_language_model(out, None, "cpu").stream("number 3?", "id:0", Sampling(2))) is not None
    assert runs.run(load_config(out / "config.toml"), out, resume=True) == summary
    manifest = (export(out, tmp_path / "exported") / MANIFEST).read_text()
    assert str(tmp_path) not in manifest and '"name": "data.jsonl"' in manifest
    monkeypatch.chdir(tmp_path / "home")
    assert runs.run(config, "out", resume=True) == summary


def test_a_folder_of_an_older_version_goes_on_from_its_working_folder_alone(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mail.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path / "there")
    config = load_config("sentiment", ["data.name=mail.csv"])
    RunFolder.create("out", config).close()
    assert RunRecords.read("out").config["data"]["name"] == str(tmp_path / "there" / "mail.csv")
    (tmp_path / "there" / "out" / "config.toml").write_text(dump_toml(config))      # as older versions wrote it
    RunFolder.resume("out", config).close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("there")
    with pytest.raises(ConfigError, match="data.name: .* but the run in"):
        RunFolder.resume("there/out", load_config("sentiment", ["data.name=link/mail.csv"]))
    (tmp_path / "there" / "out" / "config.toml").write_text(dump_toml(with_absolute_paths(
        load_config("sentiment", ["data.name=there/mail.csv"]))))
    RunFolder.resume("there/out", load_config("sentiment", ["data.name=link/mail.csv"])).close()
