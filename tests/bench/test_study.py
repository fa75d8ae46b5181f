"""The study: which runs, what is recorded, and that its page never mixes what differs."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.study import costs, diagram, findings
from bench.study import page as pages
from bench.study import plan as plans
from bench.study import records as studies
from fedms.config import load_config, registry
from fedms.errors import ConfigError, RunFolderError

TINY = ("data.max_samples=200", "clients.count=3", "stage1.rounds=1", "stage2.rounds=1", "run.threads=1")
SETTING = plans.Setting("digits", "Digits", "digits", TINY)


def planned(*runs):
    found = []
    for method, seed in runs:
        sets = (*TINY, f"run.method={method}", f"run.seed={seed}")
        found.append(plans.StudyRun(SETTING, method, load_config("digits", sets), sets))
    return found


def line(run, mean, fingerprint="f"):
    accuracies = [{"personalized": mean + 0.01 * i, "global": mean - 0.1, "local": mean - 0.2} for i in range(3)]
    clients = [{"id": i, "unseen": False, "n_train": 10, "n_test": 5, "accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    return {"setting": run.setting.name, "id": run.id, "method": run.config.run.method, "seed": run.config.run.seed,
            "config": run.config.model_dump(mode="json", exclude_none=True), "command": run.command,
            "model_fingerprint": fingerprint, "commit": "abc1234", "torch": "2.13.0", "cpu": "a CPU", "clients": clients, "seconds": 3.0,
            "personalized_accuracy": {"mean": mean, "std": 0.1, "worst10": mean - 0.1}}


RUNS = planned(("local", 0), ("fedavg", 0), ("fedavg_ft", 0), ("fedms", 0), ("fedms", 1))


def test_the_plan_covers_every_method_and_seed_once():
    runs = plans.plan()
    assert len({run.key for run in runs}) == len(runs)
    for setting in plans.SETTINGS:
        found = {(run.id, run.config.run.seed) for run in runs if run.setting == setting and run.id in registry.method_names()}
        assert found == {(method, seed) for method in registry.method_names() for seed in plans.SEEDS}
        blocks = {(run.id, run.config.sal.schedule) for run in runs if run.setting == setting and run.id in plans.WITH_ALL_BLOCKS}
        assert blocks == {(f"{method}-all-blocks", "all") for method in plans.FIRST}
    assert {run.id for run in runs} == {*registry.method_names(), *plans.WITH_ALL_BLOCKS, *plans.ABLATIONS}
    assert [run.id for run in runs[:6]] == list(plans.FIRST)


def test_nothing_of_the_laboratory_is_pinned_to_an_earlier_one():
    for run in plans.plan():
        if run.id in registry.method_names():
            assert run.config.clients.max_change == type(run.config.clients)().max_change and (
                run.config.plus == type(run.config.plus)())


def test_progressive_activation_stands_beside_all_blocks():
    all_blocks = plans.Ablation("local-all-blocks", "local, all blocks", "local", plans.ALL_BLOCKS)
    progressive, fixed = RUNS[0], replace(RUNS[0], id=all_blocks.id)
    lines = [{**line(progressive, 0.5), "flops": 1e12}, {**line(fixed, 0.6), "flops": 4e12}]
    page = pages.render([progressive, fixed], lines, "records.jsonl", "study")
    assert "| Digits | local | 50.0 | 60.0 | -10.0 (one seed) | 0.25 |" in page


def test_settings_are_chosen_by_name():
    runs = plans.plan()
    found = plans.within(runs, "fashion-0.5,sentiment-0.3")
    assert {run.setting.name for run in found} == {"fashion-0.5", "sentiment-0.3"}
    assert {run.id for run in found} == {run.id for run in runs} and plans.within(runs, "all") == runs
    with pytest.raises(ConfigError, match="--settings: got 'fashion'; accepted: fashion-0.1, sentiment-natural"):
        plans.within(runs, "fashion")


def test_the_small_study_has_equal_rates_paired_seeds_and_whole_seeds_first():
    runs = plans.plan("small")
    methods = (*plans.FIRST, *plans.RIVALS)
    seeds = [run.config.run.seed for run in runs]
    assert len({run.key for run in runs}) == len(runs) and seeds == sorted(seeds)
    for setting in plans.SMALL_SETTINGS:
        here = [run for run in runs if run.setting == setting]
        assert {(run.id, run.config.run.seed) for run in here} == {
            (id, seed) for id in (*methods, *setting.more) for seed in setting.seeds}
        learned = {run.config.plus.gate_on for run in here if run.id == plans.GATE}
        assert learned == ({"held_out"} if len(setting.seeds) == 5 else set())
        assert {run.config.lora.rank for run in here if run.id == "fed_sb"} <= {4 * here[0].config.lora.rank}
        assert len({(run.config.stage1, run.config.stage2.lr, run.config.stage2.batch, run.config.sal) for run in here}) == 1
    with pytest.raises(ConfigError, match="--size: got 'tiny'; accepted: small, full, quick"):
        plans.plan("tiny")


def test_the_first_part_of_the_page_says_what_the_intervals_of_seeds_say():
    runs = planned(*((method, seed) for method in ("fedavg_ft", "fedms", "fedms_plus") for seed in range(3)))
    means = {"fedavg_ft": (0.50, 0.60, 0.70), "fedms": (0.50, 0.62, 0.69), "fedms_plus": (0.70, 0.81, 0.89)}
    lines = [line(run, means[run.id][run.config.run.seed]) for run in runs]
    for each in lines:
        if each["id"] == "fedms":
            each["gate"] = {"mean": 0.9, "entropy": 0.25, "half_mix_accuracy": each["personalized_accuracy"]["mean"] - 0.01,
                            "oracle_accuracy": 0.8}
    [_, text, first, plus, second, fedms, _, worth] = findings.findings_part(list(zip(runs, lines)))
    assert "`fedms_plus`" in first and "| Digits | fedavg_ft, fedms | – | – |" in plus
    assert "`fedms`" in second and "| Digits | – | fedms_plus | fedavg_ft |" in fedms
    assert ("| setting | `fedms` over `fedavg_ft` | mixture of `fedms` over its better expert | gate of `fedms` over half and half |"
            in worth)
    # The seeds' differences are 0, 2 and -1: 0.33 +- 4.30 * 1.53 / sqrt(3).
    assert "| Digits | ~+0.3 ± 3.8 | +10.0 ± 0.0 | +1.0 ± 0.0 |" in worth
    assert "by the interval on two settings. It is ahead on: `fedms` 1 of 1, behind on 0." in text


def test_what_seeds_can_show_agrees_with_the_power_of_the_paired_t_test():
    """Tables of the t test (Cohen, 1988) give a standardized effect of 1.68 for five pairs and 1.00 for ten, at a power of 0.8."""
    for seeds, effect in ((5, 1.68), (10, 1.00)):
        half = findings.by_seed({(seed, 0): value for seed, value in enumerate([1.0, -1.0] * (seeds // 2) + [0.0] * (seeds % 2))}).half
        deviation = (2 * (seeds // 2) / (seeds - 1)) ** 0.5
        assert findings.detectable(seeds) * half / deviation == pytest.approx(effect, abs=0.01)


def test_rounds_within_a_cost_are_those_whose_sum_is():
    found = {"round_flops": [4.0, 4.0, 2.0], "round_bytes": [0, 0, 0], "validation": [0.1, 0.2, 0.3]}
    assert [costs.within_cost(found, "round_flops", budget) for budget in (3.9, 4.0, 9.9, 10.0)] == [None, (1, 0.1), (2, 0.2), (3, 0.3)]


def test_methods_stand_beside_each_other_at_the_operations_and_bytes_of_the_cheapest_of_a_seed():
    runs = planned(*((method, seed) for method in ("local", "fedavg_prior", "fedms") for seed in (0, 1)))
    spent = {("local", 0): (6e12, 0), ("local", 1): (6e12, 0), ("fedms", 0): (2e12, 5e6), ("fedms", 1): (4e12, 5e6),
             ("fedavg_prior", 0): (1e12, 1e6), ("fedavg_prior", 1): (1e12, 1e6)}
    lines = [{**line(run, 0.5), "validation": [0.2, 0.4, 0.6 + 0.1 * run.config.run.seed],
              **{key: [total / 3] * 3 for key, total in zip(("round_flops", "round_bytes"), spent[run.id, run.config.run.seed])}}
             for run in runs]
    [title, _, _, table] = costs.costs_part(list(zip(runs, lines)))
    assert title == "## Equal operations, equal bytes"
    # Local has spent what fedms spends on the whole run after one round in the first seed, after two in the second one.
    assert "| local | 50.0 | 65.0 | 6 | 0 | 1.5 | 30.0 | – | – |" in table
    assert "| fedms | 50.0 | 65.0 | 3 | 5 | 3.0 | 65.0 | 3.0 | 65.0 |" in table and "fedavg_prior" not in table
    assert costs.costs_part([(run, line(run, 0.5)) for run in runs]) == []


def test_methods_of_some_settings_are_not_ranked_and_neither_are_seeds_that_lack_one():
    elsewhere = plans.Setting("elsewhere", "Elsewhere", "digits", TINY)
    here = planned(*((method, seed) for method in ("local", "fedavg", "fedms", "feddpa") for seed in (0, 1)))
    there = [replace(run, setting=elsewhere) for run in planned(("local", 0), ("fedavg", 0), ("fedms", 0), ("local", 1), ("fedms", 1))]
    means = {"local": 0.5, "fedavg": 0.6, "fedms": 0.7, "feddpa": 0.9}
    here = [replace(run, setting=replace(SETTING, more=("feddpa",))) for run in here]
    ranks = findings.ranks_of([(run, line(run, means[run.id])) for run in (*here, *there)])
    assert ranks.mean == {"fedms": 1.0, "fedavg": 2.0, "local": 3.0}
    assert ranks.blocks == 3                # the second seed elsewhere lacks fedavg


def test_a_setting_whose_data_are_missing_is_left_out_and_says_which_command_makes_them(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from bench.study.__main__ import app
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.study.__main__.plan", lambda size, tuned: [replace(RUNS[0], setting=replace(
        SETTING, data=Path("nowhere"), first="make it"))])
    monkeypatch.setattr("bench.study.__main__.carry_out", lambda chosen, *args, **kinds: ran.append(list(chosen)))
    found = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert ran == [[]] and found.exit_code == 0
    assert "digits is left out: there is no folder nowhere; `make it` makes it" in " ".join(found.output.split())


def test_bars_of_the_diagram_join_methods_that_are_not_shown_to_differ():
    ranks = diagram.Ranks({"a": 1.0, "b": 1.5, "c": 2.2, "d": 4.0}, critical=1.0, p=0.01, blocks=9)
    assert diagram.cliques(ranks) == [(1.0, 1.5), (1.5, 2.2)]
    texts = [text.get_text() for text in diagram.ranks_figure(ranks).axes[0].texts]
    assert "critical difference 1.00" in texts and "a  1.0" in texts and "4.0  d" in texts


def test_constants_that_were_tuned_are_used_and_said(tmp_path):
    (tmp_path / "fashion").mkdir()
    (tmp_path / "fashion" / "ditto.toml").write_text("[ditto]\npull = 0.5\n[stage1]\nlr = 0.001\n")
    runs = plans.plan(tuned=tmp_path)
    tuned = [run for run in runs if run.tuned]
    assert {(run.id, run.setting.source) for run in tuned} == {("ditto", "fashion")}
    assert all(run.config.ditto.pull == 0.5 and run.config.stage1.lr == 0.001 for run in tuned)
    assert pages._constants(tuned + RUNS[:1]) == f"Constants chosen by `{plans.tuning(plans.FASHION)}`, but for local."
    assert pages._constants(RUNS).startswith("All methods have the run file's constants")


def test_what_is_recorded_is_not_run_again_and_one_removed_line_is(tmp_path):
    runs, records = planned(("fedms", 0), ("local", 0)), tmp_path / "study" / "records.jsonl"
    assert studies.carry_out(runs, records, tmp_path / "work", say=lambda text: None) == 0
    first = studies.read_records(records)
    assert [each["id"] for each in first] == ["fedms", "local"] and max(map(len, records.read_text().split("\n"))) < 6000
    for each in first:
        assert sum(each["round_flops"]) == each["flops"] and sum(each["round_bytes"]) == each["bytes_up"] + each["bytes_down"]
        assert len(each["round_depth"]) == len(each["validation"]) == 2
    said = []
    assert studies.carry_out(runs, records, tmp_path / "work", say=said.append) == 0 and len(said) == 1
    assert studies.read_records(records) == first

    records.write_text(json.dumps(first[1]) + "\n")
    studies.carry_out(runs, records, tmp_path / "elsewhere", say=said.append)
    def told(lines):
        return {each["id"]: {k: v for k, v in each.items() if k not in ("seconds", "peak_memory_bytes")} for each in lines}
    assert told(studies.read_records(records)) == told(first)
    assert studies.carry_out(planned(("fedavg", 0)), records, tmp_path / "work", stop=lambda: True, say=said.append) == 1


def test_the_page_says_what_was_run_and_what_was_not():
    lines = [line(run, mean) for run, mean in zip(RUNS, (0.5, 0.6, 0.7, 0.72, 0.8))]
    lines[3]["gate"] = {"mean": 0.9, "entropy": 0.25, "half_mix_accuracy": 0.7, "oracle_accuracy": 0.8, "collapsed": False}
    page = pages.render(RUNS, lines[:4], "records.jsonl", "study")
    assert page == pages.render(RUNS, lines[:4][::-1], "records.jsonl", "study")
    assert "4 of 5 runs are done" in page and "Not run yet: fedms (seed 1)." in page
    assert "The gate of `fedms` gives the local expert 90 % of the weight (entropy 0.25, at most 0.69)." in page
    assert "Half and half of the same experts would have 70.0 %" in page and "no gate can know, would have 80.0 %." in page
    assert "| fedavg | +12.0 (one seed) |" in page and "| fedavg_ft | +2.0 (one seed) |" in page and "| fedms | – |" in page
    assert "the gate is +2.0 (one seed) points ahead of it" in page
    assert "commit abc1234" in page and "+44.0 % relative" in page


def test_records_of_another_setting_or_model_are_left_out():
    lines = [line(run, 0.5) for run in RUNS]
    old = {**lines[0], "config": {**lines[0]["config"], "stage1": {**lines[0]["config"]["stage1"], "lr": 0.5}}}
    page = pages.render(RUNS, [old, *lines[1:4], {**lines[4], "model_fingerprint": "other"}], "records.jsonl", "study")
    assert "3 of 5 runs are done" in page
    assert "1 record of other settings is left out" in page
    assert "1 record with other weights of the pretrained model is left out" in page
    assert "Not run yet: local (seed 0)" in page


def test_a_key_younger_than_a_record_has_its_default_and_one_that_is_gone_outdates_it():
    known = line(RUNS[0], 0.5)
    assert studies.key_of(known) == RUNS[0].key
    del known["config"]["wire"]
    known["config"]["plus"] = {"key of another method": 1}
    assert studies.key_of(known) == RUNS[0].key
    known["config"]["gone"] = {"key": 1}
    assert studies.key_of(known) is None
    changed = replace(RUNS[0], config=load_config("digits", [*RUNS[0].sets, "stage1.lr=0.001"]))
    assert changed.key != RUNS[0].key


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "x"}'])
def test_a_damaged_line_is_named(tmp_path, text):
    (tmp_path / "records.jsonl").write_text(json.dumps(line(RUNS[0], 0.5)) + "\n" + text + "\n")
    with pytest.raises(RunFolderError, match="records.jsonl, line 2: not a record"):
        studies.read_records(tmp_path / "records.jsonl")


def test_each_setting_with_records_has_a_picture(tmp_path):
    records, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    made = []
    for _ in range(2):
        records.write_text("".join(json.dumps(line(run, 0.5)) + "\n" for run in RUNS[:3]))
        pages.write_page(page, RUNS, records)
        [picture] = (tmp_path / "page").iterdir()
        made.append(picture.read_bytes())
    assert f"](page/{picture.name})" in page.read_text() and picture.name == f"{SETTING.name}.svg"
    assert made[0] == made[1] and b"fedavg" in made[0]


def test_the_committed_records_are_of_the_runs_that_are_planned():
    """A default that changes would leave them out without a word but that of the page. Those of the earlier laboratory are of other
    runs, and none of them may be taken for one of these."""
    folder = Path(plans.__file__).parent
    planned = {run.key for size in plans.SIZES for run in plans.plan(size, folder / "tuned")}
    assert {studies.key_of(line) for line in studies.read_records(folder / "records.jsonl")} <= planned
    earlier = studies.read_records(folder / "earlier/records.jsonl")
    assert len(earlier) == 237 and not {studies.key_of(line) for line in earlier} & planned


def test_records_of_earlier_versions_have_labels_in_the_place_of_ids(tmp_path):
    for ablation in plans.ABLATIONS.values():
        old = {**line(RUNS[0], 0.5), "label": ablation.label}
        del old["id"]
        (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n")
        [read] = studies.read_records(tmp_path / "records.jsonl")
        assert read["id"] == ablation.id
