"""Prints docs/reference/commands.md, the help of every command: `python docs/commands.py > docs/reference/commands.md`."""
from __future__ import annotations

import html
import re

import click
import typer
from typer.cli import get_docs_for_click

from fedms.cli import app

LAST = "`fedms exit-codes` explains how a command ends; FEDMS_DEBUG=1 shows tracebacks."


def commands() -> str:
    """Return the page: what `typer utils docs` writes, with blocks that have a language and no empty lines."""
    command = typer.main.get_command(app)
    text = html.unescape(get_docs_for_click(obj=command, ctx=click.Context(command), name="fedms", title="Commands"))
    text = re.sub(r"^```\w*\n(.*?)^```$", _block, text.replace(LAST, ""), flags=re.M | re.S)
    text = re.sub(r"^\* `--(?:install|show)-completion`.*\n", "", text, flags=re.M)        # they differ by the shell that is found
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    title, rest = text.split("\n", 1)
    return f"{title}\n\nMade from the code, as `fedms COMMAND --help` shows it. How a command ends: [errors](errors.md).\n{rest}\n"


def _block(found: re.Match[str]) -> str:
    lines = [line.removeprefix("$ ") for line in found[1].splitlines() if line]
    return "\n".join(["```text", *lines, "```"])


if __name__ == "__main__":
    print(commands(), end="")
