"""The commands of FedMS. Each reads its arguments, calls the room that does the work, and shows what came out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Optional

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedms.config import (METHODS, PRETRAINED, ConfigError, RunConfig, builtin_names, dump_toml, load_config, parse_size,
                              source_name)
    from fedms.foreign import LONGEST_NOTE, printable
    from fedms.progress import Listeners, Progress, TerminalProgress, accept_any_text
    from fedms.storage.records import RunFolderError
except ModuleNotFoundError as missing:
    sys.exit(f"fedms needs {missing.name}, which is not installed: pip install 'fedms[train]'")

# torch, and everything that imports it, is imported inside the commands: --help and mistakes are answered at once.

OK, FAILED, USAGE, UNAVAILABLE, FOLDER, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES = ("0 done", "1 the run failed, or doctor found a problem", "2 wrong usage or configuration",
              "3 model or data could not be loaded", "4 a run folder exists already, or cannot be written or read",
              "130 interrupted")


def _epilog(*examples: str, notes: Sequence[str] = ()) -> str:
    """The end of a command's help: examples, notes and exit codes, one a line.

    typer joins what stands between empty lines by single line breaks before it is read as Markdown, so an empty line of
    Markdown is two here. What is in a block of code keeps its lines.
    """
    block = ["**Examples**", "", "```", *examples, "```", ""] if examples else []
    said = [line for note in notes for line in (note, "")]
    codes = ["**Exit codes**", "", "```", *EXIT_CODES, "```", "", "FEDMS_DEBUG=1 shows the traceback of an error."]
    return "\n\n".join([*block, *said, *codes])


def _console(stderr: bool = False) -> Console:
    """A console that wraps and cuts nothing where it writes to a pipe or a file."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = 10_000
    return made


console, errors = _console(), _console(stderr=True)

app = typer.Typer(
    name="fedms", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown",
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_epilog(
    "fedms doctor                          # is everything here that a run needs?",
    "fedms run digits                      # a smoke case: seconds, no download, meaningless numbers",
    "fedms run sentiment                   # the demo: MiniLM, four domains of human-rated sentences, 12 clients",
    "fedms compare sentiment --seeds 3     # all methods on three seeds, one table and one report",
    "fedms plan sentiment --memory 512MiB  # which depth, batch and precision fit a device?",
    "fedms watch runs/sentiment            # follow runs live, from another terminal",
    "fedms report runs/sentiment           # make the report again from the records",
    "fedms export runs/sentiment/fedms-seed0 --out model",
    "fedms predict model new.csv --client 7"),
)

Source = Annotated[str, typer.Argument(
    metavar="SOURCE", help=f"A run file (TOML) or a built-in one: {', '.join(builtin_names())}.")]
Sets = Annotated[Optional[list[str]], typer.Option(
    "--set", "-s", metavar="TABLE.KEY=VALUE",
    help="Override one key of the run file; may be repeated. The value is TOML, other text is taken as a string, "
         "and none unsets an optional key.")]
Force = Annotated[bool, typer.Option("--force", help="Replace earlier runs in the output folder.")]
Track = Annotated[Optional[list[str]], typer.Option(
    "--track", metavar="NAME", help="Send the records to a tracker too: tensorboard, wandb or mlflow; may be repeated.")]
Jobs = Annotated[int, typer.Option(
    "--jobs", "-j", metavar="N", min=1, help="Runs at a time, each in a process of its own with run.threads threads.")]
Trust = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run the Python code that comes with the foundation model, where it needs some. Whoever "
    "wrote it can do here whatever you can.")]
Resume = Annotated[bool, typer.Option(
    "--resume", help="Go on where an earlier call with the same settings was stopped or killed.")]


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"fedms {metadata.version('fedms')}")
        raise typer.Exit


@app.callback()
def fedms(version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and end.")] = False) -> None:
    """Federated fine-tuning of a frozen foundation model in two stages: a global LoRA expert, then a private local
    expert for each client and a gate that mixes the two, with LoRA activated block by block as it is needed."""


@app.command(epilog=_epilog(
    "fedms run sentiment",
    "fedms run sentiment --method fedavg --seed 1",
    "fedms run sentiment --set stage1.rounds=12 --set data.partition=dirichlet --out runs/skewed",
    "fedms run my.toml --dry-run  # check a run file and print it with every default filled in",
    notes=["The output folder holds config.toml, data.json, rounds.jsonl, visits.jsonl, clients.jsonl, summary.json and "
           "report.html."]))
def run(
    source: Source,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="DIR", help="Run folder.", show_default="runs/SOURCE/METHOD-seedN")] = None,
    method: Annotated[Optional[str], typer.Option(
        "--method", "-m", metavar="NAME", help=f"Same as --set run.method=NAME: {', '.join(METHODS)}.")] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", metavar="N", help="Same as --set run.seed=N.")] = None,
    engine: Annotated[Optional[str], typer.Option(
        "--engine", metavar="NAME", help="Same as --set run.engine=NAME: local (all clients in this process), "
        "flower-sim (Flower's simulation), flower (the deployment whose run.toml SOURCE is).")] = None,
    force: Force = False,
    resume: Resume = False,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Check the configuration, print it with all defaults, and stop.")] = False,
) -> None:
    """Carry out one run and report on it."""
    with _exit_codes():
        overrides = list(set_ or [])
        overrides += [f"run.{key}={value}" for key, value in
                      {"method": method, "seed": seed, "engine": engine}.items() if value is not None]
        config = load_config(source, overrides)
        if dry_run:
            console.print(dump_toml(config), end="", markup=False, soft_wrap=True)
            return
        _carry_out(config, source, out, force, resume, track, overrides)


def _carry_out(config: RunConfig, source: str, out: Optional[Path], force: bool, resume: bool,
               track: Optional[list[str]], overrides: list[str]) -> None:
    out = out or Path("runs") / source_name(source) / f"{config.run.method}-seed{config.run.seed}"
    _refuse_filled([out], force, resume)
    if config.run.engine == "flower":
        _run_deployed(source, overrides, out, force, resume)
    else:
        from fedms.runs import run as runner

        with _progress(out, track) as progress, _polite_stop() as stop:
            runner.run(config, out, overwrite=force, resume=resume, progress=progress, stop=stop)
    _show_results(out)


@app.command(epilog=_epilog(
    "fedms compare sentiment                               # all methods, the run file's seed",
    "fedms compare sentiment --methods fedms,fedavg_ft,local --seeds 3 --jobs 2 --out runs/demo",
    "fedms compare sentiment --tuned runs/sentiment-tuned  # each method with what `fedms tune` chose for it",
    notes=["The same command again leaves runs alone that have ended, goes on with those that were stopped, and "
           "begins what is missing; a run of other settings in OUT is refused.",
           "OUT holds one run folder METHOD-seedN for each run, compare.csv (a line a run), compare.md and "
           "report.html."]))
def compare(
    source: Source,
    methods: Annotated[str, typer.Option(
        "--methods", "-m", metavar="A,B|all", help=f"Methods to run: {', '.join(METHODS)}.")] = "all",
    seeds: Annotated[Optional[str], typer.Option(
        "--seeds", metavar="N|A,B", help="A number of seeds (3 means 0, 1, 2) or a list (0,7).",
        show_default="the run file's seed")] = None,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="DIR", help="Folder of the runs.", show_default="runs/SOURCE")] = None,
    jobs: Jobs = 1,
    tuned: Annotated[Optional[Path], typer.Option(
        "--tuned", metavar="DIR", help="Folder with the choices of fedms tune, METHOD.toml.")] = None,
    force: Force = False,
    track: Track = None,
) -> None:
    """Run several methods on the same clients and seeds, and show them in one table."""
    with _exit_codes():
        config = load_config(source, set_ or [])
        if config.run.engine == "flower":
            raise ConfigError("run.engine: a deployment carries out one run at a time; use fedms run, or another engine")
        numbers = _seed_list(seeds, config)
        out = out or Path("runs") / source_name(source)
        if track and jobs > 1:
            raise ConfigError("--track: follows one run at a time; leave out --jobs")

        from fedms.runs import run as runner
        from fedms.runs import tune as tuning

        chosen = _fitting_methods(config, methods, runner.with_run)
        settings = tuning.chosen(tuned, config) if tuned else {}
        with _progress(out, track) as progress, _polite_stop() as stop:
            runner.compare(config, chosen, numbers, out, overwrite=force, jobs=jobs, progress=progress, stop=stop,
                           settings=settings)
        _show_results(out)


@app.command(epilog=_epilog(
    "fedms tune sentiment --jobs 2 --out runs/sentiment-tuned",
    "fedms compare sentiment --tuned runs/sentiment-tuned",
    notes=["The first trial is the run file as it stands, the others are spread evenly over the ranges. No test "
           "label is read. The same command again goes on where it was stopped."]))
def tune(
    source: Source,
    methods: Annotated[str, typer.Option(
        "--methods", "-m", metavar="A,B|all", help=f"Methods to tune: {', '.join(METHODS)}.")] = "all",
    trials: Annotated[int, typer.Option("--trials", metavar="N", min=1, help="Trials of each method.")] = 8,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="DIR", help="Folder of the choices, METHOD.toml, and of the trials.",
        show_default="runs/SOURCE-tuned")] = None,
    jobs: Jobs = 1,
    force: Force = False,
) -> None:
    """Try constants of each method on validation data, the same number of trials for all, at a quarter of the rounds."""
    with _exit_codes():
        config = load_config(source, set_ or [])
        out = out or Path("runs") / f"{source_name(source)}-tuned"

        from fedms.runs import run as runner
        from fedms.runs import tune as tuning

        chosen = _fitting_methods(config, methods, runner.with_run)
        with _progress(out, None) as progress, _polite_stop() as stop:
            found = tuning.tune(config, chosen, out, count=trials, jobs=jobs, overwrite=force, progress=progress, stop=stop)
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
        for title in ("method", "as it was\nvalidation %", "best\nvalidation %", "trial", "chosen"):
            table.add_column(title, justify="left" if title in ("method", "chosen") else "right", vertical="bottom")
        for name in chosen:
            own = [trial for trial in found if trial.method == name]
            best = min(own, key=lambda trial: trial.rank)
            table.add_row(name, *(f"{100 * t.score:.1f}" if t.score is not None else "–" for t in (own[0], best)),
                          str(best.number), ", ".join(f"{key}={value:g}" for key, value in best.values.items()))
        console.print(table)
        console.print(f"\nchoices: {out}/METHOD.toml; use them by fedms compare {source} --tuned {out}", markup=False,
                      soft_wrap=True)


@app.command(epilog=_epilog(
    "fedms plan sentiment --memory 512MiB",
    "fedms plan my.toml --memory 1GiB --flops 5G --bandwidth 1MB --out plan.png",
    notes=["Nothing is trained: memory is traced on two samples, operations and bytes are counted."]))
def plan(
    source: Source,
    memory: Annotated[Optional[str], typer.Option(
        "--memory", metavar="SIZE", help="Memory for training, beside the process and the data, such as 512MiB.",
        show_default="no limit")] = None,
    flops: Annotated[Optional[str], typer.Option(
        "--flops", metavar="RATE", help="The device's operations a second, such as 5G.",
        show_default="this machine's, measured")] = None,
    bandwidth: Annotated[Optional[str], typer.Option(
        "--bandwidth", metavar="RATE", help="Bytes a second of its link, up and down, such as 1MB.",
        show_default="transfers take no time")] = None,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="FILE", help="Draw the plan into this file: .png, .svg or .pdf.")] = None,
) -> None:
    """Show what each depth costs on a client's device, and which settings fit its memory."""
    with _exit_codes():
        limits = {name: _amount(f"--{name}", text) for name, text in
                  {"memory": memory, "flops": flops, "bandwidth": bandwidth}.items() if text is not None}
        if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--out: got {str(out)!r}; accepted: a file that ends in .png, .svg or .pdf")
        config = load_config(source, set_ or [])

        from fedms.runs import plan as planning

        progress = TerminalProgress(errors)
        found = planning.plan(config, **limits, progress=progress)
        _show_plan(found)
        if out is not None:
            planning.picture(found, out)
            console.print(f"picture: {out}", markup=False, soft_wrap=True)
        if found.chosen is None:
            raise typer.Exit(FAILED)


@app.command(epilog=_epilog(
    "fedms pretrain vit-fashion                # about three minutes on one core, once",
    "fedms pretrain vit-fashion --data FOLDER  # where apt-get cannot fetch Fashion-MNIST",
    notes=["The weights are kept in the cache folder ($FEDMS_CACHE, ~/.cache/fedms), under a hash of all "
           "settings."]))
def pretrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{' or '.join(PRETRAINED)}.")],
    data: Annotated[Optional[str], typer.Option(
        "--data", metavar="PATH", help="The data, as the run file's data.path.", show_default="fetched, cached")] = None,
    force: Annotated[bool, typer.Option("--force", help="Train again even if the weights are there.")] = False,
) -> None:
    """Train a small vision model on the public half of its data, without labels. Clients hold the other half."""
    with _exit_codes():
        if model not in PRETRAINED:
            raise ConfigError(f"MODEL: got {model!r}; accepted: {', '.join(PRETRAINED)}")

        from fedms.models import pretrain as pretraining

        with _bar(f"pretraining {model}") as advance:
            file, made = pretraining.ensure(model, data, force=force, report=advance)
        console.print(f"{file}" + ("" if made else ": there already; --force trains again"), markup=False, soft_wrap=True)


@app.command(epilog=_epilog())
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or a folder of run folders.")],
) -> None:
    """Write DIR/report.html from the records on disk: one file, with pictures, that opens anywhere."""
    with _exit_codes():
        _show_results(folder)


@app.command(epilog=_epilog(
    "fedms watch runs/sentiment    # from another terminal, while `fedms compare sentiment` works there",
    "fedms watch runs/demo --once  # where it stands, and back to the prompt"))
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or a folder of run folders.")],
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Time between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the state once and end.")] = False,
) -> None:
    """Follow runs live: where each stands, its loss and accuracy. Ends when nothing runs any more, or by Ctrl-C."""
    with _exit_codes():
        from rich.live import Live

        from fedms.report import watch as watching

        states = watching.read_states(folder)
        if once or not console.is_terminal:
            console.print(watching.view(states))
            return
        with Live(watching.view(states), console=console, auto_refresh=False) as live:
            while not watching.over(states):
                time.sleep(every)
                states = watching.read_states(folder)
                live.update(watching.view(states), refresh=True)


@app.command(epilog=_epilog(
    "fedms export runs/sentiment/fedms-seed0 --out sentiment-model                    # everything, for `fedms predict` and `fedms.load`",
    "fedms export runs/sentiment/fedms-seed0 --out adapters --format peft             # an adapter for PEFT for each expert",
    "fedms export runs/sentiment/fedms-seed0 --out merged --format merged --client 7  # client 7's expert in the weights",
    notes=["Formats: mixture (all experts, the gate and the model), peft (a folder an expert, and its head), "
           "merged (one expert added into the weights), onnx (the same, one file from inputs to logits)."]))
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", "-f", metavar="NAME", help="mixture, peft, merged or onnx.")] = "mixture",
    client: Annotated[Optional[str], typer.Option(
        "--client", "-c", metavar="ID", help="For merged and onnx: the client whose own expert is written.",
        show_default="the global expert")] = None,
    states: Annotated[Optional[Path], typer.Option(
        "--states", metavar="STATES", help="For a run on Flower: the folder where a client keeps its private expert "
        "(state= of its node), or one with those of several clients (a deployment's states/).",
        show_default="a simulation's own")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write what a run ended with in a format that others read."""
    with _exit_codes():
        if not folder.is_dir():
            raise RunFolderError(f"{folder}: no such folder")
        from fedms import export as exporting

        exporting.export(folder, out, form, client=client, states=states, overwrite=force,
                         progress=TerminalProgress(errors), trust_remote_code=trust_remote_code)
        for path in sorted(p for p in out.rglob("*") if p.is_file()):
            console.print(f"{path}  {path.stat().st_size:,} bytes", markup=False, soft_wrap=True)


@app.command(epilog=_epilog(
    "fedms predict sentiment-model new.csv --client 7 --out predicted.csv",
    "fedms predict photo-model photos/ --client plant2  # a folder of images; the table goes to the terminal",
    notes=["The table: the text or image, label, its probability, and the gate's weight of the client's own "
           "expert."]))
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What fedms export wrote in the format mixture.")],
    source: Annotated[str, typer.Argument(metavar="FILE", help="A table (.csv, .tsv, .parquet, .jsonl), an image, or a "
                                          "folder of either.")],
    client: Annotated[Optional[str], typer.Option(
        "--client", "-c", metavar="ID", help="Id of the client that predicts, or its group's name.",
        show_default="the global expert")] = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="FILE", help="Table to write: .csv or .parquet.", show_default="CSV to the terminal")] = None,
    text: Annotated[Optional[str], typer.Option("--text", metavar="NAME", help="Column of texts.",
                                                show_default="as in the run")] = None,
    image: Annotated[Optional[str], typer.Option("--image", metavar="NAME", help="Column of images.",
                                                 show_default="as in the run")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Predict with an exported mixture, as one of its clients."""
    with _exit_codes():
        if out is not None and out.suffix not in (".csv", ".parquet"):
            raise ConfigError(f"--out: got {str(out)!r}; accepted: a file that ends in .csv or .parquet")
        from fedms.export import mixture

        loaded = mixture.load(folder, client, trust_remote_code=trust_remote_code)
        table = loaded.predict_file(source, {"text": text, "image": image})
        if out is None:
            print(table.to_csv(index=False), end="")
        else:
            mixture.write_table(table, out)
            console.print(f"{len(table)} predictions: {out}", markup=False, soft_wrap=True)


@app.command("import-peft", epilog=_epilog(
    "fedms import-peft my-adapter my.toml --out runs/from-adapter",
    notes=["[lora] rank, alpha and rslora become the adapter's, stage1.rounds 0. A head beside the adapter "
           "(head.safetensors, or a classifier or score layer in it) is taken if its shape fits."]))
def import_peft(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder in PEFT's format.")],
    source: Source,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="DIR", help="Run folder.", show_default="runs/SOURCE/METHOD-seedN")] = None,
    force: Force = False,
    resume: Resume = False,
    track: Track = None,
) -> None:
    """Start stage 2 from an adapter that was trained elsewhere: it is the global expert, and stays as it is."""
    with _exit_codes():
        from fedms.models.peft_format import read_shape

        shape = read_shape(adapter)
        overrides = [
            *(set_ or []), f"lora.start={json.dumps(str(adapter))}", f"lora.rank={shape.rank}", f"lora.alpha={shape.alpha}",
            f"lora.rslora={str(shape.rslora).lower()}", "stage1.rounds=0"]
        _carry_out(load_config(source, overrides), source, out, force, resume, track, overrides)


flower = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Clients on machines of their own: write, "
                     "start and end a Flower deployment. `flwr` itself runs and shows runs; docs/guide/deploy.md has every step.")
app.add_typer(flower, name="flower")
Deployment = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
Port = Annotated[Optional[int], typer.Option(
    "--port", metavar="N", min=1024, max=65000, help="The SuperLink's port; SuperNodes on the same machine take the next ones.",
    show_default="19091, or as at init")]


@flower.command("init", epilog=_epilog(
    "fedms flower init dep digits --set clients.count=3",
    notes=["DIR gets the Flower app, run.toml, and a data folder for the server and for each client, to be "
           "carried to its machine: nothing else of the data leaves this one."]))
def flower_init(
    folder: Deployment,
    source: Source,
    set_: Sets = None,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="The SuperLink's machine, by name or address, as "
                                      "its clients reach it.")] = "127.0.0.1",
    port: Port = None,
) -> None:
    """Write a deployment's folder: the Flower app, the run file, certificates, and each client's own data."""
    with _exit_codes():
        config = load_config(source, [*(set_ or []), "run.engine=flower"])
        if folder.exists() and any(folder.iterdir()):
            raise RunFolderError(f"{folder}: exists and is not empty; choose another folder")
        deployment = _deployment()

        from fedms.runs.experiment import write_shards

        progress = TerminalProgress(errors)
        config = write_shards(config, folder / "data", progress)
        deployment.write_app(folder, dump_toml(config), host, port)
        console.print(f"{folder}: the app, run.toml, certificates for {host}, and data and keys of the server and "
                      f"{config.clients.count} clients", markup=False, soft_wrap=True)
        if host == deployment.HOST:
            console.print(f"start it all on this machine:  fedms flower up {folder}", markup=False, soft_wrap=True)
        else:
            _show_commands(deployment.Commands(folder, host, port))


@flower.command("up", epilog=_epilog())
def flower_up(
    folder: Deployment,
    port: Port = None,
    insecure: Annotated[bool, typer.Option(
        "--insecure", help="No TLS and no authentication. For trials on this machine alone.")] = False,
) -> None:
    """Start a SuperLink and a SuperNode for each client on this machine, and print the commands for several machines."""
    with _exit_codes():
        deployment = _deployment()
        commands = deployment.up(folder, port, not insecure, lambda text: errors.print(f"{text} ...", markup=False))
        console.print(f"up, on {deployment.HOST} alone: a SuperLink and {len(deployment.clients_of(folder))} SuperNodes, "
                      + ("with TLS and SuperNode authentication" if not insecure else "nothing encrypted, and any process "
                         "here may join: for trials only") + f"; their logs are in {folder}/flower", markup=False,
                      soft_wrap=True)
        console.print(f"\nrun it:      fedms run {folder}/run.toml --engine flower\n"
                      f"see it:      FLWR_HOME={folder.absolute()}/flower flwr list fedms\n"
                      f"end it all:  fedms flower down {folder}", markup=False, soft_wrap=True)
        if not insecure:
            _show_commands(commands)


def _show_commands(commands: Any) -> None:
    console.print("\non separate machines, each with the files that its command names (docs/guide/deploy.md):", markup=False)
    for line in (commands.superlink("0.0.0.0"), commands.register(0), commands.supernode(0)):
        console.print(f"  {shlex.join(line)}", markup=False, soft_wrap=True)


@flower.command("down", epilog=_epilog())
def flower_down(folder: Deployment) -> None:
    """End what `fedms flower up` started, by the process ids that it noted."""
    with _exit_codes():
        ended = _deployment().down(folder.absolute())
        console.print(f"ended: {', '.join(ended) or 'nothing was running'}", markup=False)


def _deployment() -> Any:
    try:
        from fedms.engines.flower import deployment
    except ModuleNotFoundError as error:
        raise ConfigError(f"fedms flower needs {error.name}, which is not installed: pip install 'fedms[flower]'") from None
    return deployment


def _run_deployed(source: str, overrides: list[str], out: Path, force: bool, resume: bool) -> None:
    folder = Path(source).absolute().parent
    deployment = _deployment()
    deployment.clients_of(folder)
    if "superlink" not in deployment.running(folder):
        raise deployment.DeploymentError(f"{folder}: is not up; start it by `fedms flower up {folder}`, or run it by "
                                         "`flwr run` where it runs on other machines")
    settings = {"out": str(out.absolute()), "set": json.dumps([o for o in overrides if not o.startswith("run.engine=")]),
                "force": force, "resume": resume}
    code = deployment.submit(folder, settings)
    if code or not (out / "summary.json").is_file():
        raise deployment.DeploymentError(f"the run did not end well; its log is above, and in {folder}/flower; go on by "
                                         "--resume")


@app.command(epilog=_epilog(
    "fedms doctor                                    # is everything here that a run needs?",
    "fedms doctor sentiment --set model.frozen=int8  # and who computes the products of that run's training step?",
    notes=["There `cpu`, `triton` and `cuda` are the kernels of fedms, `eager` its layers by way of PyTorch's "
           "operators, and `pytorch` what lies outside of them, or has no experts applied."]))
def doctor(
    source: Annotated[Optional[str], typer.Argument(
        metavar="[SOURCE]", help="A run file (TOML) or a built-in one, to see which backend serves its model's shapes.",
        show_default=False)] = None,
    set_: Sets = None,
) -> None:
    """Check what a run needs: versions, CPU and kernels, cache folder, model and data."""
    with _exit_codes():
        if source is None and set_:
            raise ConfigError("--set: nothing to override; name a run file, as in `fedms doctor sentiment --set ...`")
        config = None if source is None else load_config(source, set_ or [])

        from fedms.doctor import diagnose, served

        marks = {"ok": "green", "note": "yellow", "problem": "bold red"}
        checks = []
        for check in diagnose(None if source is None else Path(source)):
            _paragraph(f"{check.state:<8}{check.name:<28}", check.text, marks[check.state])
            checks.append(check)
        if config is not None:
            progress = TerminalProgress(errors)
            try:
                counted = served(config, progress)
            finally:
                progress.close()
            _show_served(counted)
        if problems := [c for c in checks if c.state == "problem"]:
            errors.print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}: "
                         + ", ".join(c.name for c in problems), markup=False)
            raise typer.Exit(FAILED)


def main() -> None:
    """Entry point of the ``fedms`` command."""
    accept_any_text()
    app()


# Arguments

def _fitting_methods(config: RunConfig, text: str, with_run: Any) -> list[str]:
    """The methods that are asked for; of `all`, those that fit the run file."""
    chosen = _method_list(text)
    if text.strip() != "all":
        return chosen
    fitting = []
    for name in chosen:
        try:
            with_run(config, method=name)
            fitting.append(name)
        except ConfigError as error:
            errors.print(f"note: {name} is left out: {error.problems[0]}", markup=False, soft_wrap=True)
    return fitting


def _method_list(text: str) -> list[str]:
    if text.strip() == "all":
        return list(METHODS)
    chosen = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in chosen if name not in METHODS]:
        raise ConfigError(f"--methods: unknown method {unknown[0]!r}; accepted: all, or a list of {', '.join(METHODS)}")
    if not chosen:
        raise ConfigError(f"--methods: names no method; accepted: all, or a list of {', '.join(METHODS)}")
    return chosen


def _seed_list(text: Optional[str], config: RunConfig) -> list[int]:
    if text is None:
        return [config.run.seed]
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," not in text and numbers:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**32:
        raise ConfigError(f"--seeds: got {text!r}; accepted: a number of seeds (3 means 0, 1, 2), or a list such as "
                          "0,7 of integers from 0 to 4294967295")
    return list(dict.fromkeys(numbers))


def _amount(option: str, text: str) -> int:
    """A number of bytes, or of bytes or operations a second: 512MiB, 5G, 5GFLOPS, 1MB/s."""
    try:
        amount = parse_size(re.sub(r"(?i)(flop|b)?s?(/s)?$", "", text.strip()))
    except ValueError:
        amount = 0
    if amount <= 0:
        raise ConfigError(f"{option}: got {text!r}; accepted: a number above 0, with k, M, G, T (thousands) or Ki, Mi, "
                          "Gi, Ti (1024s)")
    return amount


def _refuse_filled(folders: list[Path], force: bool, resume: bool) -> None:
    # Asked before the model is loaded; the writer of the records asks again.
    if force and resume:
        raise ConfigError("--force starts again and --resume goes on: give one of them")
    for folder in folders:
        if not (force or resume) and folder.is_dir() and any(folder.iterdir()):
            raise RunFolderError(f"{folder}: exists and is not empty; go on with the run by --resume, replace it by "
                                 "--force, or choose another --out")


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)     # Ctrl-C, kill, and a terminal that is closed


class _Stop:
    """Asks a run to stop between two clients; asked a second time, it stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __call__(self) -> bool:
        return self.requested

    def on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        errors.print("\nstopping after this client; once more stops at once", markup=False)

    def _leave_terminal(self) -> None:
        """What is still written to a closed terminal would be an error, and end the run before its checkpoint."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def _polite_stop() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in _STOPPING
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}     # nohup ignores it
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Output

@contextlib.contextmanager
def _progress(out: Path, track: Optional[list[str]]) -> Iterator[Progress]:
    progress: Progress = TerminalProgress(errors)
    if track:
        from fedms.report.trackers import Tracking

        progress = Listeners(progress, Tracking(out, track, progress.note))
    try:
        yield progress
    except BaseException as error:
        progress.close()
        if out.is_dir() and (isinstance(error, KeyboardInterrupt) or _name(error) in _RESUMABLE):
            words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
            words += [] if words[:1] in (["compare"], ["tune"]) else ["--resume"]     # those go on by themselves
            errors.print(f"\nfedms report {out} shows what was recorded so far; go on with\n"
                         f"  {shlex.join(['fedms', *words])}", markup=False, soft_wrap=True)
        raise
    finally:
        progress.close()


def _line(text: str) -> None:
    errors.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar over steps; yields what is called with (step, steps, loss)."""
    from rich.progress import BarColumn, Progress as Bar, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True),
             TextColumn("{task.fields[loss]}"), console=errors, transient=True) as bar:
        task = bar.add_task(title, total=None, loss="")
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=f"loss {loss:.3f}")


def _paragraph(mark: str, text: str, style: str = "") -> None:
    """A mark and a text; in a terminal the text is wrapped beside the mark."""
    line = Table.grid()
    line.add_column(style=style, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(mark), Text(text))
    console.print(line)


def _show_results(folder: Path) -> None:
    from fedms import report as reports

    runs, notes = reports.read_runs(folder)
    comparison = reports.comparison(runs)
    header, rows = reports.table(comparison, width=console.width)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == "fedms" and len(rows) > 2 else None)
    console.print()
    console.print(table)
    if left_out := len(reports.table(comparison)[0]) - len(header):
        console.print(f"{left_out} more column{'s' if left_out > 1 else ''} in the report", style="dim")
    console.print()
    console.print(reports.headline(runs), markup=False)
    for finding in reports.findings(runs, notes):
        mark, style = {"good": ("+ ", "green"), "bad": ("! ", "red"), "plain": ("- ", "")}[finding["kind"]]
        _paragraph(mark, finding["text"], style)
    console.print()
    if runs[0].path != folder:
        for path in reports.write_comparison(folder):
            console.print(f"table:  {path}", markup=False, soft_wrap=True)
    console.print(f"report: {reports.write_report(folder)}", markup=False, soft_wrap=True)


def _show_served(counted: Any) -> None:
    """A line for each backend, and below it what it was given, the largest first."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("served by", "product (rows; K -> N, rank)", "calls", "GFLOP", "share"):
        table.add_column(title, justify="left" if title.startswith(("served", "product")) else "right")
    total = sum(counted.flops.values())
    for name, (calls, flops) in counted.backends().items():
        table.add_row(name, "all", str(calls), f"{flops / 1e9:.3g}", f"{100 * flops / total:.1f} %", style="bold")
        for (server, product), part in counted.flops.most_common():
            if server == name:
                table.add_row("", str(product), str(counted.calls[server, product]), f"{part / 1e9:.3g}",
                              f"{100 * part / total:.1f} %")
    console.print("\none training step of the first client, with the prefix of its samples and the validation of one",
                  markup=False)
    console.print(table)


def _show_plan(found: Any) -> None:
    from fedms.report import duration, size

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("depth", "frozen", "cache", "micro-\nbatch", "trained", "trained\n%", "GFLOP\na round", "peak\nmemory",
                  "up", "down", "time\na round", "fits"):
        table.add_column(title, justify="left" if title in ("frozen", "cache", "fits") else "right", vertical="bottom",
                         no_wrap=True)
    for o in found.options:
        table.add_row(str(o.depth), o.frozen, o.cache, str(o.micro_batch), f"{o.work.trained_params:,}",
                      f"{o.trained_percent:.2f}", f"{o.work.flops / 1e9:.1f}", f"{o.peak / 2**20:.0f} MiB",
                      size(o.work.bytes_up), size(o.work.bytes_down), duration(o.seconds),
                      "yes" if found.fits(o) else "no", style="bold" if o is found.chosen else None)
    console.print(table)
    console.print()
    speeds = ", ".join(f"{speed / 1e9:.1f} GFLOP/s with {name} weights" for name, speed in found.speed.items())
    _paragraph("- ", f"A round of stage 1 on the client with the most training data, at {speeds}"
               + ("." if found.bandwidth is None else f", {size(found.bandwidth)} a second."))
    shown = found.chosen or found.options[0]
    _paragraph("- ", f"Memory at depth {shown.depth}: " + ", ".join(
        f"{part} {amount / 2**20:.0f} MiB" for part, amount in shown.memory.items()) + ".")
    _paragraph("- ", f"The process around it (Python, its libraries, the data) takes {found.process / 2**20:.0f} MiB "
               "here, which the limit does not count.")
    _paragraph("- ", f"The first round also builds the constants: {shown.work.building_flops / 1e9:.1f} GFLOP.")
    console.print()
    if found.chosen is None:
        least = min(found.options, key=lambda o: o.peak)
        errors.print(f"nothing fits in {found.limit / 2**20:.0f} MiB: the least, at depth {least.depth}, is "
                     f"{least.peak / 2**20:.0f} MiB and a twentieth to spare", markup=False, soft_wrap=True)
        return
    console.print("put into the run file:" if found.limit is not None else "settings:", markup=False)
    tables: dict[str, list[str]] = {}
    for key, value in found.settings.items():
        name, _, entry = key.partition(".")
        tables.setdefault(name, []).append(f'{entry} = "{value}"' if isinstance(value, str) else f"{entry} = {value}")
    for name, lines in tables.items():
        console.print(f"[{name}]", *lines, sep="\n", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn an error into one readable block and the exit code that the help documents."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if _name(error) == "Interrupted":
            errors.print(f"stopped: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        code, title = _classify(error)
        if os.environ.get("FEDMS_DEBUG") == "1":
            traceback.print_exc()
        errors.print(title, style="bold red", markup=False)
        for line in str(error).split("\n"):
            errors.print(f"  {printable(line, LONGEST_NOTE)}", markup=False, soft_wrap=True)
        if code == FAILED and not isinstance(error, ModuleNotFoundError):
            errors.print("FEDMS_DEBUG=1 shows where it happened.")
        raise typer.Exit(code) from None


# By name: their modules import torch, which an error may well come before.
_RESUMABLE = ("Interrupted", "CheckpointError", "RunFolderError", "WorkerDied")


def _name(error: BaseException) -> str:
    return type(error).__name__


def _classify(error: Exception) -> tuple[int, str]:
    if isinstance(error, ConfigError):
        problems = len(error.problems)
        return USAGE, "configuration: 1 problem" if problems == 1 else f"configuration: {problems} problems"
    if isinstance(error, RunFolderError) or _name(error) == "CheckpointError":
        return FOLDER, "run folder"
    if isinstance(error, ModuleNotFoundError):
        return FAILED, "a package is missing: pip install 'fedms[train]'"
    if _name(error) == "DeploymentError":
        return FAILED, "deployment"
    loaded: Any = sys.modules.get("fedms.data")
    if loaded is not None and isinstance(error, loaded.DataError):
        return UNAVAILABLE, "data"
    loaded = sys.modules.get("fedms.models")
    if loaded is not None and isinstance(error, loaded.ModelError):
        return UNAVAILABLE, "model"
    return FAILED, f"the run failed: {type(error).__name__}"
