"""A run whose dropout masks have changed since it began says so when it goes on."""
from __future__ import annotations

import json

import pytest

from fedms.config import load_config
from fedms.errors import Interrupted
from fedms.runs.run import run
from fedms_ext.reference import MASK_VERSION

SETTINGS = ["data.max_samples=24", 'model.targets=["fc1"]', "clients.count=1", "clients.unseen=0", "data.partition=iid",
            "stage1.rounds=2", "stage2.rounds=0", "run.method=fedavg", "lora.rank=2", "sal.schedule=fixed", "sal.depth=1",
            "sal.max_depth=1", "run.threads=1", "run.device=cpu"]


@pytest.mark.parametrize("dropout, masks, told", [(0.5, None, True), (0.5, MASK_VERSION, False), (0.0, None, False)])
def test_a_run_that_goes_on_with_other_masks_says_so(tmp_path, dropout, masks, told):
    config, asked = load_config("digits", [*SETTINGS, f"lora.dropout={dropout}"]), iter([False, True])
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", stop=lambda: next(asked))
    data = tmp_path / "run" / "data.json"
    content = json.loads(data.read_text())
    assert content["masks"] == MASK_VERSION
    if masks is None:       # as an older version wrote it
        del content["masks"]
        data.write_text(json.dumps(content))
    found = [note for note in run(config, tmp_path / "run", resume=True)["notes"] if "dropout masks" in note]
    assert found == [f"the run began with dropout masks of version 1 and went on with version {MASK_VERSION}: the same seeds drop "
                     "other values, so a run from its beginning gives other results"] * told
