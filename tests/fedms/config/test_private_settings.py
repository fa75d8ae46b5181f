"""Settings of [privacy] that cannot be meant: each one's error names the key, and says what to write in its place."""
from __future__ import annotations

import os

import pytest

pytest.importorskip("dp_accounting", reason="pip install 'fedms[privacy]'")

from private_runs import configuration, new_key

from fedms.config import ConfigError, registry
from fedms.runs.run import run

CENTRAL, NOISE = "privacy.mode=central", "privacy.noise=1"
ON = [CENTRAL, NOISE]
SECURE = ["privacy.mode=secure"]


@pytest.mark.parametrize("sets, key, remedy", [
    ([CENTRAL, "privacy.epsilon=0"], "privacy.epsilon", "accepted: a number, above 0"),
    ([CENTRAL, "privacy.epsilon=inf"], "privacy.epsilon", "accepted: a number, above 0"),
    ([CENTRAL, "privacy.epsilon=nan"], "privacy.epsilon", "accepted: a number, above 0"),
    ([CENTRAL, "privacy.noise=0"], "privacy.noise", "accepted: a number, above 0"),
    ([CENTRAL], "privacy.epsilon", "unset, and so is privacy.noise.*exactly one of the two"),
    ([*ON, "privacy.epsilon=8"], "privacy.epsilon", "set, and so is privacy.noise.*exactly one of the two"),
    ([*ON, "privacy.delta=0"], "privacy.delta", "above 0, below 1"),
    ([*ON, "privacy.delta=1"], "privacy.delta", "above 0, below 1"),
    ([*ON, "privacy.clip=0"], "privacy.clip", "above 0"),
    ([*ON, "privacy.accountant=moments"], "privacy.accountant", '"pld", "rdp"'),
    (["privacy.epsilon=8"], "privacy.mode", 'unset, so privacy.epsilon would protect nobody; set it to "central"'),
    (["privacy.noise=1"], "privacy.mode", "unset, so privacy.noise would"),
    (["privacy.mode=on"], "privacy.mode", '"off", "central", "secure", "distributed"'),
    ([*ON, "privacy.sampling=poisson", "clients.min=2"], "clients.min", "leave it unset"),
    ([*SECURE, "privacy.sampling=poisson"], "privacy.sampling", 'set it to "fixed", or privacy.mode to "central"'),
    *[([*SECURE, f"privacy.{key}=8"], f"privacy.{key}", 'leave it unset, or set privacy.mode to "distributed"')
      for key in ("epsilon", "noise", "score_noise", "count_noise")],
    *[([*ON, f"aggregate.rule={rule}"], "aggregate.rule", 'set it to "freeze_a"')
      for rule in ("exact", "median", "trimmed_mean", "krum")],
    *[([*ON, f"run.method={method}"], "aggregate.rule", "adds products of single updates.*set it to")
      for method in ("fedex_lora", "flexlora")],
    *[([*ON, f"run.method={method}"], "privacy.count_noise", "set it .for example 10., or choose another method")
      for method in ("fedavg_prior", "fedms_plus")],
    ([*ON, "aggregate.weights=samples"], "aggregate.weights", 'set it to "uniform"'),
    ([*ON, "clients.max_change=3"], "clients.max_change", "leave it unset"),
    ([*ON, "sal.schedule=capability_queue"], "sal.schedule", "set privacy.score_noise .for example 10."),
    ([*ON, 'clients.budgets=[{share = 1.0, memory = "1GiB"}]'], "clients.budgets", "give max_depth instead"),
    ([*ON, "sal.visit_flops=1e9"], "sal.visit_flops", "give max_depth in clients.budgets instead"),
    ([*SECURE, "clients.count=2"], "clients.fraction", "at least 3.*raise it or clients.count"),
    ([*SECURE, "privacy.bits=30", "clients.count=100"], "privacy.bits", "accepted"),
    ([*ON, "clients.asynchronous=true"], "clients.asynchronous", "set it to false"),
])
def test_an_error_names_the_key_and_the_remedy(tmp_path, sets, key, remedy):
    with pytest.raises(ConfigError, match=f"{key}[:,].*{remedy}"):
        configuration(tmp_path / "privacy.key", *sets)


def test_privacy_may_be_switched_off_by_its_name(tmp_path):
    assert configuration(tmp_path / "privacy.key", "privacy.mode=off", "privacy.epsilon=8").privacy.mode == "off"


def test_the_methods_that_are_refused_by_their_rule_are_all_named_above():
    refused = {name for name, row in registry.methods().items() if row.aggregation not in (None, "mean", "freeze_a")}
    assert refused == {"fedex_lora", "flexlora"}
    assert {name for name, row in registry.methods().items() if row.sends_counts} == {"fedavg_prior", "fedms_plus"}


@pytest.mark.parametrize("spoil, words", [
    (lambda key: key.unlink(), "does not exist; create one by"), (lambda key: os.chmod(key, 0o644), "mode 0644.*chmod 600"),
    (lambda key: key.write_bytes(b"short"), "5 bytes")])
def test_a_run_does_not_begin_without_its_key(tmp_path, spoil, words):
    config = configuration(new_key(tmp_path), *ON)
    spoil(tmp_path / "privacy.key")
    with pytest.raises(ConfigError, match=f"privacy.key: .*{words}"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run/visits.jsonl").exists()
