"""`fedms server`: the server of a federation whose clients bring their own data and keys."""
from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated, Optional

import typer

from fedms.config import ConfigError

from .command import DEPLOY, app, command
from .options import Sets, Source, read_source
from .stopping import polite_stop, resume_hint
from .terminal import run_progress, show, show_results

server = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Run the server of a federation. It never sees the "
                     "data or the key of a client. Step by step: docs/guide/deploy.md.")
app.add_typer(server, name="server", rich_help_panel=DEPLOY)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]


@command(
    "Commands", "fedms server init federation my-run.toml --host fl.example.org",
    notes=["DIR gets the run file with everything filled in, certificates, and invite.toml, which may be sent to anybody. The "
           "run file must name the classes (data.classes), unless it trains a language model."],
    name="init", to=server)
def server_init(
    folder: Folder,
    source: Source,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="Name or address by which clients reach this machine.")],
    set_: Sets = None,
    port: Annotated[int, typer.Option("--port", metavar="N", min=1, max=65535, help="Port that clients call.")] = 9091,
) -> None:
    """Make a server's folder, and the invitation for its clients."""
    deployment = installed()
    config = read_source(source, [*(set_ or []), "run.engine=flower"])
    with run_progress(folder) as progress:
        invitation = deployment.init(folder, config, host, port, progress)
    show(f"{folder}/{deployment.INVITATION}: send it to those who may take part, nothing in it is secret; its run file has the "
         f"fingerprint {invitation.run_sha256[:16]}")
    show(f"when they send you the line that they got:  fedms server accept {folder} 'LINE'")
    show(f"then:                                       fedms server start {folder} --bind 0.0.0.0")


@command("Commands", "fedms server accept federation 'ecdsa-sha2-nistp384 AAAA... clinic-7'", name="accept", to=server)
def server_accept(
    folder: Folder,
    line: Annotated[list[str], typer.Argument(metavar="LINE", help="What the client's owner sent: public key and name.")],
) -> None:
    """Let a client take part, also while the server runs: it joins in the next round."""
    deployment = installed()
    from fedms.deployment import roster

    member = deployment.accept(folder, " ".join(line))
    show(f"{member.name} takes part, as number {member.number}")
    if (invitation := deployment.read_invitation(folder / deployment.INVITATION)).clients:
        show(f"all are accepted: send {folder}/{deployment.INVITATION} to every client once more, for its secure sums:  fedms client "
             f"accept --invitation {deployment.INVITATION}")
        show(f"clients: {roster.told(invitation.clients)}")


@command("Commands", "fedms server remove federation clinic-7", name="remove", to=server)
def server_remove(folder: Folder, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.")]) -> None:
    """Exclude a client from the next round on."""
    installed().remove(folder, name)
    show(f"{name} takes part no longer")


@command(
    "Commands", "fedms server start federation --bind 0.0.0.0",
    notes=["It listens on this machine alone unless --bind says otherwise. Ctrl-C stops it between two clients; the same command "
           "goes on where it stopped. The run folder is DIR/run."],
    name="start", to=server)
def server_start(
    folder: Folder,
    bind: Annotated[str, typer.Option(
        "--bind", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is every one of this machine's.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(
        "--port", metavar="N", min=1, max=65535, help="Port to listen on; behind a proxy another one than clients call.",
        show_default="the invitation's")] = None,
    clients: Annotated[Optional[int], typer.Option(
        "--clients", metavar="N", min=1, help="Clients that must be connected before the first round.",
        show_default="all that were accepted, at least one")] = None,
) -> None:
    """Serve the clients and carry out the run, or go on with it."""
    deployment = installed()
    out = folder / deployment.RUN
    with resume_hint(out), run_progress(out) as progress, polite_stop() as stop:
        deployment.start(folder, bind, progress, stop, port=port, wait_for=clients)
    show_results(out)


@command(
    "Commands", "fedms server status federation", "fedms server status federation --web  # live, in a browser on this machine",
    name="status", to=server)
def server_status(
    folder: Folder,
    web: Annotated[bool, typer.Option("--web", help="Serve a live page on this machine alone, and print its address.")] = False,
) -> None:
    """Show who takes part, who is connected, and where the run stands."""
    installed()
    from fedms.deployment import page

    if web:
        with page.serve(folder) as address:
            show(address)
            show("only this machine can open it, and only with this address; Ctrl-C ends it")
            page.wait()
        return
    for line in page.lines(page.state(folder)):
        show(line)


@command("Commands", "fedms server renew federation", name="renew", to=server)
def server_renew(folder: Folder) -> None:
    """Renew certificates that expire within a month, with the same keys."""
    renewed = installed().renew(folder)
    show(f"renewed: {', '.join(renewed) or 'nothing expires within a month'}"
         + ("; send the clients invite.toml anew, for `fedms client accept`" if "ca.crt" in renewed else ""))


def installed() -> ModuleType:
    """Return the module of servers. ConfigError if Flower is not installed, or this Python is too old for it."""
    try:
        from fedms.deployment import server as deployment
        from fedms.engines.flower import connection, link  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"servers and clients need {error.name}, which is not installed: pip install 'fedms[flower]' (or "
                          "'fedms[client]' on a client), with Python 3.11 or later") from None
    return deployment
