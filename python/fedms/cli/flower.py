"""`fedms flower`: clients on machines of their own."""
from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fedms.config import ConfigError, dump_toml
from fedms.errors import RunFolderError

from .command import DEPLOY, app, command
from .options import Sets, Source, read_source
from .terminal import run_progress, say, show

if TYPE_CHECKING:
    from fedms.engines.flower.deployment import Commands

flower = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Clients on machines of their own: write, "
                     "start and end a Flower deployment. `flwr` itself runs and shows runs; docs/guide/deploy.md has every "
                     "step.")
app.add_typer(flower, name="flower", rich_help_panel=DEPLOY)
Deployment = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
Port = Annotated[Optional[int], typer.Option(
    "--port", metavar="N", min=1024, max=65000, help="The SuperLink's port; SuperNodes on the same machine take the next ones.",
    show_default="19091, or as at init")]


@command(
    "Commands", "fedms flower init dep digits --set clients.count=3",
    notes=["DIR gets the Flower app, run.toml, and a data folder for the server and for each client, to be "
           "carried to its machine: nothing else of the data leaves this one."],
    name="init", to=flower)
def flower_init(
    folder: Deployment,
    source: Source,
    set_: Sets = None,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="The SuperLink's machine, by name or address, as "
                                      "its clients reach it.")] = "127.0.0.1",
    port: Port = None,
) -> None:
    """Write a deployment's folder: the Flower app, the run file, certificates, and each client's own data."""
    config = read_source(source, [*(set_ or []), "run.engine=flower"])
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder}: exists and is not empty; choose another folder")
    deployment = _deployment()

    from fedms.runs.experiment import write_shards

    with run_progress(folder) as progress:
        config = write_shards(config, folder / "data", progress)
    deployment.write_app(folder, dump_toml(config), host, port)
    show(f"{folder}: the app, run.toml, certificates for {host}, and data and keys of the server and "
         f"{config.clients.count} clients")
    if host == deployment.HOST:
        show(f"start it all on this machine:  fedms flower up {folder}")
    else:
        _show_commands(deployment.Commands(folder, host, port))


@command("Commands", "fedms flower up dep", name="up", to=flower)
def flower_up(
    folder: Deployment,
    port: Port = None,
    insecure: Annotated[bool, typer.Option(
        "--insecure", help="No TLS and no authentication. For trials on this machine alone.")] = False,
) -> None:
    """Start a SuperLink and a SuperNode for each client on this machine, and print the commands for several machines."""
    deployment = _deployment()
    commands = deployment.up(folder, port, not insecure, lambda text: say(f"{text} ..."))
    show(f"up, on {deployment.HOST} alone: a SuperLink and {len(deployment.clients_of(folder))} SuperNodes, "
         + ("with TLS and SuperNode authentication" if not insecure else "nothing encrypted, and any process "
            "here may join: for trials only") + f"; their logs are in {folder}/flower")
    show(f"\nrun it:      fedms run {folder}/run.toml --engine flower\n"
         f"see it:      FLWR_HOME={folder.absolute()}/flower flwr list fedms\n"
         f"end it all:  fedms flower down {folder}")
    if not insecure:
        _show_commands(commands)


@command("Commands", "fedms flower down dep", name="down", to=flower)
def flower_down(folder: Deployment) -> None:
    """End what `fedms flower up` started, by the process ids that it noted."""
    ended = _deployment().down(folder.absolute())
    show(f"ended: {', '.join(ended) or 'nothing was running'}")


def run_deployed(source: str, overrides: list[str], out: Path, force: bool, resume: bool) -> None:
    """Submit a run to the deployment in the folder of its run file, and wait for its end.

    Raises:
        DeploymentError: If the deployment is not up, or the run does not end well.
    """
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


def _show_commands(commands: Commands) -> None:
    show("\non separate machines, each with the files that its command names (docs/guide/deploy.md):")
    for line in (commands.superlink("0.0.0.0"), commands.register(0), commands.supernode(0)):
        show(f"  {shlex.join(line)}")


def _deployment() -> ModuleType:
    """Return the module that starts deployments. ConfigError if Flower is not installed."""
    try:
        from fedms.engines.flower import deployment
    except ModuleNotFoundError as error:
        raise ConfigError(f"fedms flower needs {error.name}, which is not installed: pip install 'fedms[flower]'") from None
    return deployment
