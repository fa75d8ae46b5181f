"""`fedms compare` and `fedms tune`: many runs."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fedms.config import ConfigError, source_name

from .command import COMPARE, command
from .options import (Device, Force, Jobs, Methods, Sets, Source, Track, fitting_methods, on_device, read_source,
                      seed_list)
from .stopping import polite_stop, resume_hint
from .terminal import console, plain_table, run_progress, show, show_results

if TYPE_CHECKING:
    from fedms.runs.tune import Trial


@command(
    COMPARE,
    "fedms compare sentiment                               # all methods, the run file's seed",
    "fedms compare sentiment --methods local,fedavg,fedms --seeds 3 --jobs 2",
    "fedms compare sentiment --tuned runs/sentiment-tuned  # each method with what `fedms tune` chose for it",
    notes=["The same command again leaves finished runs alone, continues stopped ones, and begins missing ones. It refuses a run of "
           "other settings in OUT.",
           "OUT holds one run folder METHOD-seedN for each run, compare.csv (a line for each run), compare.md and "
           "report.html."])
def compare(
    source: Source,
    methods: Methods = "all",
    seeds: Annotated[Optional[str], typer.Option(
        "--seeds", metavar="N|A,B", help="A number of seeds (3 means 0, 1, 2) or a list (0,7).",
        show_default="the run file's seed")] = None,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="DIR", help="Folder of the runs.", show_default="runs/SOURCE")] = None,
    device: Device = None,
    jobs: Jobs = 1,
    tuned: Annotated[Optional[Path], typer.Option(
        "--tuned", metavar="DIR", help="Folder with the choices of fedms tune, METHOD.toml.")] = None,
    share: Annotated[bool, typer.Option(
        "--share/--no-share", help="Visits that several runs have in common are made by one of them. Records are the same but for times "
        "and memory, which the others take over from it.")] = True,
    force: Force = False,
    track: Track = None,
) -> None:
    """Run several methods on the same clients and seeds, and show them in one table with tests of significance."""
    config = read_source(source, on_device(set_, device))
    if config.run.engine == "flower":
        raise ConfigError("run.engine: a server carries out one run (fedms server start); choose another engine")
    numbers = seed_list(seeds, config)
    out = out or Path("runs") / source_name(source)
    if track and jobs > 1:
        raise ConfigError("--track: follows one run at a time; leave out --jobs")
    chosen = fitting_methods(config, methods)

    from fedms.runs import batch, tune as tuning

    settings = tuning.chosen(tuned, config) if tuned else {}
    with resume_hint(out), run_progress(out, track) as progress, polite_stop() as stop:
        batch.compare(config, chosen, numbers, out, overwrite=force, jobs=jobs, progress=progress, stop=stop,
                      settings=settings, share=share)
    show_results(out)


@command(
    COMPARE,
    "fedms tune sentiment --jobs 2 --out runs/sentiment-tuned",
    "fedms compare sentiment --tuned runs/sentiment-tuned",
    notes=["The first trial is the run file as it stands, the others are spread evenly over the ranges. No test "
           "label is read. The same command again goes on where it was stopped."])
def tune(
    source: Source,
    methods: Methods = "all",
    trials: Annotated[int, typer.Option("--trials", metavar="N", min=1, help="Trials of each method.")] = 8,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="DIR", help="Folder of the choices, METHOD.toml, and of the trials.",
        show_default="runs/SOURCE-tuned")] = None,
    device: Device = None,
    jobs: Jobs = 1,
    force: Force = False,
) -> None:
    """Try hyperparameters of each method on validation data: the same number of trials for all, at a quarter of the rounds."""
    config = read_source(source, on_device(set_, device))
    out = out or Path("runs") / f"{source_name(source)}-tuned"
    chosen = fitting_methods(config, methods)

    from fedms.runs import tune as tuning

    with resume_hint(out), run_progress(out) as progress, polite_stop() as stop:
        found = tuning.tune(config, chosen, out, count=trials, jobs=jobs, overwrite=force, progress=progress, stop=stop)
    _show_trials(found, chosen)
    show(f"\nchoices: {out}/METHOD.toml; use them by fedms compare {source} --tuned {out}")


def _show_trials(trials: Sequence[Trial], methods: Sequence[str]) -> None:
    """Print the first and the best trial of each method."""
    table = plain_table("method", "as it was\nvalidation", "best\nvalidation", "trial", "chosen",
                        left=("method", "chosen"))
    for name in methods:
        own = [trial for trial in trials if trial.method == name]
        best = min(own, key=lambda trial: trial.rank)
        table.add_row(name, *("–" if t.score is None else t.words for t in (own[0], best)),
                      str(best.number), ", ".join(f"{key}={value:g}" for key, value in best.values.items()))
    console.print(table)
