"""`fedms run` and `fedms import-peft`: one run."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedms.config import ConfigError, RunConfig, dump_toml, source_name

from .command import EXPORT, START, command
from .options import Device, Force, Method, Resume, RunOut, Sets, Source, Track, check_free, read_source
from .stopping import polite_stop, resume_hint
from .terminal import console, run_progress, show_results


@command(
    START,
    "fedms run sentiment",
    "fedms run sentiment --method fedavg --seed 1",
    "fedms run sentiment --set data.partition=dirichlet --out runs/skewed",
    "fedms run my-run.toml --dry-run  # check a run file and print it with every default filled in",
    notes=["The output folder holds config.toml, data.json, rounds.jsonl, visits.jsonl, clients.jsonl, summary.json, "
           "report.html, and what was trained: `fedms export` reads it."])
def run(
    source: Source,
    set_: Sets = None,
    out: RunOut = None,
    method: Method = None,
    seed: Annotated[Optional[int], typer.Option("--seed", metavar="N", help="Same as --set run.seed=N.")] = None,
    engine: Annotated[Optional[str], typer.Option(
        "--engine", metavar="NAME", help="Same as --set run.engine=NAME: local (all clients in this process), "
        "flower-sim (Flower's simulation).")] = None,
    device: Device = None,
    force: Force = False,
    resume: Resume = False,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Check the configuration, print it with all defaults, and stop.")] = False,
) -> None:
    """Train with one method and one seed, evaluate every client, and write a report.

    What was found in the data (samples, classes, clients, what was left out) is printed before training begins.
    """
    overrides = list(set_ or [])
    overrides += [f"run.{key}={value}" for key, value in
                  {"method": method, "seed": seed, "engine": engine, "device": device}.items() if value is not None]
    config = read_source(source, overrides)
    if dry_run:
        console.print(dump_toml(config), end="", markup=False, soft_wrap=True)
        return
    carry_out(config, source, out, force, resume, track)


@command(
    EXPORT,
    "fedms import-peft my-adapter my-run.toml --out runs/from-adapter",
    notes=["[lora] rank, alpha and rslora become the adapter's, stage1.rounds 0. A head beside the adapter "
           "(head.safetensors, or a classifier or score layer in it) is taken if its shape fits."],
    name="import-peft")
def import_peft(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder in PEFT's format.")],
    source: Source,
    set_: Sets = None,
    out: RunOut = None,
    force: Force = False,
    resume: Resume = False,
    track: Track = None,
) -> None:
    """Start stage 2 from an adapter that was trained elsewhere: it becomes the global expert, and is not trained further."""
    from fedms.models.peft_format import read_shape

    shape = read_shape(adapter)
    overrides = [
        *(set_ or []), f"lora.start={json.dumps(str(adapter))}", f"lora.rank={shape.rank}", f"lora.alpha={shape.alpha}",
        f"lora.rslora={str(shape.rslora).lower()}", "stage1.rounds=0"]
    carry_out(read_source(source, overrides), source, out, force, resume, track)


def carry_out(config: RunConfig, source: str, out: Optional[Path], force: bool, resume: bool,
              track: Optional[list[str]]) -> None:
    """Carry out one run on its engine, and show its results.

    Args:
        source: The run file as it was named.
        out: Run folder, or None for the usual one.

    Raises:
        FedMSError: Whatever the run raises.
    """
    out = out or Path("runs") / source_name(source) / f"{config.run.method}-seed{config.run.seed}"
    check_free(out, force, resume)
    if config.run.engine == "flower":
        raise ConfigError("run.engine: clients on machines of their own are served by `fedms server start DIR`, whose folder "
                          "`fedms server init` makes")
    from fedms.runs import run as runs

    with resume_hint(out), run_progress(out, track) as progress, polite_stop() as stop:
        runs.run(config, out, overwrite=force, resume=resume, progress=progress, stop=stop)
    show_results(out)
