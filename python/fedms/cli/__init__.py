"""The command line: every module here holds the commands of its name.

A command reads its arguments, calls the room that does the work, and shows what came out. torch, and everything that
imports it, is imported inside the commands, so that `--help` and mistakes are answered at once.
"""
from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

try:
    import typer

    from fedms.errors import ConfigError
    from fedms.progress import accept_any_text

    # Imported in the order in which `fedms --help` lists the commands: each module adds its own to the application.
    from . import run, init, compare, plan, server, client, inspect, export, language, pretrain  # noqa: F401, I001
    from .command import app
    from .terminal import show
except ModuleNotFoundError as missing:
    sys.exit(f"fedms needs {missing.name}, which is not installed: pip install 'fedms[train]'")
except ConfigError as broken:       # a plugin that registers methods, data or models
    sys.stderr.write(f"fedms: {broken}\n")
    sys.exit(broken.exit_code)


def _show_version(asked: bool) -> None:
    if asked:
        show(f"fedms {metadata.version('fedms')}")
        raise typer.Exit


@app.callback()
def fedms(version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and end.")] = False) -> None:
    """Federated fine-tuning of a frozen foundation model.

    FedMS trains in two stages: first all clients train one global LoRA expert together, then each trains a private local
    expert and a gate that mixes the two. LoRA is activated block by block, as it is needed.
    """


def main() -> None:
    """Run the command line; the entry point of the script `fedms`."""
    accept_any_text()
    app()
