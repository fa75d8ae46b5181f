"""The examples, each run at small size from a folder of its own, with random models instead of the hub's."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--set", "stage1.rounds=1", "--set", "stage2.rounds=1", "--set", "run.threads=1"]

pytestmark = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")


@pytest.fixture(scope="module")
def saved_models():
    """Saves random models of many architectures (tests/helpers/saved_models.py)."""
    return __import__("saved_models")


@pytest.fixture
def folder(tmp_path) -> Path:
    for path in EXAMPLES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def call(folder: Path, *command: str) -> str:
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def fedms(folder: Path, *arguments: str) -> dict:
    """Runs a run file; returns the summary."""
    call(folder, sys.executable, "-m", "fedms", "run", *arguments, *SMALL, "--out", "out")
    return json.loads((folder / "out/summary.json").read_text())


def test_newsrooms(folder):
    summary = fedms(folder, "newsrooms.toml", "--set", "data.max_samples=400", "--set", "clients.count=4")
    assert summary["rounds"] == {"stage1": 1, "stage2": 1} and summary["personalized_accuracy"]["mean"] > 0.3


def test_solar_cells(folder, saved_models):
    pytest.importorskip("elpv_dataset", reason="pip install elpv-dataset")
    call(folder, sys.executable, "solar_cells.py", "images", "--cells", "240")
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        f"{kind}{plant}" for kind in ("mono", "poly") for plant in (1, 2, 3)]
    saved_models.save("vit", folder / "model")
    assert fedms(folder, "solar_cells.toml", "--set", "model.id=model")["personalized_accuracy"]["mean"] > 0.3


def test_clip(folder, saved_models):
    draw = np.random.default_rng(0)
    for client in range(4):
        for label, level in (("cat", 60), ("dog", 190)):
            place = folder / "photos" / f"home{client}" / label
            place.mkdir(parents=True)
            for i in range(12):
                pixels = draw.normal(level, 40, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    saved_models.save("clip", folder / "model")
    summary = fedms(folder, "clip.toml", "--set", "model.id=model")
    assert summary["zero_shot_accuracy"] is not None


def test_decoder(folder, saved_models):
    draw = random.Random(0)
    rows = [(draw.choice(["the film was good", "bad film", "very plain", "great"]), draw.randrange(4)) for _ in range(160)]
    (folder / "tickets.csv").write_text("text,label,team\n" + "".join(
        f"{text},{'praise' if 'g' in text else 'blame'},team{team}\n" for text, team in rows))
    saved_models.save("qwen", folder / "model")
    fedms(folder, "decoder.toml", "--set", "model.id=model")


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_peft_trainer(folder, options):
    said = call(folder, sys.executable, "peft_trainer.py", "--samples", "64", *options)
    assert ("LoRA layers accelerated" in said) == (not options) and "mean training loss" in said
