"""`fedms plan`: what each depth costs on a client's device."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fedms.errors import FAILED, ConfigError

from .command import START, command
from .options import Device, Sets, Source, amount, check_suffix, on_device, read_source
from .terminal import console, paragraph, plain_table, run_progress, say, show

if TYPE_CHECKING:
    from fedms.config import RunConfig
    from fedms.runs.plan import Plan


@command(
    START,
    "fedms plan sentiment --memory 512MiB",
    "fedms plan sentiment --epsilon 8          # the noise of a run with differential privacy, and what is left under it",
    "fedms plan my-run.toml --memory 1GiB --flops 5G --out plan.png",
    notes=["Nothing is trained: memory is traced on two samples, operations and bytes are counted."])
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
    epsilon: Annotated[Optional[float], typer.Option(
        "--epsilon", metavar="E", min=1e-3, help="Show instead how much noise this budget of differential privacy takes, and "
        "what it leaves to learn.")] = None,
    device: Device = None,
    set_: Sets = None,
    out: Annotated[Optional[Path], typer.Option(
        "--out", "-o", metavar="FILE", help="Draw the plan into this file: .png, .svg or .pdf.")] = None,
) -> None:
    """Show what each depth costs on a client's device, and which settings fit its memory."""
    limits = {name: None if text is None else amount(f"--{name}", text) for name, text in
              {"memory": memory, "flops": flops, "bandwidth": bandwidth}.items()}
    check_suffix("--out", out, ".png", ".svg", ".pdf")
    config = read_source(source, on_device(set_, device))
    if epsilon is not None:
        _plan_privacy(config, epsilon)
        return

    from fedms.runs import plan as planning

    with run_progress(Path()) as progress:
        found = planning.plan(config, memory=limits["memory"], flops=limits["flops"], bandwidth=limits["bandwidth"],
                              progress=progress)
    _show_options(found)
    _show_reasons(found)
    if found.chosen is not None:
        _show_settings(found)
    if out is not None:
        from fedms.report.figures.plan import write_picture

        write_picture(found, out)
        show(f"picture: {out}")
    if found.chosen is None:
        raise typer.Exit(FAILED)


def _plan_privacy(config: RunConfig, epsilon: float) -> None:
    """Print the noise of a run within a budget."""
    try:
        from fedms.runs.privacy_plan import plan_privacy
    except ModuleNotFoundError as error:
        raise ConfigError(f"--epsilon: needs {error.name}, which is not installed: pip install 'fedms[privacy]'") from None

    with run_progress(Path()) as progress:
        found = plan_privacy(config, epsilon, progress)
    table = plain_table("stage", "depth", "releases", "clients\na round", "values\nsent", "noise\nmultiplier",
                        "noise of the mean\n/ clip",
                        "clients for\nnoise = clip", left=("stage",))
    for each in found.stages:
        plan = each.plan
        table.add_row(each.stage.replace("stage", "stage "), str(each.depth), str(plan.rounds), f"{plan.clients:g}",
                      f"{plan.parameters:,}", f"{plan.multiplier:.4g}", f"{plan.noise_to_clip:.3g}", f"{plan.clients_needed:,}")
    console.print(table)
    console.print()
    for each in found.stages:
        paragraph("- ", f"{each.stage.replace('stage', 'Stage ')} at depth {each.depth}: {each.plan.verdict}.")
    paragraph("- ", f"With half as many rounds the noise multiplier is {found.half:.4g}, with twice as many {found.twice:.4g}.")
    paragraph("- ", "Under noise, aggregate.rule = \"freeze_a\" loses less than the mean of A and B: noise in both multiplies.")
    console.print()
    _show_lines("put into the run file:", found.settings)


def _show_options(found: Plan) -> None:
    """Print one line for each depth."""
    from fedms.report import duration, size

    table = plain_table("depth", "frozen", "cache", "micro-\nbatch", "trained", "trained\n%", "GFLOP\na round",
                        "peak\nmemory", "up", "down", "time\na round", "fits", left=("frozen", "cache", "fits"), no_wrap=True)
    for o in found.options:
        table.add_row(str(o.depth), o.frozen, o.cache, str(o.micro_batch), f"{o.work.trained_params:,}",
                      f"{o.trained_percent:.2f}", f"{o.work.flops / 1e9:.1f}", f"{o.peak / 2**20:.0f} MiB",
                      size(o.work.bytes_up), size(o.work.bytes_down), duration(o.seconds),
                      "yes" if found.fits(o) else "no", style="bold" if o is found.chosen else None)
    console.print(table)
    console.print()


def _show_reasons(found: Plan) -> None:
    """Print what the lines of the options are made of, and why nothing fits where nothing does."""
    from fedms.report import size

    speeds = ", ".join(f"{speed / 1e9:.1f} GFLOP/s with {name} weights" for name, speed in found.speed.items())
    paragraph("- ", f"A round of stage 1 on the client with the most training data, at {speeds}"
              + ("." if found.bandwidth is None else f", {size(found.bandwidth)} a second."))
    shown = found.chosen or found.options[0]
    clients = f", with {found.side_by_side} clients side by side" if found.side_by_side > 1 else ""
    paragraph("- ", f"Memory at depth {shown.depth}{clients}: " + ", ".join(
        f"{part} {amount / 2**20:.0f} MiB" for part, amount in shown.memory.items()) + ".")
    paragraph("- ", f"The process around it (Python, its libraries, the data) takes {found.process / 2**20:.0f} MiB "
              "here, which the limit does not count.")
    paragraph("- ", f"The first round also fills the cache: {shown.work.building_flops / 1e9:.1f} GFLOP.")
    console.print()
    if found.chosen is None:
        least = min(found.options, key=lambda o: o.peak)
        say(f"nothing fits in {found.limit / 2**20:.0f} MiB: the smallest option, depth {least.depth}, needs "
            f"{least.peak / 2**20:.0f} MiB, and 5 % of the limit are kept free")


def _show_settings(found: Plan) -> None:
    """Print the chosen settings as lines of a run file."""
    _show_lines("put into the run file:" if found.limit is not None else "settings:", found.settings)


def _show_lines(title: str, settings: Mapping[str, Any]) -> None:
    """Print settings, by dotted key, as lines of a run file."""
    show(title)
    tables: dict[str, list[str]] = {}
    for key, value in settings.items():
        name, _, entry = key.partition(".")
        tables.setdefault(name, []).append(f"{entry} = {json.dumps(value)}")
    for name, lines in tables.items():
        console.print(f"[{name}]", *lines, sep="\n", markup=False, soft_wrap=True)
