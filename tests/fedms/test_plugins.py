"""Methods, data sets and models of other packages: registered by one call each, known to all processes of a run."""
from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fedms.config import ConfigError, Table, load_config, register_data, register_method, register_model, registry
from fedms.config.reference import json_schema

ROOT = Path(__file__).parents[2]

ROWS = """
from pydantic import Field

from fedms import Constant, Table, register_data, register_method, register_model


class Halving(Table):
    share: float = Field(0.5, gt=0, le=1, description="what is sent of a change")


register_method("halving", "strangers.parts:Halving", "federated averaging of a part of each change", settings=Halving,
                tuned=(Constant("halving.share", 0.1, 1.0, log=False),), color="#123456")
register_data("stripes", "strangers.parts:stripes", "pictures of stripes", holds="images")
register_model("pixels", "strangers.parts:pixels", "two linear blocks", reads="images")
"""

PARTS = """
from dataclasses import replace

import torch
from torch import nn

from fedms import ModuleModel, make_dataset
from fedms.data import ImageInputs
from fedms.methods.fedavg import FedAvg


class Halving(FedAvg):
    def client_step(self, model, client, private, message):
        reply, after = super().client_step(model, client, private, message)
        sent = message.tensors
        return replace(reply, tensors={n: sent[n] + self.settings.share * (t - sent[n]) for n, t in reply.tensors.items()}), after


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def pixels(table):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Pixels()
    return ModuleModel(module, blocks="blocks", features=lambda module, inputs: module(inputs["pixel_values"].mean(1)).flatten(1),
                       prepare=lambda images: torch.zeros(len(images), 1, 8, 8), name=table.id)


def stripes(table, model, seed):
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.arange(240) % 2
    images = 0.3 * torch.rand(240, 1, 8, 8, generator=drawn)
    images[labels == 0, :, ::2] += 0.7
    images[labels == 1, :, :, ::2] += 0.7
    return make_dataset("stripes", ImageInputs(images, model.image_tokens, "stripes"), labels, ("across", "down"))
"""

RUN_FILE = """
[model]
id = "pixels"
[data]
name = "stripes"
partition = "dirichlet"
[clients]
count = 3
[stage1]
rounds = 2
lr = 0.01
[stage2]
rounds = 1
[run]
threads = 1
"""


@pytest.fixture
def installed(tmp_path):
    """A package as pip would install it, with an entry point, and the environment of a process that finds it."""
    site = tmp_path / "site"
    (site / "strangers").mkdir(parents=True)
    (site / "strangers/__init__.py").write_text("")
    (site / "strangers/rows.py").write_text(ROWS)
    (site / "strangers/parts.py").write_text(PARTS)
    (site / "strangers-1.0.dist-info").mkdir()
    (site / "strangers-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (site / "strangers-1.0.dist-info/entry_points.txt").write_text("[fedms.plugins]\nstrangers = strangers.rows\n")
    (tmp_path / "mine.toml").write_text(RUN_FILE)
    path = [str(site), str(ROOT), str(ROOT / "python")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "FEDMS_CACHE": str(tmp_path / "cache")}


def fedms(cwd, env, *words):
    done = subprocess.run([sys.executable, "-m", "fedms", *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_another_package_is_tuned_and_compared_in_two_processes(installed, tmp_path):
    names = ("--methods", "fedavg,halving")
    fedms(tmp_path, installed, "tune", "mine.toml", *names, "--trials", "2", "--out", "tuned")
    assert "[halving]" in (tmp_path / "tuned/halving.toml").read_text()
    said = fedms(tmp_path, installed, "compare", "mine.toml", *names, "--jobs", "2", "--tuned", "tuned", "--seeds", "1",
                 "--out", "compared")
    assert "halving" in said
    found = {}
    for method in ("fedavg", "halving"):
        summary = json.loads((tmp_path / f"compared/{method}-seed0/summary.json").read_text())
        assert (summary["model"], summary["dataset"]) == ("pixels", "stripes")
        found[method] = summary["personalized_accuracy"]["mean"]
    assert max(found.values()) > 0.9, found     # stripes are told apart by a linear layer
    assert "#123456" in (tmp_path / "compared/report.html").read_text()
    assert "data stripes" not in fedms(tmp_path, installed, "doctor"), "nothing is said of what has no status"


def test_the_example_is_short_and_runs(tmp_path):
    """As docs/guide/extend.md says, on fewer samples."""
    source = ROOT / "examples/fedalt.py"
    assert len(source.read_text().splitlines()) <= 60
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source.parent), str(ROOT), str(ROOT / "python")]),
           "FEDMS_PLUGINS": "fedalt"}
    sets = ("data.max_samples=300", "clients.count=3", "clients.unseen=1", "stage1.rounds=2", "stage2.rounds=1", "run.threads=1")
    fedms(tmp_path, env, "run", "digits", "--method", "fedalt", "--out", "run", *(w for s in sets for w in ("--set", s)))
    visits = [json.loads(line) for line in (tmp_path / "run/visits.jsonl").read_text().splitlines()]
    assert len(visits) == 9 and {visit["status"] for visit in visits} == {"ok"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["gate"] is not None


@pytest.fixture
def rows():
    """Rows that a test adds are gone after it."""
    catalogues = registry.METHODS, registry.DATA, registry.MODELS
    before = [dict(catalogue.rows) for catalogue in catalogues]
    yield
    for catalogue, kept in zip(catalogues, before):
        catalogue.rows.clear()
        catalogue.rows.update(kept)


class Own(Table):
    strength: float = 1.0


def test_a_registered_name_is_validated_explained_and_described(rows):
    register_method("own", "nowhere:Own", settings=Own)
    register_data("moons", "nowhere:moons", holds="images")
    register_model("tiny", "nowhere:tiny", reads="text")
    config = load_config("digits", ["run.method=own", "own.strength=2.0", "data.name=moons"])
    assert config.settings == Own(strength=2.0)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ConfigError, match='data.name: "moons" holds images, but model.id "tiny" reads text'):
        load_config("digits", ["data.name=moons", "model.id=tiny"])
    with pytest.raises(ConfigError, match="own.strenght: unknown key; did you mean own.strength"):
        load_config("digits", ["own.strenght=2.0"])
    with pytest.raises(ConfigError, match='"fedms_plus", "own"'):
        load_config("digits", ["run.method=none-such"])
    schema = json_schema()
    assert "own" in schema["properties"] and "own" in schema["$defs"]["RunTable"]["properties"]["method"]["enum"]
    with pytest.raises(ConfigError, match="nowhere:Own: cannot be imported: No module named 'nowhere'; expected module:name"):
        config.method_row.load()


def test_what_cannot_be_registered_is_said(rows):
    register_method("own", "nowhere:Own")
    register_method("own", "nowhere:Own")       # its module was imported twice
    with pytest.raises(ConfigError, match="own is registered already, as nowhere:Own; choose another name"):
        register_method("own", "elsewhere:Own")
    with pytest.raises(ConfigError, match="got the name 'my method'; accepted: letters"):
        register_method("my method", "nowhere:Own")
    with pytest.raises(ConfigError, match=r"has a table \[data\], which every run file has"):
        register_method("data", "nowhere:Own", settings=Own)


def test_a_plugin_that_cannot_be_imported_is_named(rows, monkeypatch):
    monkeypatch.setenv("FEDMS_PLUGINS", "no_such_plugin")
    said = "plugin no_such_plugin, named by the environment variable FEDMS_PLUGINS, cannot be imported: ModuleNotFound"
    with pytest.raises(ConfigError, match=said):
        registry.methods()


def test_a_command_says_where_a_plugin_was_looked_for():
    done = subprocess.run([sys.executable, "-m", "fedms", "--version"], capture_output=True, text=True,
                          env={**os.environ, "FEDMS_PLUGINS": "no_such_plugin"})
    assert done.returncode == 2 and done.stderr.startswith("fedms: plugin no_such_plugin")
    assert done.stderr.endswith("is its folder in PYTHONPATH?\n") and done.stdout == ""


def test_every_row_has_a_summary_and_an_own_color():
    rows = registry.methods().values()
    assert all(row.summary and row.trained and row.sent for row in rows)
    assert len({row.color for row in rows}) == len(rows)
