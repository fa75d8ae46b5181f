"""The run file: what is accepted, and how each mistake is explained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fedms.config import (
    FORMAT, ConfigError, builtin_names, config_from_dict, dump, dump_toml, load_config,
    parse_size, reference, registry, source_name, upgraded,
)
from fedms.config.catalogue import PlusTable
from fedms.config.run_config import config_class
from fedms.foreign import parse_toml
from hypothesis import given, settings
from hypothesis import strategies as st


def problems(*overrides: str, source: str | Path = "digits") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return caught.value.problems


def problem(*overrides: str, source: str | Path = "digits") -> str:
    found = problems(*overrides, source=source)
    assert len(found) == 1, found
    return found[0]


# Built-in files, dumping and loading

def test_the_built_in_run_files_load_and_differ_from_the_defaults():
    assert builtin_names() == ("dictionaries", "digits", "fashion", "sentiment")
    assert load_config("sentiment").data.max_samples == 4000
    assert load_config("digits").model.id == "vit-digits"


@pytest.mark.parametrize("name", builtin_names())
@pytest.mark.parametrize("overrides", [
    (), ("sal.depth=1", "sal.max_depth=2", "sal.order=[3, 1, 2]", "model.targets=['query', 'value']", "data.path=a \"b\"/ü.npz"),
    ("clients.budgets=[{share=0.25, max_depth=1}, {share=0.75, max_depth=3}]", "data.max_samples=none"),
    ("clients.budgets=[{share=1, memory='512MiB', flops=5e9, bandwidth_up='1MB', bandwidth_down=2}]",
     "clients.spread=0.3", "stage1.micro_batch=4"),
])
def test_a_dumped_configuration_loads_as_itself(name, overrides, tmp_path):
    config = load_config(name, overrides)
    path = tmp_path / "my.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(str(path)) == config
    assert source_name(path) == "my"


def test_an_empty_run_file_means_the_defaults(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert load_config(path) == config_from_dict({})


def test_a_configuration_is_immutable_and_hashable():
    config = load_config("digits", ["sal.order=[2, 1]", "clients.budgets=[{share=1, max_depth=1}]"])
    with pytest.raises(Exception, match="frozen"):
        config.run.seed = 3
    assert hash(config) == hash(load_config("digits", ["sal.order=[2, 1]", "clients.budgets=[{share=1, max_depth=1}]"]))


def test_the_reference_names_every_key_with_default_and_meaning():
    text = reference()
    for table, field in config_class().model_fields.items():
        for key, about in field.annotation.model_fields.items():
            row = next(line for line in text.splitlines() if line.startswith(f"| `{table}.{key}` |"))
            assert row.endswith(f"| {about.description} |") and about.description


def test_the_methods_are_those_that_exist():
    from fedms import methods

    for name in registry.methods():
        assert methods.create(load_config("digits", [f"run.method={name}"])).name == name


# Overrides

@pytest.mark.parametrize("override, table, key, value", [
    ("stage1.lr=0.5", "stage1", "lr", 0.5),
    ("stage1.lr=1", "stage1", "lr", 1.0),
    (" stage1.lr = 1e-3 ", "stage1", "lr", 1e-3),
    ("lora.rslora=true", "lora", "rslora", True),
    ("data.partition=iid", "data", "partition", "iid"),
    ('data.partition="iid"', "data", "partition", "iid"),
    ("data.split=[0.5, 0.25, 0.25]", "data", "split", (0.5, 0.25, 0.25)),
    ("data.path=a=b", "data", "path", "a=b"),
    ("data.max_samples=none", "data", "max_samples", None),
    ("sal.cache_bytes=1.5GB", "sal", "cache_bytes", 1_500_000_000),
    ("sal.order=bottom_up", "sal", "order", "bottom_up"),
])
def test_an_override_is_toml_or_else_text(override, table, key, value):
    got = getattr(getattr(load_config("digits", [override]), table), key)
    assert got == value and type(got) is type(value)


def test_the_last_override_wins():
    assert load_config("digits", ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("override", ["lr=1", "stage1.lr", "stage1.=1", ".lr=1", "a.b.c=1", "", "="])
def test_a_malformed_override_is_shown_with_what_is_expected(override):
    assert problem(override).startswith(f"--set {override}: expected table.key=value")


def test_a_key_without_its_table_is_completed():
    assert problem("rank=4") == "--set rank=4: expected table.key=value; did you mean lora.rank?"
    assert problem("lr=4").endswith("did you mean stage1.lr or stage2.lr or gate.lr or apfl.lr?")


# Every value has bounds or a type: each violation names the key, the value and what is accepted

@pytest.mark.parametrize("override, expected", [
    ("lora.rank=0", "lora.rank: got 0; accepted: an integer, at least 1, at most 1024"),
    ("lora.rank=8.0", "lora.rank: got 8.0; accepted: an integer, at least 1, at most 1024"),
    ('lora.rank="8"', 'lora.rank: got "8"; accepted: an integer, at least 1, at most 1024'),
    ("lora.rank=none", "lora.rank: got none; accepted: an integer, at least 1, at most 1024"),
    ("lora.rank=true", "lora.rank: got true; accepted: an integer, at least 1, at most 1024"),
    ("lora.rslora=1", "lora.rslora: got 1; accepted: true or false"),
    ("stage1.lr=0", "stage1.lr: got 0; accepted: a number, above 0"),
    ("stage1.lr=nan", "stage1.lr: got nan; accepted: a number, above 0"),
    ("stage1.lr=inf", "stage1.lr: got inf; accepted: a number, above 0"),
    ("stage1.lr=fast", 'stage1.lr: got "fast"; accepted: a number, above 0'),
    ("lora.dropout=1", "lora.dropout: got 1; accepted: a number, at least 0, below 1"),
    ("run.seed=-1", "run.seed: got -1; accepted: an integer, at least 0, at most 4294967295"),
    (f"stage1.batch={2**63}", f"stage1.batch: got {2**63}; accepted: an integer, at least 1; in any case of at most 64 bits"),
    ("data.max_samples=0", "data.max_samples: got 0; accepted: an integer, at least 1; or unset"),
    ("data.split=[0.5, 0.5]", "data.split: got [0.5, 0.5]; accepted: a list of 3 numbers"),
    ('data.split=[0.5, 0.3, "x"]', 'data.split: got [0.5, 0.3, "x"]; accepted: a list of 3 numbers'),
    ("sal.cache_bytes=much", 'sal.cache_bytes: got "much"; accepted: a size such as "2GiB" or "500MB", or a number of '
                             "bytes"),
    ("sal.cache_bytes=-1", 'sal.cache_bytes: got -1; accepted: a size such as "2GiB" or "500MB", or a number of bytes'),
    ("run.method=fedavgft", 'run.method: got "fedavgft"; accepted: "local", "fedavg", "fedavg_prior", "fedavg_ft", '
                            '"fedprox", "fedper", "fedrep", "ditto", "apfl", "ffa_lora", "fedsa_lora", "fedex_lora", '
                            '"flexlora", "fed_sb", "feddpa", "fedms", "fedms_plus"; did you mean fedavg_ft?'),
    ("data.partition=dirichle", 'data.partition: got "dirichle"; accepted: "natural", "own", "dirichlet", "domains", "classes", '
                                '"quantity", "iid"; did you mean '
                                "dirichlet?"),
    ("sal.order=topdown", 'sal.order: got "topdown"; accepted: "top_down", "bottom_up", "interleaved"; or a list of '
                          "integers, at least 1; did you mean top_down?"),
    ("sal.order=[0, 1]", 'sal.order: got [0, 1]; accepted: "top_down", "bottom_up", "interleaved"; or a list of '
                         "integers, at least 1"),
    ("sal.order=[]", 'sal.order: got []; accepted: "top_down", "bottom_up", "interleaved"; or a list of integers, at '
                     "least 1"),
    ("model.targets=[]", 'model.targets: got []; accepted: "all-linear"; or a list of strings'),
    ("clients.budgets=3", "clients.budgets: got 3; accepted: a list of tables with keys share, max_depth, memory, "
                          "rank, flops, bandwidth_up, bandwidth_down; share is required"),
    ("clients.budgets=[{share=2, max_depth=1}]", "clients.budgets[0].share: got 2; accepted: a number, above 0, at "
                                                 "most 1"),
    ("clients.budgets=[{max_depth=1}]", "clients.budgets[0].share: missing; accepted: a number, above 0, at most 1"),
    ("clients.budgets=[{share=1, max_depth=0}]", "clients.budgets[0].max_depth: got 0; accepted: an integer, at least "
                                                 "1; or unset"),
    ("clients.budgets=[{share=1, memory='x'}]", 'clients.budgets[0].memory: got "x"; accepted: a size such as "2GiB" '
                                                'or "500MB", or a number of bytes; or unset'),
    ("clients.budgets=[{share=1, bandwidth_up=0}]", 'clients.budgets[0].bandwidth_up: got 0; accepted: a size such as '
                                                    '"2GiB" or "500MB", or a number of bytes; or unset'),
    ("clients.budgets=[{share=1, flops=0}]", "clients.budgets[0].flops: got 0; accepted: a number, above 0; or unset"),
    ("clients.budgets=[{share=1, max_depth=1, x=2}]", "clients.budgets[0].x: unknown key; accepted: share, max_depth, "
                                                      "memory, rank, flops, bandwidth_up, bandwidth_down"),
])
def test_a_bad_value_names_key_value_and_what_is_accepted(override, expected):
    assert problem(override) == expected


@pytest.mark.parametrize("override, expected", [
    ("lora.rnak=4", "lora.rnak: unknown key; did you mean lora.rank?"),
    ("lora.epochs=4", "lora.epochs: unknown key; did you mean stage1.epochs or stage2.epochs?"),
    ("lora.zzz=4", "lora.zzz: unknown key; keys of [lora]: rank, alpha, dropout, rslora, start"),
    ("stgae1.lr=4", "stgae1: unknown key; did you mean [stage1]?"),
    ("zzz.lr=4", "zzz: unknown key; tables: task, model, head, data, lora, sal, stage1, stage2, gate, clients, aggregate, "
                 "wire, privacy, run, fedavg_prior, fedprox, fedrep, ditto, apfl, feddpa, plus"),
])
def test_an_unknown_key_names_the_nearest(override, expected):
    assert problem(override) == expected


def test_a_value_where_a_table_belongs(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("lora = 3\n")
    assert problem(source=path) == "lora: got 3; accepted: a table [lora] with keys rank, alpha, dropout, rslora, start"
    assert problem("lora.rank=2", source=path).startswith("lora: got 3; accepted: a table [lora]")


def test_all_mistakes_are_reported_at_once():
    found = problems("lora.rank=0", "run.method=none", "stage1.rond=2", "sal.tau=x")
    assert sorted(p.split(":")[0] for p in found) == ["lora.rank", "run.method", "sal.tau", "stage1.rond"]


@pytest.mark.parametrize("overrides, start, words", [
    (("data.name=sentiment",), "data.name:", ['"vit-digits"', '"digits"']),
    (("model.head=text",), "model.head:", ['"linear"', '"vit-digits"']),
    (("model.learn_temperature=true",), "model.learn_temperature:", ["model.head"]),
    (("data.partition=natural",), "data.partition:", ['"dirichlet", "classes", "quantity", "iid"']),
    (("data.split=[0.5, 0.5, 0.5]",), "data.split:", ["sums to 1.5", "sum to 1"]),
    (("data.split=[1.2, -0.2, 0.0]",), "data.split:", ["above 0"]),
    (("sal.queue=3",), "sal.queue:", ["got 3", "even"]),
    (("sal.depth=3", "sal.max_depth=2"), "sal.depth:", ["got 3", "sal.max_depth = 2"]),
    (("sal.order=[1, 2, 1]",), "sal.order:", ["[1, 2, 1]", "twice"]),
    (("stage1.rounds=0", "stage2.rounds=0"), "stage1.rounds:", ["nothing to train"]),
    (("gate.mixing=layers",), "gate.features:", ['"final"', '"prefix"']),
    (("clients.min=9",), "clients.min:", ["got 9", "clients.count = 6"]),
    (("clients.budgets=[{share=0.5, max_depth=1}]",), "clients.budgets:", ["sum to 0.5", "sum to 1"]),
    (("clients.spread=0.5", "clients.budgets=[{share=1, max_depth=1}]"), "clients.spread:", ["flops or a bandwidth"]),
    (("stage2.micro_batch=64",), "stage2.micro_batch:", ["got 64", "stage2.batch = 32"]),
])
def test_keys_that_do_not_fit_together(overrides, start, words):
    found = problem(*overrides)
    assert found.startswith(start)
    for word in words:
        assert word in found


def test_all_cross_field_mistakes_are_reported_at_once():
    assert len(problems("sal.queue=3", "clients.min=9", "gate.mixing=layers")) == 3


# Files

def test_an_unknown_built_in_name_lists_them():
    assert problem(source="sentimental").endswith("built in: dictionaries, digits, fashion, sentiment; did you mean sentiment?")


def test_files_that_cannot_be_used(tmp_path):
    assert "no such file" in problem(source=tmp_path / "missing.toml")
    assert "is a folder" in problem(source=tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("[lora]\nrank = = 3\n")
    assert "not valid TOML" in problem(source=bad) and "line 2" in problem(source=bad)
    bad.write_bytes(b"[lora]\nrank = 3 # \xff\n")
    assert "not UTF-8" in problem(source=bad)


def test_a_file_of_the_name_of_a_built_in_one_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text(dump_toml(load_config("digits", ["run.seed=77"])))
    assert load_config("digits").run.seed == 77


# Sizes

@pytest.mark.parametrize("text, size", [
    (1536, 1536), ("1536", 1536), ("512MiB", 512 * 2**20), ("2 GiB", 2**31), ("1.5GB", 1_500_000_000), ("1k", 1000),
    ("1KiB", 1024), ("1tb", 10**12), ("0", 0),
])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1.5.2GB", "1 XB", "1iB", -1, 1.5, True, None])
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        parse_size(text)


words = st.sampled_from(["", "x", "é", "a.b", "fedms", "1", "none", 'quo"te', "two\nlines"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([0.5, math.nan, -math.inf]), words)
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(words, scalars, max_size=2))
tables = st.sampled_from([*config_class().model_fields, "budgets", "x"])
keys = st.sampled_from(sorted({k for f in config_class().model_fields.values() for k in f.annotation.model_fields} | {"y"}))


@settings(deadline=None)
@given(st.dictionaries(tables, st.one_of(values, st.dictionaries(keys, values, max_size=4)), max_size=4))
def test_any_mistake_is_explained(tree):
    try:
        config = config_from_dict(tree)
    except ConfigError as error:
        assert error.problems and all(": " in line for line in error.problems)
    else:
        assert config_from_dict(config.model_dump()) == config


def test_a_wrong_item_of_a_list_is_shown_with_its_list():
    with pytest.raises(ConfigError, match=r'model\.targets: got \["a", 3\]'):
        config_from_dict({"model": {"targets": ["a", 3]}})


# Older versions

OLD = Path(__file__).parents[2] / "helpers/config_format_1.toml"      # as the first version wrote it for `fedms run digits`


def test_what_an_older_version_wrote_is_read_with_todays_keys():
    old = parse_toml(OLD.read_text())
    assert "format" not in old and old["gate"]["held_out"] == 0.2 and old["aggregate"]["rule"] == "mean"
    assert config_from_dict(upgraded(old)) == load_config("digits", ["run.method=fedms"])
    assert old["gate"]["held_out"] == 0.2, "what was given is left alone"
    old["run"]["method"] = "fedms_plus"       # then: the gate on held-out samples, and no class priors
    first = PlusTable(prior="off", prior_in_stage1=False, confidences=False, gate_on="held_out")
    assert config_from_dict(upgraded(old)).plus == first
    for held_out, plus in ((0.3, PlusTable(gate_on="held_out", held_out=0.3)), (0.0, PlusTable(gate_on="training"))):
        later = {"run": {"method": "fedms_plus"}, "plus": {"held_out": held_out}}     # before there was gate_on
        assert config_from_dict(upgraded(later)).plus == plus


def test_what_is_written_names_its_format(tmp_path):
    config = load_config("digits", ["aggregate.rule=mean", "model.temperature=0.05"])
    assert dump(config)["format"] == FORMAT and config_from_dict(upgraded(dump(config))) == config
    (tmp_path / "new.toml").write_text(dump_toml(config))
    assert load_config(tmp_path / "new.toml") == config


@pytest.mark.parametrize("found", [FORMAT + 1, 0, "2", True])
def test_a_format_that_is_not_known_is_refused(found, tmp_path):
    with pytest.raises(ConfigError, match="format: got .*; accepted: 1 to 2. A newer version"):
        upgraded({"format": found})


def test_people_are_told_of_a_key_that_moved(tmp_path):
    (tmp_path / "mine.toml").write_text("[gate]\nheld_out = 0.1\n")
    with pytest.raises(ConfigError, match="gate.held_out: unknown key; did you mean plus.held_out"):
        load_config(tmp_path / "mine.toml")


def test_an_override_of_a_text_may_look_like_a_number():
    for text in ("2020", "2020-01-01", "true", "1.50"):
        assert load_config("digits", ["data.name=mine.csv", f"data.label={text}"]).data.label == text
    assert load_config("digits", ["data.name=mine.csv", "data.classes=[2019, 2020]"]).data.classes == ("2019", "2020")
    with pytest.raises(ConfigError, match="stage1.rounds"):
        load_config("digits", ["stage1.rounds=many"])


@pytest.mark.parametrize("key, value, accepted", [("delimiter", ";;", "one character"), ("delimiter", "\n", "one character"),
                                                  ("encoding", "utf-9", "a text encoding"), ("encoding", "base64", "a text encoding")])
def test_how_a_table_is_written_is_checked(key, value, accepted):
    with pytest.raises(ConfigError, match=accepted):
        config_from_dict({"data": {"name": "mine.csv", key: value}})
