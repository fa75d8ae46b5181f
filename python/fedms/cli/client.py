"""`fedms client`: taking part in somebody's federation with data that stay on this machine."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from .command import DEPLOY, app, command
from .options import checked_device
from .server import installed
from .stopping import polite_stop
from .terminal import run_progress, say, show

client = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Take part in a federation. Data, key and private "
                     "expert stay on this machine. Step by step: docs/guide/deploy.md.")
app.add_typer(client, name="client", rich_help_panel=DEPLOY)
DEFAULT = Path("fedms-client")
State = Annotated[Path, typer.Argument(metavar="[STATE]", help="The client's folder.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Agree without being asked.")]


@command(
    "Commands", "fedms client join invite.toml --data patients.csv --name clinic-7",
    notes=["Nothing is sent. STATE gets a new key, the samples as the model reads them, and policy.toml, which holds your limits."],
    name="join", to=client)
def client_join(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="The file that the server's operator sent.")],
    data: Annotated[str, typer.Option(
        "--data", metavar="PATH", help="Your data: a table, a folder of images, or a data set of the hub.")],
    name: Annotated[str, typer.Option(
        "--name", metavar="NAME", help="How you want to be called; the server's records show it.")],
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="The client's folder, which is made.")] = DEFAULT,
    model: Annotated[Optional[str], typer.Option(
        "--model", metavar="FOLDER", help="Your own copy of the model, where it is not loaded by its name.")] = None,
    yes: Yes = False,
) -> None:
    """Read an invitation and your data, show what taking part means, and make a client's folder."""
    installed()
    from fedms.deployment import join
    from fedms.deployment.invitation import read_invitation
    from fedms.report.formats import duration, size

    with run_progress(state) as progress:
        found = join.prepare(read_invitation(invitation), data, name, progress, model)
    for note in found.dataset.notes:
        say(note)
    for line in join.told(found, size, duration):
        show(line)
    if not yes:
        typer.confirm("take part?", abort=True)
    made = join.write(found, state)
    show(f"\nmade {state}; {state}/policy.toml holds your limits. Send this line to the server's operator:\n")
    show(made.line())
    show(f"\nthen:  fedms client start {state}")


@command(
    "Commands", "fedms client start", "fedms client start --service  # and again whenever this machine starts",
    notes=["It runs until Ctrl-C, and goes on when a server that was away comes back."], name="start", to=client)
def client_start(
    state: State = DEFAULT,
    service: Annotated[bool, typer.Option("--service", help="Write and start a systemd user unit instead.")] = False,
    device: Annotated[str, typer.Option(
        "--device", metavar="NAME", help="Where this machine computes, whatever the server says: auto (the first CUDA GPU that works, "
        "else the CPU), cpu, cuda, cuda:N, mps.")] = "auto",
) -> None:
    """Answer the server's messages, as far as policy.toml and what you agreed to allow."""
    installed()
    from fedms.deployment import service as units
    from fedms.deployment.node import Node
    from fedms.deployment.state import ClientState

    found, device = ClientState(state), checked_device(device)
    if service:
        show(units.install(found, device))
        return
    with polite_stop() as stop:
        Node(found, lambda text: show(f"{time.strftime('%H:%M:%S')} {text}"), device=device).run(stop)


@command("Commands", "fedms client status", name="status", to=client)
def client_status(state: State = DEFAULT) -> None:
    """Show what this client takes part in, whether it is served, and what was done today."""
    installed()
    from fedms.deployment.state import ClientState

    for line in ClientState(state).lines():
        show(line)


@command(
    "Commands", "fedms client accept                        # what the server has asked for meanwhile",
    "fedms client accept --invitation new.toml  # another address, certificate or run file, or the list of clients",
    name="accept", to=client)
def client_accept(
    state: State = DEFAULT,
    invitation: Annotated[Optional[Path], typer.Option("--invitation", metavar="FILE", help="A new invitation.")] = None,
    yes: Yes = False,
) -> None:
    """Look at a changed run file, and agree to it."""
    installed()
    from fedms.deployment import roster
    from fedms.deployment.invitation import changes, read_invitation
    from fedms.deployment.state import ClientState
    from fedms.engines.flower.transport import tables_of

    found = ClientState(state)
    new = read_invitation(invitation) if invitation else found.offer_as_invitation()
    if new is None:
        show("the server has asked for nothing new")
        return
    lines = changes(tables_of(found.invitation.config), tables_of(new.config))
    if new.clients != found.invitation.clients:
        lines.append(f"clients   {roster.told(new.clients)}: it must be the same on all their machines, and you should know them")
    for line in lines or ["the run file is the same; address or certificate may differ"]:
        show(line)
    if not yes:
        typer.confirm("agree?", abort=True)
    found.accept(new)
    show("agreed; policy.toml still holds your limits, and may have to allow it too")


@command("Commands", "fedms client leave", name="leave", to=client)
def client_leave(state: State = DEFAULT) -> None:
    """Leave the federation. Key, data and private expert stay here until `fedms client forget`."""
    installed()
    from fedms.deployment import service as units
    from fedms.deployment.state import ClientState

    found = ClientState(state)
    found.change(left=True)
    units.remove(found)
    show(f"{found.about.name} has left; a process that serves it ends after its visit. Tell the server's operator: fedms server "
         f"remove DIR {found.about.name}")


@command("Commands", "fedms client forget", name="forget", to=client)
def client_forget(state: State = DEFAULT, yes: Yes = False) -> None:
    """Remove a client's folder: key, samples, private expert."""
    installed()
    from fedms.deployment import service as units
    from fedms.deployment.state import ClientState

    found = ClientState(state)
    if not yes:
        typer.confirm(f"remove {state} with its key, its samples and the private expert of {found.about.name}?", abort=True)
    units.remove(found)
    found.forget()
    show(f"{state} is gone; your own data files are as they were")
