"""Out and in again: exports, predictions from them, and runs that start from an adapter. Every README is executed."""
from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import pytest
import saved_models
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fedms
from fedms import cli, data, models
from fedms.config import ConfigError, config_from_dict
from fedms.data import DataError
from fedms.exports import export
from fedms.exports.merged import merge_expert
from fedms.exports.predict import bind, predict
from fedms.exports.trained_run import read_task, read_trained_run
from fedms.models import peft_format
from fedms.models import ModelError
from fedms.runs import run
from fedms.errors import RunFolderError
from fedms.storage.records import RunRecords

TEXTS = ["the film was very good", "a plain photo", "bad dog", "the cat and the dog was not great"]


def photos(n, seed=9):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(n)]


def make_table(path):
    """Sentences of three clients; what is good for one is bad for another."""
    rng = np.random.default_rng(0)
    rows = []
    for client in ("anna", "berta", "carl"):
        for _ in range(30):
            words = rng.choice(saved_models.WORDS, rng.integers(3, 9)).tolist()
            rows.append({"text": " ".join(words), "label": "yes" if ("good" in words) != (client == "carl") else "no",
                         "who": client})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def run_of(ended, out, **tables):
    """Another run on the model and the table of the run "bert"."""
    before = read_task(ended("bert")).config
    run.run(settings(before.model.id, before.data.name, data={"client": "who"}, **tables), out)
    return read_out(out)


def make_photos(root):
    for client in ("x", "y"):
        for label, low in (("cat", 0), ("dog", 120)):
            for i, image in enumerate(photos(12, seed=low)):
                place = root / client / label / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((np.asarray(image) // 2 + low).astype(np.uint8)).save(place)
    return root


def settings(model_id, name, **tables):
    return config_from_dict({
        "model": {"id": str(model_id), **tables.get("model", {})},
        "data": {"name": str(name), "global_test": 0.0, **tables.get("data", {})},
        "lora": {"rank": 2, "alpha": 4.0, **tables.get("lora", {})},
        "sal": {"depth": 2, "schedule": "fixed", **tables.get("sal", {})},
        "stage1": {"rounds": 2, "lr": 0.02, **tables.get("stage1", {})}, "stage2": {"rounds": 1, "lr": 0.02, "keep": "last"},
        "aggregate": tables.get("aggregate", {}),
        "clients": {"count": tables.get("count", 3)}, "run": {"threads": 1, "method": "fedms", **tables.get("run", {})}})


RUNS = {
    "bert": {"data": {"client": "who"}},
    "llama": {"data": {"client": "who"}, "lora": {"rslora": True}, "run": {"method": "fedavg_ft"}},
    "clip": {"model": {"head": "text", "learn_temperature": True}, "count": 2},
    "siglip": {"model": {"targets": ["q_proj", "v_proj"]}, "count": 2},
    "vit": {"count": 2, "sal": {"order": "bottom_up"}, "run": {"method": "fedms_plus"}},
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folders of finished runs by kind of model, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("ended")
    table, images = make_table(root / "mine.csv"), make_photos(root / "photos")

    def get(kind):
        out = root / f"run-{kind}"
        if not out.is_dir():
            model = saved_models.save(kind, root / kind)
            run.run(settings(model, table if kind in saved_models.TEXT else images, **RUNS[kind]), out)
        return out

    yield get


def inputs_for(model):
    if model.reads == "text":
        return model.tokenize(TEXTS, 64)
    return data.user_data.inputs_of(photos(4), ["photo"] * 4, model, "", 64)


def read_out(folder):
    """The outcome of a run on its own model: (outcome, model)."""
    trained = read_trained_run(folder)
    return trained, bind(models.load(trained.task.config.model), trained.task)


def logits_of_readme(folder):
    """What somebody gets who follows README.md, without this package."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    assert "fedms" not in code
    names = {"texts": TEXTS, "images": photos(4)}
    before = os.getcwd()
    os.chdir(folder)
    try:
        with torch.no_grad():
            exec(code, names)
    finally:
        os.chdir(before)
    return names["logits"]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("kind", RUNS)
def test_peft_gives_the_same_logits(kind, ended, tmp_path):
    outcome, model = read_out(ended(kind))
    export(ended(kind), tmp_path / "out", "peft")
    clients = [f"client-{i}" for i in outcome.private]
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"global", *clients}
    inputs = inputs_for(model.foundation)
    seen = []
    for name in ("global", *clients):
        found = predict(model, outcome, None if name == "global" else int(name.split("-")[1]), inputs)
        want = found.global_ if name == "global" else found.local
        assert error(logits_of_readme(tmp_path / "out" / name), want) < 1e-5, name
        seen.append(want)
    assert all(error(a, seen[0]) > 1e-3 for a in seen[1:])      # the experts do differ


def test_aggregation_that_leaves_a_as_it_was_drawn(ended, tmp_path):
    outcome, model = run_of(ended, tmp_path / "run", aggregate={"rule": "freeze_a"})
    export(tmp_path / "run", tmp_path / "out", "peft")
    want = predict(model, outcome, None, inputs_for(model.foundation)).global_
    assert error(logits_of_readme(tmp_path / "out/global"), want) < 1e-5
    others = predict(model, outcome, None, model.foundation.tokenize(TEXTS[::-1], 64)).global_      # as many, on the same model
    assert error(others.flip(0), want) < 1e-5 < error(others, want)


def test_exact_aggregation_is_merged_and_is_no_adapter(ended, tmp_path):
    outcome, model = run_of(ended, tmp_path / "run", aggregate={"rule": "exact"})
    assert any(name.startswith("correction/") for name in outcome.final.constants)
    with pytest.raises(ConfigError, match="the run changed the frozen weights too.*accepted: merged, onnx, mixture"):
        export(tmp_path / "run", tmp_path / "peft", "peft")
    export(tmp_path / "run", tmp_path / "out", "merged")
    inputs = inputs_for(model.foundation)
    want = predict(model, outcome, None, inputs).global_
    assert error(logits_of_readme(tmp_path / "out"), want) < 1e-5
    mixture = fedms.load(export(tmp_path / "run", tmp_path / "mixture"), client="anna")
    found = predict(model, outcome, 0, inputs).personalized.softmax(1).max(1)
    assert mixture.predict(TEXTS).probability.tolist() == pytest.approx(found.values.tolist())


def test_classifiers_are_not_blended(ended, tmp_path):
    with pytest.raises(ConfigError, match="got blend, but the run is of task.kind 'classification'"):
        export(ended("bert"), tmp_path / "out", "blend")


@pytest.mark.parametrize("kind, client", [("bert", "anna"), ("llama", None), ("clip", "0"), ("siglip", None), ("vit", "y")])
def test_merged_weights_give_the_same_logits(kind, client, ended, tmp_path):
    outcome, model = read_out(ended(kind))
    export(ended(kind), tmp_path / "out", "merged", client=client)
    found = predict(model, outcome, outcome.client(client), inputs_for(model.foundation))
    want = found.global_ if client is None else found.local
    assert error(logits_of_readme(tmp_path / "out"), want) < 1e-5
    assert not any("lora" in name for name in load_file(tmp_path / "out/model.safetensors"))


def test_an_expert_of_a_run_in_16_bits_is_merged_into_the_weights_as_they_were(ended):
    outcome, _ = read_out(ended("bert"))
    merged = []
    for dtype in ("fp32", "bf16"):
        config = outcome.task.config.model_copy(update={"run": outcome.task.config.run.model_copy(update={"dtype": dtype})})
        foundation = models.load(config.model)
        merge_expert(replace(outcome, task=replace(outcome.task, config=config)), foundation, "anna")
        merged.append(foundation.module.state_dict())
    assert all(tensor.dtype == merged[0][name].dtype and torch.equal(tensor, merged[0][name]) for name, tensor in merged[1].items())


@pytest.mark.parametrize("kind, client", [("bert", "berta")])
def test_onnx_gives_the_same_logits(kind, client, ended, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    outcome, model = read_out(ended(kind))
    export(ended(kind), tmp_path / "out", "onnx", client=client)
    inputs = inputs_for(model.foundation)
    found = predict(model, outcome, outcome.client(client), inputs)
    session = runtime.InferenceSession(tmp_path / "out/model.onnx")
    for rows in (torch.arange(4), torch.arange(1)):
        batch = {name: value.numpy() for name, value in inputs.batch(rows).items()}
        (got,) = session.run(["logits"], batch)
        assert error(torch.from_numpy(got), (found.global_ if client is None else found.local)[rows]) < 1e-4


@pytest.mark.parametrize("kind", ["bert", "clip", "llama"])
def test_a_loaded_mixture_predicts_as_the_run_did(kind, ended, tmp_path):
    """Judged on each client's test samples: the accuracy is the one that the run recorded."""
    export(ended(kind), tmp_path / "out")
    outcome, model = read_out(ended(kind))
    config = outcome.task.config
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    (tmp_path / "out").rename(tmp_path / "elsewhere")           # nothing in it points back
    samples = data.user_data.read(config.data, model.foundation.reads)
    dataset = data.load(config.data, model.foundation)
    partition = data.partition(dataset, config.data, config.clients, config.run.seed)
    recorded = {c["id"]: c for c in RunRecords.read(ended(kind)).clients}
    for split in partition.clients:
        mixture = fedms.load(tmp_path / "elsewhere", client=split.group)
        table = mixture.predict([samples.content[i] for i in split.test])
        assert list(table.columns) == ["label", "probability", "gate_weight"] and len(table) == len(split.test)
        truth = [dataset.classes[i] for i in dataset.labels[split.test]]
        assert (table.label == truth).mean() == pytest.approx(recorded[split.id]["accuracy"]["personalized"])
        assert table.probability.between(1 / len(dataset.classes) - 1e-6, 1).all()
        if config.method_row.weight is not None:
            assert table.gate_weight.mean() == pytest.approx(recorded[split.id]["gate_mean"], abs=1e-6)
        else:
            assert table.gate_weight.isna().all()
    alone = fedms.load(tmp_path / "elsewhere").predict([samples.content[0]])
    assert alone.gate_weight.isna().all() and fedms.load(tmp_path / "elsewhere").predict([]).empty


def test_the_commands(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = CliRunner()
    assert command.invoke(cli.app, ["export", str(ended("bert")), "--out", "out"]).exit_code == 0
    refused = command.invoke(cli.app, ["export", str(ended("bert")), "--out", "out"])
    assert refused.exit_code == 4 and "exists and is not empty" in refused.stderr
    again = command.invoke(cli.app, ["export", str(ended("bert")), "--out", "out", "--force"])
    assert again.exit_code == 0 and "clients/0.safetensors" in again.stdout and [p.name for p in tmp_path.iterdir()] == ["out"]

    pd.DataFrame({"body": TEXTS}).to_csv("new.csv", index=False)
    shown = command.invoke(cli.app, ["predict", "out", "new.csv", "--client", "carl", "--text", "body"])
    assert shown.exit_code == 0 and shown.stdout.startswith("body,label,probability,gate_weight\n" + TEXTS[0] + ",")
    for suffix, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet)):
        done = command.invoke(cli.app, ["predict", "out", "new.csv", "-c", "2", "--text", "body", "-o", f"found{suffix}"])
        assert done.exit_code == 0 and done.stdout == f"4 predictions: found{suffix}\n"
        table = read(f"found{suffix}")
        assert table.body.tolist() == TEXTS and set(table.label) <= {"yes", "no"}
    for arguments, code, words in (
            (["new.csv", "-c", "dora", "--text", "body"], 2, "no client 'dora'; clients are: 0 (anna), 1 (berta), 2 (carl)"),
            (["new.csv"], 3, "no column 'text' (data.text); its columns are: body"), (["gone.csv"], 3, "no such file"),
            (["new.csv", "-o", "x.txt"], 2, "ends in .csv or .parquet")):
        failed = command.invoke(cli.app, ["predict", "out", *arguments])
        assert failed.exit_code == code and words in failed.stderr, failed.stderr


def test_predictions_stand_beside_the_columns_of_the_user(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(ended("bert"), tmp_path / "out")
    rows = "id;body;label\n" + "".join(f"{i};{text} é;mine {i}\n" for i, text in enumerate(TEXTS))
    Path("new.csv").write_bytes(rows.encode("cp1252"))
    arguments = ["predict", "out", "new.csv", "-c", "2", "--text", "body", "--delimiter", ";", "--encoding", "cp1252", "-o", "found.csv"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.stderr
    table = pd.read_csv("found.csv")
    assert list(table.columns) == ["id", "body", "label", "predicted_label", "probability", "gate_weight"]
    assert table.id.tolist() == [0, 1, 2, 3] and table.label.tolist() == [f"mine {i}" for i in range(4)]
    assert table.body.tolist() == [f"{text} é" for text in TEXTS] and set(table.predicted_label) <= {"yes", "no"}
    failed = CliRunner().invoke(cli.app, [*arguments[:7], "--delimiter", ";;"])
    assert failed.exit_code == 2 and 'data.delimiter: got ";;"' in failed.stderr
    failed = CliRunner().invoke(cli.app, arguments[:7])
    assert failed.exit_code == 3 and "data.encoding" in failed.stderr


def test_predictions_for_images_name_their_files(ended, tmp_path):
    export(ended("clip"), tmp_path / "out")
    for i, image in enumerate(photos(3)):
        (tmp_path / "new").mkdir(exist_ok=True)
        image.save(tmp_path / f"new/{i}.png")
    mixture = fedms.load(tmp_path / "out", client="x")
    table = mixture.predict_file(str(tmp_path / "new"))
    assert table.image.tolist() == [str(tmp_path / f"new/{i}.png") for i in range(3)]
    assert table.drop(columns="image").equals(mixture.predict([tmp_path / f"new/{i}.png" for i in range(3)]))
    assert len(mixture.predict_file(str(tmp_path / "new/1.png"))) == 1
    (tmp_path / "new/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read: .*new/1\.png"):
        mixture.predict_file(str(tmp_path / "new"))


def test_a_module_given_as_an_object(tmp_path):
    images = make_photos(tmp_path / "photos")
    summary = run.run(settings("mine", images, count=2), tmp_path / "run", foundation=saved_models.given_as_object())
    assert summary["model"] == "mine" and summary["trainable_params"] > 0
    export(tmp_path / "run", tmp_path / "out", foundation=saved_models.given_as_object())
    table = fedms.load(tmp_path / "out", client="x", foundation=saved_models.given_as_object()).predict(photos(4))
    assert len(table) == 4 and set(table.label) <= {"cat", "dog"} and table.gate_weight.between(0, 1).all()
    with pytest.raises(ConfigError, match="was given as an object; give it again as foundation="):
        fedms.load(tmp_path / "out")
    with pytest.raises(ModelError, match="only models of transformers are exported in this format"):
        export(tmp_path / "run", tmp_path / "peft", "peft", foundation=saved_models.given_as_object())


# What is refused

def test_damaged_exports_are_refused(ended, tmp_path):
    out = export(ended("bert"), tmp_path / "out")
    for name in ("shared.safetensors", "clients/1.safetensors", "base/model.safetensors"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-7])
        with pytest.raises(RunFolderError, match=rf"{name}: {len(whole) - 7} bytes, expected {len(whole)}"):
            fedms.load(out)
        (out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(RunFolderError, match=rf"{name}: damaged"):
            fedms.load(out)
        (out / name).unlink()
        with pytest.raises(RunFolderError, match=rf"{name}: cannot be read: No such file"):
            fedms.load(out)
        (out / name).write_bytes(whole)
    manifest = json.loads((out / "fedms.json").read_text())
    old = {**manifest["config"], "gate": {**manifest["config"]["gate"], "held_out": 0.2}}     # as format 1 had it
    del old["format"]
    (out / "fedms.json").write_text(json.dumps({**manifest, "config": old}))
    assert fedms.load(out, client="carl").classes == ("no", "yes")
    (out / "fedms.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(RunFolderError, match="newer version"):
        fedms.load(out)
    (out / "fedms.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read"):
        fedms.load(out)
    with pytest.raises(RunFolderError, match="holds no fedms.json"):
        fedms.load(tmp_path)
    with pytest.raises(RunFolderError, match="format peft.*read --format mixture"):
        fedms.load(export(ended("bert"), tmp_path / "peft", "peft"))


def test_exports_that_cannot_be_made(ended, tmp_path):
    shutil.copytree(ended("bert"), tmp_path / "run")
    with pytest.raises(ConfigError, match="got 'gguf'; accepted: peft, blend, merged, onnx, mixture"):
        export(tmp_path / "run", tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="--client: the format peft holds all clients"):
        export(tmp_path / "run", tmp_path / "out", "peft", client="0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(RunFolderError, match="holds no fedms.json, so it is no earlier export and is not replaced"):
        export(tmp_path / "run", tmp_path / "mine", overwrite=True)
    task = read_task(tmp_path / "run")
    other = saved_models.save("roberta", tmp_path / "other")
    wrong = models.load(task.config.model.model_copy(update={"id": str(other)}))
    with pytest.raises(ModelError, match="is not the model that the experts were trained on"):
        export(tmp_path / "run", tmp_path / "out", foundation=wrong)
    shutil.rmtree(tmp_path / "run/checkpoint")
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(RunFolderError, match="has not ended; go on with it by `fedms run` with --resume, or by `fedms server start`"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("where, error", [
    ("fedms.exports.manifest.save", OSError(28, "No space left on device")),
    ("transformers.PreTrainedModel.save_pretrained", SafetensorError("I/O error: No space left on device"))])
def test_a_full_disk_leaves_the_earlier_export(ended, tmp_path, monkeypatch, where, error):
    out = export(ended("bert"), tmp_path / "out")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, full)
    with pytest.raises(RunFolderError, match="out: cannot be written: .*No space left on device"):
        export(ended("bert"), out, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# In again

def import_adapter(folder, source, out):
    """A run of stage 2 from an adapter, as `fedms import-peft` makes it."""
    shape = peft_format.read_shape(folder)
    config = source.model_copy(update={
        "lora": source.lora.model_copy(update={"start": str(folder), "rank": shape.rank, "alpha": shape.alpha,
                                               "rslora": shape.rslora}),
        "stage1": source.stage1.model_copy(update={"rounds": 0})})
    run.run(config, out)
    return read_out(out)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_our_own_adapter_comes_back(kind, ended, tmp_path):
    before, model = read_out(ended(kind))
    export(ended(kind), tmp_path / "out", "peft")
    after, again = import_adapter(tmp_path / "out/global", before.task.config, tmp_path / "run")
    ours, theirs = (o.experts(m)["global"] for o, m in ((before, model), (after, again)))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = inputs_for(model.foundation)
    assert torch.equal(predict(model, before, None, inputs).global_, predict(again, after, None, inputs).global_)


def test_an_adapter_that_peft_made_starts_stage_2(ended, tmp_path):
    """Trained around a classifier, on two kinds of layers of all blocks: features and head come over."""
    config = read_task(ended("bert")).config
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification.from_pretrained(config.model.id, num_labels=2)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "output.dense"],
                                                       use_rslora=True, task_type="SEQ_CLS"))
    for name, p in theirs.named_parameters():
        if "lora_B" in name or "classifier" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    outcome, model = import_adapter(tmp_path / "adapter", config, tmp_path / "run")
    assert [v["stage"] for v in RunRecords.read(tmp_path / "run").visits] == ["stage2"] * 3
    assert outcome.final.applied_depth == saved_models.BLOCKS and outcome.final.depth == 2
    inputs = inputs_for(model.foundation)
    batch = inputs.batch(torch.arange(len(inputs)))
    with torch.no_grad():
        hidden = theirs.eval().base_model.model.bert(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        features = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        want = theirs.base_model.model.classifier(features)
    assert error(predict(model, outcome, None, inputs).global_, want) < 1e-5
    assert error(predict(model, outcome, 0, inputs).local, want) > 1e-3       # and is trained from there


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora is True"), ({"peft_type": "LOHA"}, 'peft_type is \'LOHA\'; accepted: "LORA"'),
    ({"rank_pattern": {"query": 8}}, "rank_pattern is"), ({"r": None}, "r is None"), ({"lora_alpha": 9}, "lora.rank:"),
])
def test_adapters_of_another_kind(change, message, ended, tmp_path):
    export(ended("bert"), tmp_path / "out", "peft")
    folder = tmp_path / "out/global"
    found = json.loads((folder / "adapter_config.json").read_text())
    config = settings(read_task(ended("bert")).config.model.id, read_task(ended("bert")).config.data.name,
                      data={"client": "who"}, lora={"start": str(folder)}, stage1={"rounds": 0})
    (folder / "adapter_config.json").write_text(json.dumps({**found, **change}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_that_do_not_fit(ended, tmp_path):
    export(ended("bert"), tmp_path / "out", "peft")
    folder = tmp_path / "out/global"
    config = read_task(ended("bert")).config
    source = config.model_copy(update={"model": config.model.model_copy(update={"targets": ("query",)})})
    with pytest.raises(ConfigError, match="model.targets: the adapter in .* has a pair for .*, where the model has no expert"):
        import_adapter(folder, source, tmp_path / "run")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * float("nan")}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="holds NaN or infinity"):
        import_adapter(folder, config, tmp_path / "run")
    save_file({**weights, name: torch.zeros(2, 5)}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"is \(2, 5\), the model's is"):
        import_adapter(folder, config, tmp_path / "run")
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="the weights cannot be read"):
        import_adapter(folder, config, tmp_path / "run")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="is a pickle and is not read"):
        import_adapter(folder, config, tmp_path / "run")
    with pytest.raises(ConfigError, match="not an adapter in PEFT's format"):
        peft_format.read_shape(tmp_path)
