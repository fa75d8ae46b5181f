"""Which adapters in PEFT's format are plain LoRA on the original base weights."""
from __future__ import annotations

import json

import pytest

from fedms.errors import ConfigError
from fedms.models.peft_format import read_shape

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "init_lora_weights": True, "qalora_group_size": 16, "megatron_core": "m"}


def shape_of(tmp_path, **change):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **change}))
    return read_shape(tmp_path)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(tmp_path, start):
    assert shape_of(tmp_path, init_lora_weights=start).rank == 8


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new"])
def test_an_adapter_of_a_changed_base_is_refused(tmp_path, start):
    with pytest.raises(ConfigError, match=f"init_lora_weights is '{start}', which changes the base weights"):
        shape_of(tmp_path, init_lora_weights=start)


def test_a_setting_that_is_not_known_is_refused_where_it_is_set(tmp_path):
    assert shape_of(tmp_path, use_future=False, future_config=None).rank == 8
    with pytest.raises(ConfigError, match="'use_future' is not known here"):
        shape_of(tmp_path, use_future=True)


def test_every_setting_of_peft_is_known(tmp_path):
    peft = pytest.importorskip("peft")
    (tmp_path / "x").mkdir()
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q"]).save_pretrained(tmp_path)
    assert read_shape(tmp_path).rank == 8
