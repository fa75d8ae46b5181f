"""`fedms report`, `watch`, `doctor` and `exit-codes`: look at runs and at this installation."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedms.config import ConfigError
from fedms.errors import EXIT_CODES, FAILED

from .command import LOOK, MAINTAIN, command
from .options import Sets, read_source
from .terminal import console, paragraph, plain_table, run_progress, say, show_results, show_served

Runs = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or a folder of run folders.")]


@command(
    LOOK,
    "fedms report runs/sentiment              # one page over all runs of a comparison",
    "fedms report runs/sentiment/fedms_plus-seed0  # the page of one run",
    notes=["Only the records on disk are read: the page can be made again at any time, of unfinished runs too."])
def report(folder: Runs) -> None:
    """Write DIR/report.html from the records on disk: one file, with charts, that opens anywhere."""
    show_results(folder)


@command(
    LOOK,
    "fedms watch runs/sentiment    # from another terminal, while `fedms compare sentiment` works there",
    "fedms watch runs/demo --once  # where it stands, and back to the prompt")
def watch(
    folder: Runs,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Time between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the state once and end.")] = False,
) -> None:
    """Follow runs live: where each stands, its loss, and its accuracy or perplexity. Ends when nothing runs any more, or by Ctrl-C."""
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


@command(
    MAINTAIN,
    "fedms doctor                                    # is everything here that a run needs?",
    "fedms doctor sentiment --set model.frozen=int8  # and who computes the products of that run's training step?",
    notes=["In its table `cpu`, `triton` and `cuda` are kernels of fedms. `eager` are layers of fedms that run PyTorch's operators, and "
           "`pytorch` is everything else, such as layers without experts."])
def doctor(
    source: Annotated[Optional[str], typer.Argument(
        metavar="[SOURCE]", help="A run file (TOML) or a built-in one, to see which backend serves its model's shapes.",
        show_default=False)] = None,
    set_: Sets = None,
) -> None:
    """Check what a run needs: versions, CPU and kernels, cache folder, model and data."""
    if source is None and set_:
        raise ConfigError("--set: nothing to override; name a run file, as in `fedms doctor sentiment --set ...`")
    config = None if source is None else read_source(source, set_ or [])

    from fedms import doctor as checkup

    marks = {"ok": "green", "note": "yellow", "problem": "bold red"}
    checks = []
    for check in checkup.diagnose(None if source is None else Path(source)):
        paragraph(f"{check.state:<8}{check.name:<28}", check.text, marks[check.state])
        checks.append(check)
    if config is not None:
        with run_progress(Path()) as progress:
            counted = checkup.served(config, progress)
        show_served(counted)
    if problems := [c for c in checks if c.state == "problem"]:
        say(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}: " + ", ".join(c.name for c in problems))
        raise typer.Exit(FAILED)


@command(MAINTAIN, name="exit-codes")
def exit_codes() -> None:
    """Explain the exit codes of all commands, for scripts."""
    table = plain_table("code", "meaning", left=("meaning",))
    for code, meaning in EXIT_CODES.items():
        table.add_row(str(code), meaning)
    console.print(table)


@command(
    LOOK,
    "fedms audit runs/digits/fedms_plus-seed0              # what its clients' updates tell, under each mode of privacy",
    "fedms audit runs/digits/fedms_plus-seed0 --epsilon 2  # with the noise of another budget",
    notes=["Told apart: how often the attacker rightly says whether a client took part (guessing gives 50 %), and the smallest epsilon "
           "that agrees with this; it must stay below the claimed one. Found: how often a direction in the update fits a sample of "
           "the client best, beside the share of all samples that are this client's."])
def audit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    epsilon: Annotated[float, typer.Option("--epsilon", metavar="E", min=1e-3, help="Budget whose noise is attacked, for a run "
                                           "without noise.")] = 8.0,
    trials: Annotated[int, typer.Option("--trials", metavar="N", min=100, help="Trials with the client, and as many without.")] = 1000,
) -> None:
    """Attack what the clients of a run send: can one tell that a client took part, and find its samples?"""
    try:
        from fedms.runs.audit import audit as attack
    except ModuleNotFoundError as error:
        raise ConfigError(f"audit: needs {error.name}, which is not installed: pip install 'fedms[privacy]'") from None

    with run_progress(Path()) as progress:
        found = attack(folder, epsilon=epsilon, count=trials, progress=progress)
    table = plain_table("stage", "mode", "attacker", "claimed\nepsilon", "shown\nepsilon", "told\napart", "samples\nfound", "by\nchance",
                        left=("stage", "mode", "attacker"))
    for each in found:
        told, inverted = each.told_apart, each.inverted
        table.add_row(each.stage.replace("stage", "stage "), each.mode, each.attacker,
                      "none" if each.claimed is None else f"{each.claimed:.3g}",
                      f"{'>' if told.epsilon >= told.largest_epsilon else ''}{told.epsilon:.3g}", f"{told.accuracy:.0%}",
                      "" if inverted is None else f"{inverted.found:.0%}", "" if inverted is None else f"{inverted.chance:.0%}")
    console.print(table)
    broken = [each for each in found if each.claimed is not None and each.told_apart.epsilon > each.claimed]
    if broken:
        say("an attack shows a larger epsilon than is claimed: the noise is not what it should be; please report this")
        raise typer.Exit(FAILED)
