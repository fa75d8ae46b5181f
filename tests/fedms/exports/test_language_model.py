"""A finished run of a language model answers: by every method as it predicts, on the command line, and over HTTP."""
from __future__ import annotations

import json
import re
import socket
import threading
import time
from dataclasses import replace

import pytest
import tiny_language_models as tiny
import torch
from fake_device import FakeCuda
from typer.testing import CliRunner

from fedms import methods, models
from fedms.data.inputs import TextInputs
from fedms.data.subset import Subset
from fedms.errors import ConfigError
from fedms.exports import export
from fedms.exports.blend import stacked
from fedms.exports.language_model import open_language_model
from fedms.exports.mixture import load
from fedms.exports.predict import predict
from fedms.federated.client import Private
from fedms.models import peft_format
from fedms.models.generation import Sampling
from fedms.runs import run

SETS = ["run.method=fedms", "clients.count=2", "data.global_test=0", "stage1.batch=4", "stage2.batch=4", "stage1.lr=0.02",
        "stage2.lr=0.02", "gate.lr=0.3"]
QUESTION = "number 3?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_federation(tmp_path_factory.mktemp("language"), ("ann", "bob"), 12, lambda who, i: f"{who}{i % 3} {who * 2}")


def finished(folder, *sets):
    path = folder / ("run-" + "-".join(sets).replace("=", "-"))
    if not path.exists():
        run.run(tiny.configuration(folder, *SETS, *sets), path)
    return path


def answered(language, client):
    """The tokens of an answer and what generated them; the opinion and the gate's weights by which the method predicts them."""
    stream, answerer = language._tokens(QUESTION, client, Sampling(7))
    tokens, prompt = list(stream), language.prompt(QUESTION)
    ids = torch.tensor([*prompt, *(token.id for token in tokens)])
    inputs = TextInputs({"input_ids": ids}, torch.tensor([0, len(ids)]), {"input_ids": 0})
    model = language.model
    own = language.trained.client(client)
    predict(model, language.trained, own, inputs)       # asks about every token, the prompt's, too
    model.dataset = replace(model.dataset, answers=torch.tensor([len(prompt)]))
    model.clear()
    made = methods.create(language.trained.task.config).predict(
        model, Subset(torch.arange(1)), language.trained.private.get(own, Private()), language.trained.final)
    return tokens, answerer, made.personalized, made.weights


@pytest.mark.parametrize("sets", [["run.method=fedms"], ["run.method=fedms_plus"], ["gate.mixing=layers"], ["gate.features=final"],
                                  ["gate.weight=0.3"], ["gate.mixing=layers", "gate.weight=0.3"],
                                  ["gate.on=logits"], ["run.method=apfl"], ["run.method=ditto"], ["run.method=fedavg"],
                                  ["run.method=local"], ["run.method=fedavg_ft"]], ids=str)
def test_generated_tokens_have_the_probability_that_the_method_predicts(folder, sets):
    """The answer goes back in as a sample: what `predict`, which knows no cache, says of its tokens is the same."""
    language = open_language_model(finished(folder, *sets))
    assert language.clients == {"ann": 0, "bob": 1}
    for client in ("bob", 0):
        tokens, answerer, opinion, weights = answered(language, client)
        torch.testing.assert_close(torch.tensor([token.log_p for token in tokens]), opinion[:, 0], rtol=1e-4, atol=2e-4)
        assert bool((opinion[:, 3] == 1).all())     # greedy
        if weights is not None:
            torch.testing.assert_close(torch.tensor(answerer.weights), weights[:, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sets", [[], ["gate.mixing=layers"]], ids=str)
def test_a_run_in_16_bits_answers_in_them(folder, sets):
    language = open_language_model(finished(folder, *sets, "run.dtype=bf16"))
    layer, seen = [*language.model.layers.values()][-1], []
    hook = layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    tokens, answerer, opinion, weights = answered(language, "bob")
    hook.remove()
    assert layer.weight.dtype == torch.bfloat16 and {*seen} == {torch.bfloat16}
    torch.testing.assert_close(torch.tensor([token.log_p for token in tokens]), opinion[:, 0], rtol=0, atol=0.1)
    torch.testing.assert_close(torch.tensor(answerer.weights), weights[:, 1], rtol=0, atol=0.02)


def test_streamed_text_is_the_answer_and_sampling_repeats(folder):
    language = open_language_model(finished(folder, "run.method=fedms"))
    for sampling in (Sampling(8), Sampling(8, temperature=1.5, seed=3)):
        answer = language.answer(QUESTION, "ann", sampling)
        assert "".join(language.stream(QUESTION, "ann", sampling)) == answer.text
        assert answer == language.answer(QUESTION, "ann", sampling)
    assert language.answer(QUESTION, "ann", Sampling(8, temperature=1.5, seed=4)) != answer
    with pytest.raises(ConfigError, match="there is no client 'carl'"):
        language.answer(QUESTION, "carl")
    with pytest.raises(ConfigError, match="local shares no expert; clients are: ann, bob"):
        open_language_model(finished(folder, "run.method=local")).answer(QUESTION)


def test_an_exported_mixture_answers_as_the_run(folder, tmp_path):
    path = finished(folder, "run.method=fedms")
    export(path, tmp_path / "mixture")
    wanted = open_language_model(path).answer(QUESTION, "bob", Sampling(6)).text
    assert load(tmp_path / "mixture", client="bob").generate(QUESTION, max_new_tokens=6) == wanted
    assert open_language_model(tmp_path / "mixture").answer(QUESTION, "bob", Sampling(6)).text == wanted
    (tmp_path / "questions.csv").write_text("q\n" + QUESTION + "\nnumber 4?\n")
    table = load(tmp_path / "mixture", client="bob").predict_file(str(tmp_path / "questions.csv"))
    answer = open_language_model(path).answer(QUESTION, "bob")
    assert list(table.columns) == ["q", "answer", "log_p", "gate_weight"] and table["q"][0] == QUESTION
    assert table["answer"][0] == answer.text and table["log_p"][0] == pytest.approx(answer.log_p, abs=1e-4)
    assert 0 < table["gate_weight"][1] < 1


@pytest.mark.parametrize("method", ["fedms", "fedavg"])
def test_peft_adapters_give_the_same_logits(folder, tmp_path, method):
    peft = pytest.importorskip("peft")
    import transformers

    path = finished(folder, f"run.method={method}")
    export(path, tmp_path / "adapters", "peft")
    language = open_language_model(path)
    model, ids = language.model, torch.tensor([language.prompt(QUESTION)])
    experts = language.trained.experts(model)
    assert {p.name for p in (tmp_path / "adapters").iterdir() if p.is_dir()} >= set(experts)
    for name, expert in experts.items():
        model.clear()
        model.load("global", expert, depth=0, applied_depth=language.trained.final.applied_depth)
        with torch.no_grad(), model.stream("global"):
            wanted = model.foundation.head(model.foundation.hidden({"input_ids": ids}))
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        found = peft.PeftModel.from_pretrained(base, tmp_path / "adapters" / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(found(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert found.peft_config["default"].task_type == "CAUSAL_LM"
        transformers.AutoTokenizer.from_pretrained(tmp_path / "adapters" / name)


def test_stacked_pairs_of_different_ranks_are_the_sum_of_their_products():
    draw = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((rank, 7), (5, rank))) for rank in (3, 1, 4)]
    factors = (0.7, -2.0, 0.0)
    a, b = stacked(pairs, factors)
    assert a.shape == (8, 7) and b.shape == (5, 8)
    torch.testing.assert_close(b @ a, sum(f * (up @ down) for f, (down, up) in zip(factors, pairs)), rtol=1e-13, atol=1e-13)


LAYERS = ["gate.mixing=layers", "gate.weight=0.3"]


@pytest.mark.parametrize("sets", [
    [*LAYERS, "run.method=fedms_plus"],
    [*LAYERS, "lora.rslora=true", "sal.schedule=every", "sal.every=1", "sal.depth=1", "stage1.rounds=2"]], ids=str)
def test_a_blend_in_peft_predicts_as_the_client_does(folder, tmp_path, sets):
    """In the second case local experts train one block less than the global one did."""
    peft = pytest.importorskip("peft")
    import transformers

    path = finished(folder, *sets)
    export(path, tmp_path / "blend", "blend")
    language = open_language_model(path)
    assert (language.trained.final.depth < language.trained.final.applied_depth) == ("sal.depth=1" in sets)
    assert {p.name for p in (tmp_path / "blend").iterdir()} == {"client-0", "client-1", "fedms.json"}
    ids = torch.tensor(language.prompt(QUESTION))
    inputs = TextInputs({"input_ids": ids}, torch.tensor([0, len(ids)]), {"input_ids": 0})
    seen = []
    for client in (0, 1):
        made = predict(language.model, language.trained, client, inputs)
        place = tmp_path / "blend" / f"client-{client}"
        assert place.stat().st_mode & 0o077 == 0 and "blended" in (place / "README.md").read_text()
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        found = peft.PeftModel.from_pretrained(base, place).eval()
        with torch.no_grad():
            log_p = found(input_ids=ids[None]).logits[0, :-1].log_softmax(1)
        asked = ids[-len(made.personalized):]
        wanted = torch.stack([log_p.gather(1, ids[1:, None])[:, 0], -(log_p.exp() * log_p).sum(1), log_p.amax(1)], 1)[-len(asked):]
        torch.testing.assert_close(made.personalized[:, :3], wanted, rtol=1e-4, atol=1e-4)
        for alone in (made.global_, made.local):
            assert float((alone[:, :3] - wanted).abs().max()) > 1e-2      # neither expert alone
        seen.append(wanted)
        assert peft_format.read_shape(place).rank == peft_format.read_shape(place).alpha == 16
        pairs = peft_format.read_pairs(place, language.model.layers)
        assert {len(pair) for name, pair in pairs.items() if name.endswith("lora_a")} == {16}
    assert float((seen[0] - seen[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("sets, why", [
    (["gate.mixing=layers"], "gate.weight is unset"), (["gate.weight=0.3"], 'gate.mixing = "outputs"'),
    (["run.method=fedavg_ft"], "the method fedavg_ft mixes no experts")])
def test_what_cannot_be_blended_is_refused(folder, tmp_path, sets, why):
    with pytest.raises(ConfigError, match=f"--format: got blend, but {why}.*accepted: peft .*merged .*mixture"):
        export(finished(folder, *sets), tmp_path / "blend", "blend")
    assert not any(tmp_path.iterdir())


def test_a_merged_model_gives_the_same_logits(folder, tmp_path):
    import transformers

    path = finished(folder, "run.method=fedms")
    export(path, tmp_path / "merged", "merged", client="ann")
    language = open_language_model(path)
    model, ids = language.model, torch.tensor([language.prompt(QUESTION)])
    model.load("global", language.trained.experts(model)["client-0"], depth=0, applied_depth=language.trained.final.applied_depth)
    with torch.no_grad(), model.stream("global"):
        wanted = model.foundation.head(model.foundation.hidden({"input_ids": ids}))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(whole(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="onnx"):
        export(path, tmp_path / "onnx", "onnx")


def test_an_adapter_comes_in_again(folder, tmp_path):
    path = finished(folder, "run.method=fedavg")
    export(path, tmp_path / "adapters", "peft")
    settings = tiny.configuration(folder, *SETS, "stage1.rounds=0", f"lora.start={tmp_path / 'adapters' / 'global'}")
    summary = run.run(settings, tmp_path / "again")
    first = json.loads((path / "summary.json").read_text())["language"]
    assert summary["language"]["nats_global"] == pytest.approx(first["nats_global"], rel=1e-4)


# The command line and the endpoint

def test_the_command_line(folder):
    from fedms.cli import app

    path = finished(folder, "run.method=fedms")
    wanted = open_language_model(path).answer(QUESTION, "ann", Sampling(6)).text
    done = CliRunner().invoke(app, ["generate", str(path), QUESTION, "--client", "ann", "--max-new-tokens", "6"])
    assert done.exit_code == 0 and done.stdout == wanted + "\n"
    for words, said in ((["generate", str(path / "no"), "x"], "no such folder"), (["generate", str(path), "x", "-c", "carl"], "carl"),
                        (["generate", str(path), "x", "--top-p", "0"], "--top-p"), (["serve", str(path), "--token", "short"], "--token"),
                        (["generate", str(path), "x" * 500], "leaves no room|expected 1 to"),
                        (["generate", str(path), "x", "--device", "gpu"], '--device: got "gpu"'),
                        (["serve", str(path), "--device", "cuda:9"], "run.device: got .cuda:9., but .*; use \"cpu\", or \"auto\""),
                        (["samples", str(path), "--device", "gpu"], '--device: got "gpu"')):
        done = CliRunner().invoke(app, words)
        assert done.exit_code in (2, 4), done.output
        assert "--device" not in words or re.search(said, " ".join(done.output.split())), done.output


@pytest.mark.parametrize("sets", [["run.method=fedms"], ["gate.mixing=layers"]], ids=str)
def test_on_a_gpu_it_answers_as_on_the_cpu(folder, sets, monkeypatch):
    path = finished(folder, *sets)
    wanted = open_language_model(path, device="cpu").answer(QUESTION, "bob", Sampling(6))
    foundation = models.load(tiny.configuration(folder, *SETS).model, "causal_lm")      # on the CPU, as always
    monkeypatch.setattr(models, "load", lambda *_, **__: foundation)
    with FakeCuda() as gpu:
        language = open_language_model(path, device="cuda")
        assert language.model.device.type == "cuda" and all(map(gpu.lies_on_it, foundation.module.parameters()))
        answer = language.answer(QUESTION, "bob", Sampling(6))
    assert answer.text == wanted.text and answer.log_p == pytest.approx(wanted.log_p, abs=1e-4)


def test_samples_before_and_after_in_the_report(folder):
    from fedms.cli import app

    path = finished(folder, "run.method=fedms")
    done = CliRunner().invoke(app, ["samples", str(path), "--clients", "2", "--max-new-tokens", "5"])
    assert all(f"client {name} answers ({i} of 2)" in done.stderr for i, name in enumerate(("ann", "bob"), start=1))
    assert done.exit_code == 0, done.output
    found = json.loads((path / "samples.json").read_text())
    assert [row["group"] for row in found] == ["ann", "bob"] and (path / "samples.json").stat().st_mode & 0o077 == 0
    question = found[1]["prompt"].removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    assert found[1]["expected"].startswith("bob") and question.startswith("number ")
    assert found[1]["after"] == open_language_model(path).answer(question, "bob", Sampling(5)).text
    page = (path / "report.html").read_text()
    assert "answers</h2>" in page and question in page
    (path / "samples.json").write_text('[{"client": "<script>"}]')
    assert CliRunner().invoke(app, ["report", str(path)]).exit_code == 0
    assert "answers</h2>" not in (path / "report.html").read_text()


@pytest.fixture(scope="module")
def served(folder):
    import uvicorn

    from fedms.exports.serve import endpoint

    language = open_language_model(finished(folder, "run.method=fedms"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(endpoint(language, "the-token"), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(300):
        if server.started:
            break
        time.sleep(0.1)
    yield language, f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(20)


def test_the_endpoint_lists_who_answers(folder):
    """With the method local the clients share no expert, so none is listed."""
    from starlette.testclient import TestClient

    from fedms.exports.serve import endpoint

    client = TestClient(endpoint(open_language_model(finished(folder, "run.method=local")), "the-token"),
                        headers={"authorization": "Bearer the-token"})
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["ann", "bob"]
    question = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3}
    assert [client.post("/v1/chat/completions", json={**question, "model": name}).status_code for name in ("bob", "global")] == [200, 404]


def test_the_endpoint_with_the_client_of_openai(served):
    openai = pytest.importorskip("openai")
    language, url = served
    client = openai.OpenAI(base_url=url, api_key="the-token", max_retries=0)
    assert [model.id for model in client.models.list()] == ["global", "ann", "bob"]
    messages = [{"role": "user", "content": QUESTION}]
    for name in ("global", "bob"):
        wanted = language.answer(QUESTION, None if name == "global" else name, Sampling(6))
        found = client.chat.completions.create(model=name, messages=messages, max_tokens=6, temperature=0)
        assert found.choices[0].message.content == wanted.text and found.usage.completion_tokens == wanted.tokens
        assert found.choices[0].finish_reason == ("stop" if wanted.stopped else "length")
        parts = client.chat.completions.create(model=name, messages=messages, max_tokens=6, temperature=0, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted.text
    with pytest.raises(openai.NotFoundError, match="model: there is no client 'carl'; clients are: .*ann.*; 'global' is"):
        client.chat.completions.create(model="carl", messages=messages)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="role"):
        client.chat.completions.create(model="bob", messages=[{"role": "boss", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="expected 1 to"):
        client.chat.completions.create(model="bob", messages=[{"role": "user", "content": "x" * 500}])
