"""The key of constants on disk: it differs where a bit of a constant may differ, and is the same for runs that share them."""
from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import fedms_ext
from fedms import data, models, tasks, training
from fedms.config import load_config
from fedms.runs import run
from fedms.storage.records import RunRecords
from fedms.training import cache_key
from fedms.training.cache_key import code, origin
from fedms.training.expert_model import ExpertModel

SETS = ["data.max_samples=40", 'model.targets=["fc1"]', "clients.count=1", "clients.unseen=0", "run.threads=1"]


def resident(*sets: str) -> ExpertModel:
    config = load_config("digits", [*SETS, *sets])
    foundation = models.load(config.model)
    return ExpertModel(foundation, data.load(config.data, foundation), config)


@pytest.fixture
def fresh_code():
    """Let `code` be computed again."""
    code.cache_clear()
    yield code.cache_clear
    code.cache_clear()


@pytest.mark.parametrize("package", [data, models, tasks, training, fedms_ext], ids=lambda package: package.__name__)
def test_the_code_of_every_room_that_computes_is_in_it(package, tmp_path, monkeypatch, fresh_code):
    before = code()
    copy = tmp_path / "copy"
    shutil.copytree(package.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    monkeypatch.setattr(package, "__path__", [str(copy)])
    fresh_code()
    assert code() == before
    file = sorted(copy.rglob("*.py"))[-1]
    file.write_text(file.read_text() + "\nx = 2\n")
    fresh_code()
    assert code() != before
    shutil.copytree(Path(file).parent, copy / "another")
    fresh_code()
    assert code() != before


def test_the_compiled_kernels_are_in_it_and_their_declarations_are_not(tmp_path, monkeypatch, fresh_code):
    before, kernels = code(), tmp_path / Path(fedms_ext._C.__file__).name
    (tmp_path / "_C.pyi").write_text("x: int")
    for content, same in ((Path(fedms_ext._C.__file__).read_bytes(), True), (b"others", False)):
        kernels.write_bytes(content)
        monkeypatch.setattr(fedms_ext._C, "__file__", str(kernels))
        fresh_code()
        assert (code() == before) is same


@pytest.mark.parametrize("library", ["torch", "transformers", "numpy"])
def test_versions_of_libraries_are_in_it(library, monkeypatch, fresh_code):
    before, version = code(), cache_key.metadata.version
    monkeypatch.setattr(cache_key.metadata, "version", lambda name: "0.1" if name == library else version(name))
    fresh_code()
    assert code() != before


def test_the_hash_takes_no_seconds(fresh_code):
    model, started = resident(), time.process_time()
    origin(model)
    assert time.process_time() - started < 1


def test_settings_that_change_a_constant_are_in_it_and_those_that_runs_share_are_not():
    plain = origin(resident())
    same = [[], ["run.method=fedavg"], ["lora.rank=2"], ["run.seed=3"], ["stage1.lr=0.5"], ["sal.cache_bytes=1000000"]]
    assert {origin(resident(*sets)) for sets in same} == {plain}
    other = [["model.temperature=0.2"], ['model.targets=["fc2"]'], ["model.frozen=int8"], ["run.dtype=bf16"],
             ["run.threads=2"], ["sal.cache_dtype=bf16"], ["data.max_samples=41"],
             ["model.frozen=int8", 'model.full_precision=["v_proj"]']]
    assert len({plain, *(origin(resident(*sets)) for sets in other)}) == 1 + len(other)


def test_settings_of_the_model_that_are_no_weights_are_in_it():
    model, found = resident(), set()
    for _ in range(2):
        found.add(origin(model))
        model.foundation.module.config.layer_norm_eps *= 2
    model.foundation.module.get_submodule("layers.0").register_module("more", torch.nn.Dropout(0.5))
    found.add(origin(model))
    model.foundation.module.get_submodule("layers.0.more").p = 0.25
    found.add(origin(model))
    with fedms_ext.use_backend("eager"):
        found.add(origin(model))
    assert len(found) == 5


def test_code_of_a_model_that_is_not_ours_is_in_it(tmp_path, monkeypatch):
    model, found = resident(), set()
    file = tmp_path / "someones_layers.py"
    file.write_text("import torch\n\nclass Layer(torch.nn.Identity):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "someones_layers", raising=False)
    import someones_layers

    found.add(origin(model))
    model.foundation.module.add_module("more", someones_layers.Layer())
    found.add(origin(model))
    assert origin(model) in found
    file.write_text(file.read_text() + "\nx = 2\n")
    found.add(origin(model))
    file.unlink()
    found.add(origin(model))
    assert len(found) == 4


def test_a_run_takes_no_features_that_another_pooling_has_left(tmp_path, monkeypatch):
    models.load(load_config("digits").model).save(tmp_path / "model")

    def numbers(cache: str, pooling: str) -> object:
        sets = [*SETS, "run.method=fedms", "stage1.rounds=0", "stage2.rounds=1", "sal.max_depth=1", f"sal.cache={cache}",
                f"model.id={tmp_path / 'model'}", f"model.pooling={pooling}"]
        run.run(load_config("digits", sets), tmp_path / "run", overwrite=True)
        found = RunRecords.read(tmp_path / "run")
        return [[visit[name] for name in ("round", "loss", "validation_loss")] for visit in found.visits]

    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    for pooling in ("mean", "cls"):
        assert numbers("disk", pooling) == numbers("memory", pooling)
