"""The diagnosis: each thing a run needs is named when it is missing, and nothing hides the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import pytest
from fedms import doctor
from fedms.config import load_config
from fedms.data import sentiment
from fedms.progress import Progress

from fedms_ext import backends


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checks() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.diagnose()}


def test_this_machine_can_run_the_smoke_case():
    found = checks()
    assert list(found) == ["python", "fedms", "packages", "cpu", "threads", "kernels", *(f"backend {name}" for name in backends.known()),
                           "gpu", "cache", "model minilm", "model vit-digits-pretrained", "model vit-fashion", "model vit-small",
                           "data sentiment", "data digits", "data fashion-mnist"]
    assert not [c for c in found.values() if c.state == "problem"]
    assert "torch" in found["packages"].text and "cores" in found["cpu"].text
    assert found["backend eager"].state == "ok"


def test_nothing_is_written(cache):
    found = checks()
    assert found["cache"].state == "ok" and "made when needed" in found["cache"].text
    assert not cache.exists() and os.listdir(cache.parent) == []


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDMS_CACHE", str(tmp_path / "file" / "cache"))
    found = checks()["cache"]
    assert found.state == "problem" and "FEDMS_CACHE" in found.text


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    version = importlib.metadata.version

    def without(name):
        if name == "jinja2":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    found = [c for c in doctor.diagnose() if c.name == "packages"]
    assert [(c.state, c.text) for c in found][0] == ("problem", "missing: jinja2; pip install 'fedms[train]'")


def test_a_damaged_data_set_is_a_problem(cache):
    folder = cache / sentiment.INNER_FOLDER
    folder.mkdir(parents=True)
    for stem, _ in sentiment.DOMAINS.values():
        (folder / (stem + sentiment.SUFFIX)).write_text("1\t0.5\thalf a corp")
    found = checks()["data sentiment"]
    assert found.state == "problem" and "damaged file" in found.text and str(folder) in found.text


def test_a_data_set_that_can_still_be_fetched_is_a_note(monkeypatch, cache):
    assert checks()["data sentiment"].state == "note"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find_spec(name, *a))
    found = checks()["data sentiment"]
    assert found.state == "problem" and "pip" in found.text and sentiment.ARCHIVE in found.text


def test_a_check_that_breaks_is_a_finding_and_hides_no_other(monkeypatch):
    def _cache():
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "_cache", _cache)
    found = checks()
    assert found["cache"] == doctor.Check("cache", "problem", "RuntimeError: boom")
    assert "data digits" in found


@pytest.mark.parametrize("frozen, servers", [("fp32", {"cpu", "pytorch"}), ("int8", {"cpu", "pytorch"})])
def test_who_serves_a_run(frozen, servers):
    config = load_config("digits", [f"model.frozen={frozen}", "run.threads=1"])
    counted = doctor.served(config, Progress())
    assert set(counted.backends()) == servers
    products = {product for server, product in counted.calls if server == "cpu"}
    trained = {(p.k, p.n) for p in products if p.name == "expert_linear_backward"}
    assert trained == {(64, 64), (64, 256), (256, 64)}      # the last block of the small ViT
    # Layers below it have no expert: PyTorch's in fp32, the int8 kernels otherwise.
    assert ((64, 64) in {(p.k, p.n) for server, p in counted.calls if server == "pytorch"}) == (frozen == "fp32")
