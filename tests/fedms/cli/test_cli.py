"""The commands: help, exit codes, and what a user reads when something is wrong. No model is trained here."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from fedms import cli, errors
from fedms.cli import stopping
from fedms.cli.command import LONGEST, PANELS, epilog
from fedms.config import load_config, with_run, registry
from fedms.doctor import Check
from fedms.engines.base import Engine
from fedms.progress import Progress, TerminalProgress, validation_words
from fedms.runs import batch, run
from fedms.storage.run_folder import RunFolder
from rich.console import Console
from synthetic import write_run
from typer.testing import CliRunner


def fedms(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def said(result) -> str:
    return result.output if result.output.endswith(result.stderr) else result.output + result.stderr


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that write made-up records; returns what they were asked for."""
    asked = []

    def one(config, out, *, overwrite, resume, progress: Progress, stop):
        assert not stop()
        asked.append((config.run.method, config.run.seed, Path(out), overwrite, resume))
        progress.phase("loading")
        write_run(out, config.run.method, config.run.seed)

    def many(config, names, seeds, out, *, overwrite, jobs, progress, stop, settings, share):
        assert share
        for seed in seeds:
            for name in names:
                one(with_run(config, method=name, seed=seed), out / f"{name}-seed{seed}", overwrite=overwrite,
                    resume=not overwrite, progress=progress, stop=stop)

    monkeypatch.setattr(run, "run", one)
    monkeypatch.setattr(batch, "compare", many)
    return asked


# Help

@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("run", "--help"), ("server", "start", "--help")])
def test_help_says_where_exit_codes_are_explained(arguments):
    result = fedms(*arguments)
    assert result.exit_code == 0 and "fedms exit-codes" in said(result) and "Traceback" not in said(result)


def test_exit_codes_are_explained():
    result = fedms("exit-codes")
    lines = dict(line.strip().split(maxsplit=1) for line in result.stdout.splitlines()[1:])
    assert result.exit_code == 0 and {int(code) for code in lines} == set(errors.EXIT_CODES)
    assert lines["3"] == "The model or the data could not be loaded."


def test_commands_are_in_panels():
    text = said(fedms("--help"))
    places = [text.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places) and "--install-completion" in text
    assert places[2] < text.index("│ client ") < places[3] < text.index("│ watch ") < places[4] < text.index("│ predict ")


def test_a_long_example_has_its_comment_above_it():
    assert "# the noise of a run with differential privacy" in said(fedms("plan", "--help"))
    long, note = "fedms x" + 60 * "y", 40 * "z"
    lines = epilog(f"{long}   # {note}", "fedms a  # b").split("\n\n")
    assert lines[lines.index("```") + 1:][:3] == [f"# {note}", long, "fedms a  # b"] and len(long) < LONGEST


def test_the_nearest_command_is_named_once():
    assert said(fedms("rnu")).count("Did you mean") == 1


def test_bash_completes_commands_methods_and_keys(tmp_path):
    """As bash does it: with the words of the line, and the number of the one under the cursor."""
    cases = {"fedms com": ["compare"], "fedms run dig": ["digits"], "fedms run digits --method fedms_": ["fedms_plus"],
             "fedms compare digits --methods local,fedpe": ["local,fedper"], "fedms run digits --set stage1.rou": ["stage1.rounds="]}
    for line, expected in cases.items():
        result = CliRunner().invoke(cli.app, [], prog_name="fedms", env={
            "_FEDMS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)})
        assert result.stdout.split() == expected, line


def test_help_names_what_can_be_chosen():
    text = said(fedms("run", "--help")) + said(fedms("compare", "--help"))
    for word in (*registry.method_names(), "digits", "sentiment", "--set", "--out", "--force", "--dry-run", "--seeds"):
        assert word in text


@pytest.mark.parametrize("arguments", [("walk",), ("run",), ("run", "digits", "--fast"), ("report",),
                                       ("run", "digits", "--seed")])
def test_wrong_usage(arguments):
    result = fedms(*arguments)
    assert result.exit_code == errors.USAGE and "Traceback" not in said(result)


# Configuration

def test_a_dry_run_prints_a_run_file_that_means_the_same(tmp_path):
    result = fedms("run", "digits", "--dry-run", "--set", "lora.rank=3", "-m", "local", "--seed", 5)
    assert result.exit_code == 0 and result.stderr == ""
    (tmp_path / "my.toml").write_text(result.stdout, encoding="utf-8")
    assert load_config(tmp_path / "my.toml") == load_config("digits", ["lora.rank=3", "run.method=local", "run.seed=5"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments, words", [
    (("run", "digts"), ["configuration: 1 problem", "did you mean digits?"]),
    (("run", "digits", "--set", "lora.rnak=4"), ["lora.rnak: unknown key; did you mean lora.rank?"]),
    (("run", "digits", "--set", "lora.rank=x", "--set", "run.seed=-1"), [
        "configuration: 2 problems", 'lora.rank: got "x"; accepted: an integer, at least 1', "run.seed: got -1"]),
    (("run", "digits", "--method", "fedsm"), ['run.method: got "fedsm"', "did you mean fedms?"]),
    (("run", "digits", "--engine", "cloud"), ['run.engine: got "cloud"; accepted: "local"']),
    (("run", "digits", "--set", "lora"), ["--set lora: expected table.key=value"]),
    (("run", "missing.toml"), ["missing.toml: no such file"]),
    (("compare", "digits", "--methods", "fedms,fedmx"), ["--methods: unknown method 'fedmx'", "fedavg_prior"]),
    (("compare", "digits", "--methods", ","), ["--methods: names no method"]),
    (("compare", "digits", "--seeds", "x"), ["--seeds: got 'x'"]),
    (("compare", "digits", "--seeds", "0"), ["--seeds: got '0'"]),
    (("compare", "digits", "--seeds", "1,-2"), ["--seeds: got '1,-2'"]),
    (("compare", "digits", "--seeds", "1,4294967296"), ["--seeds: got '1,4294967296'", "4294967295"]),
])
def test_mistakes_are_explained(arguments, words, fake_runs, tmp_path):
    result = fedms(*arguments)
    assert result.exit_code == errors.USAGE
    for word in words:
        assert word in result.stderr
    assert result.stdout == "" and fake_runs == [] and list(tmp_path.iterdir()) == []


# Run and compare

def test_a_run_shows_what_came_out(fake_runs, tmp_path):
    result = fedms("run", "digits", "--method", "fedms", "--seed", 3)
    assert result.exit_code == 0, said(result)
    assert fake_runs == [("fedms", 3, Path("runs/digits/fedms-seed3"), False, False)]
    out = tmp_path / "runs" / "digits" / "fedms-seed3"
    assert (out / "report.html").is_file() and not (out / "compare.csv").exists()
    assert "loading ..." in result.stderr and "loading" not in result.stdout
    lines = result.stdout.splitlines()
    row = next(line for line in lines if line.startswith("fedms  "))
    assert len(re.split(" {2,}", row)) == 13 and "39.7 MB" in row
    assert next(line for line in lines if line).startswith("fedms reaches "), "the verdict comes first"
    assert f"report: {Path('runs/digits/fedms-seed3/report.html')}" in lines
    assert all(line == line.rstrip() for line in lines if line.startswith(("+", "-", "!", "report")))


def test_a_comparison_shows_one_table(fake_runs, tmp_path):
    result = fedms("compare", "digits", "--methods", "fedms, local,fedms", "--seeds", "0,7", "--out", "here")
    assert result.exit_code == 0, said(result)
    assert fake_runs == [(m, s, Path(f"here/{m}-seed{s}"), False, True) for s in (0, 7) for m in ("fedms", "local")]
    assert {p.name for p in (tmp_path / "here").iterdir()} == {
        "fedms-seed0", "fedms-seed7", "local-seed0", "local-seed7", "compare.csv", "compare.md", "report.html"}
    names = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert {"method", "zero-shot", "local", "fedms"} <= set(names)
    assert result.stdout.count("±") >= 8


def test_a_comparison_of_one_has_its_table_too(fake_runs, tmp_path):
    assert fedms("compare", "digits", "--methods", "local").exit_code == 0
    assert (tmp_path / "runs" / "digits" / "compare.csv").is_file()


def test_a_number_of_seeds_counts_from_zero(fake_runs):
    assert fedms("compare", "digits", "--methods", "all", "--seeds", 2).exit_code == 0
    assert [(m, s) for m, s, *_ in fake_runs] == [(m, s) for s in (0, 1) for m in registry.method_names()]


def test_existing_runs_are_kept_unless_forced(fake_runs, tmp_path):
    arguments = ("run", "digits")
    out = tmp_path / "runs" / "digits" / "fedms_plus-seed0"
    out.mkdir(parents=True)
    (out / "config.toml").write_text("mine")
    result = fedms(*arguments)
    assert result.exit_code == errors.FOLDER and fake_runs == []
    assert "exists and is not empty" in result.stderr and "--force" in result.stderr
    assert (out / "config.toml").read_text() == "mine" and len(list(out.iterdir())) == 1
    (out / "config.toml").unlink()
    assert fedms(*arguments).exit_code == 0
    assert fake_runs[-1][3] is False


def test_force_is_passed_on(fake_runs, monkeypatch):
    monkeypatch.setattr(cli.run, "show_results", lambda folder: None)
    assert fedms("run", "digits", "--force", "--out", "x").exit_code == 0
    assert fake_runs[-1][3:] == (True, False)


def test_resuming_is_passed_on(fake_runs, monkeypatch):
    monkeypatch.setattr(cli.run, "show_results", lambda folder: None)
    assert fedms("run", "digits", "--resume", "--out", "x").exit_code == 0
    assert fake_runs[-1][3:] == (False, True)
    result = fedms("run", "digits", "--resume", "--force", "--out", "x")
    assert result.exit_code == errors.USAGE and "give one of them" in result.stderr and len(fake_runs) == 1


@pytest.mark.parametrize("error, code, words", [
    (errors.DataError("file.txt: damaged"), errors.UNAVAILABLE, ["data", "file.txt: damaged"]),
    (errors.ModelError("no weights"), errors.UNAVAILABLE, ["model", "no weights"]),
    (errors.RunFolderError("out: full"), errors.FOLDER, ["run folder", "out: full"]),
    (ModuleNotFoundError("No module named 'x'"), errors.FAILED, ["pip install 'fedms[train]'", "'x'"]),
    (ValueError("line one\nline [two]"), errors.FAILED, ["the run failed: ValueError", "  line [two]", "FEDMS_DEBUG=1"]),
    (KeyboardInterrupt(), errors.INTERRUPTED, ["interrupted"]),
])
def test_each_error_has_its_exit_code(monkeypatch, error, code, words):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(run, "run", fails)
    result = fedms("run", "digits", "--out", "x")
    assert result.exit_code == code
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in said(result) and result.stdout == "" and not result.stderr.startswith("\n")


def test_debugging_shows_the_traceback(monkeypatch):
    def fails(*_, **__):
        raise ValueError("boom")

    monkeypatch.setattr(run, "run", fails)
    monkeypatch.setenv("FEDMS_DEBUG", "1")
    result = fedms("run", "digits", "--out", "x")
    assert result.exit_code == errors.FAILED and "Traceback" in result.stderr


def test_an_interrupted_run_says_where_its_records_are(monkeypatch):
    def stopped(config, out, **_):
        RunFolder.create(out, config).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stopped)
    monkeypatch.setattr(stopping.sys, "argv", ["fedms", "run", "digits", "--set", "data.path=a b", "--force"])
    said = fedms("run", "digits", "--out", "here").stderr
    assert "fedms report here shows what was recorded so far" in said
    assert "  fedms run digits --set 'data.path=a b' --resume\n" in said


# Report and doctor

def test_report_makes_the_page_again(tmp_path):
    path = write_run(tmp_path / "run")
    assert fedms("report", path).exit_code == 0
    first = (path / "report.html").read_bytes()
    (path / "report.html").unlink()
    assert fedms("report", path).exit_code == 0
    assert (path / "report.html").read_bytes() == first


def test_report_of_an_unfinished_run(tmp_path):
    result = fedms("report", write_run(tmp_path / "run", stop_after=3))
    assert result.exit_code == 0 and "No run here has ended" in result.stdout and "1 unfinished" in result.stdout


def test_report_without_a_run(tmp_path):
    for folder, words in ((tmp_path, "holds no run"), (tmp_path / "none", "no such folder")):
        result = fedms("report", folder)
        assert result.exit_code == errors.FOLDER and words in result.stderr and result.stdout == ""


@pytest.mark.parametrize("state, code", [("ok", errors.DONE), ("note", errors.DONE), ("problem", errors.FAILED)])
def test_doctor_tells_by_its_exit_code(monkeypatch, state, code):
    long = "/a/very/long/path" * 20
    monkeypatch.setattr("fedms.doctor.diagnose", lambda *_: [Check("python", "ok", "3"), Check("threads", state,
                                                                                            f"set [run] at {long}")])
    result = fedms("doctor")
    assert result.exit_code == code
    assert result.stdout.splitlines()[1].split(maxsplit=2) == [state, "threads", f"set [run] at {long}"]
    assert ("1 problem: threads" in result.stderr) == (state == "problem")


def test_doctor_shows_who_serves_a_run(monkeypatch):
    from fedms_ext.profiling import Product, Served

    counted = Served()
    for server, product, calls, flops in (("cpu", Product("expert_linear", 64, 8, 24, 2.0), 3, 3e9),
                                          ("pytorch", Product("bmm"), 2, 1e9)):
        counted.calls[server, product], counted.flops[server, product] = calls, int(flops)
    monkeypatch.setattr("fedms.doctor.diagnose", lambda *_: [Check("python", "ok", "3")])
    monkeypatch.setattr("fedms.doctor.served", lambda config, progress: counted)
    result = fedms("doctor", "digits")
    assert result.exit_code == errors.DONE
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "cpu all 3 3 75.0 %".split() in lines and "pytorch all 2 1 25.0 %".split() in lines
    assert "expert_linear 64; 8 -> 24, r = 2 3 3 75.0 %".split() in lines
    result = fedms("doctor", "--set", "model.frozen=int8")
    assert result.exit_code == errors.USAGE and "--set: nothing to override" in result.stderr


# Progress

def test_the_progress_bar_shows_round_loss_accuracy_and_depth_within_80_columns():
    terminal = io.StringIO()
    console = Console(force_terminal=True, width=80, color_system=None, file=terminal)
    progress = TerminalProgress(console)
    progress.phase("loading")
    progress.start(4, "fedavg_prior, seed 0")
    for client in range(4):
        progress.visit("stage2", 12, client, depth=6, loss=2.19812, validation_accuracy=0.0871, gate_mean=0.5)
    screen = "".join(segment.text for segment in console.render(progress._bar.get_renderable()))
    progress.round("stage2", 12, depth=6, loss=12.19812, validation_accuracy=1.0, gate_mean=0.53, event="activated 1")
    progress.round("stage2", 13, depth=6, loss=None, validation_accuracy=None)
    progress.note("twice")
    progress.note("twice")
    progress.phase("evaluating")
    progress.close()
    for words in ("100%", "stage 2 round 12", "depth 6", "loss 2.198", "validation   8.7%"):
        assert words in screen
    assert max(map(len, screen.splitlines())) <= 80
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()))
    assert "  stage 2 round 12  depth 6  loss 12.198  validation 100.0%  gate 0.53  activated 1" in lines
    assert "  stage 2 round 13  depth 6" in lines
    assert lines.count("note: twice") == 1 and "fedavg_prior, seed 0" in lines


def test_a_language_model_is_shown_by_its_perplexity():
    def words(task, share, nats=None):
        return validation_words(task, {"validation_accuracy": share, "validation_loss": nats})

    assert words("classification", 0.25, 2.0) == "25.0%" and words("classification", 0.0) == words(None, 0.0) == "0.0%"
    clients = [1.0, 3.0]        # nats a token: exp(2) is their perplexity, the mean of exp(-nats) is that of 1 / 4.8
    assert words("causal_lm", sum(math.exp(-nats) for nats in clients) / 2, sum(clients) / 2) == "perplexity 7.4"
    assert words("causal_lm", 0.0, 800.0) == f"perplexity {math.exp(700):.1f}"
    assert words("causal_lm", 0.25) == "perplexity 4.0", "an older record has no loss"
    assert words("causal_lm", None) == words("classification", None) == "unknown"
    server = SimpleNamespace(config=load_config("sentiment", ["task.kind=causal_lm", "model.id=smollm2", "data.name=dictionaries"]))
    record = {"stage": "stage1", "round": 1, "loss": 2.0, "validation_accuracy": 0.25, "validation_loss": 2.0}
    text = io.StringIO()
    TerminalProgress(Console(file=text, width=80)).round(**Engine.shown(SimpleNamespace(server=server), record))
    assert text.getvalue() == "  stage 1 round  1  loss 2.000  perplexity    7.4\n"


def test_progress_without_a_terminal_is_plain_lines(capsys):
    progress = TerminalProgress(Console(stderr=True, force_terminal=False, width=10_000))
    for title in ("fedms, seed 0", "local, seed 0"):
        progress.start(1, title)
        progress.visit("stage1", 1, 0, depth=1, loss=1.0, validation_accuracy=0.5)
        progress.round("stage1", 1, depth=1, loss=1.0, validation_accuracy=0.5)
        progress.phase("evaluating")
    progress.close()
    line = "  stage 1 round  1  depth 1  loss 1.000  validation  50.0%"
    assert capsys.readouterr().err.splitlines() == [
        "fedms, seed 0", line, "evaluating ...", "local, seed 0", line, "evaluating ..."]


def test_the_version_is_the_packages():
    assert said(fedms("--version")) == f"fedms {version('fedms')}\n"


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fedms", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fedms {version('fedms')}\n"), done.stderr
