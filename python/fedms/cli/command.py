"""The application, and the decorator that makes a function one of its commands."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Optional, TypeVar

import click
import typer
from typer.core import TyperGroup

from .stopping import reported_errors

Command = TypeVar("Command", bound=Callable[..., Any])

# The panels of `fedms --help`, in the order in which a user meets them.
PANELS = START, COMPARE, DEPLOY, LOOK, EXPORT, MAINTAIN = (
    "Start", "Compare", "Deploy on several machines", "Look at runs", "Use what was trained", "Maintain this installation")


LONGEST = 76        # characters of an example that a terminal of 80 columns shows in one line


def epilog(*examples: str, notes: Sequence[str] = ()) -> str:
    """Return the end of a help page in Markdown: examples and notes, one a line.

    The comment of an example that is too long for a line stands above it.

    typer joins what stands between empty lines by single line breaks before it is read as Markdown, so an empty line of
    Markdown is two here. Lines in a block of code are kept.
    """
    lines = [line for example in examples for line in _lines_of(example)]
    block = ["**Examples**", "", "```", *lines, "```", ""] if examples else []
    said = [line for note in notes for line in (note, "")]
    return "\n\n".join([*block, *said, "`fedms exit-codes` explains how a command ends; FEDMS_DEBUG=1 shows tracebacks."])


def _lines_of(example: str) -> list[str]:
    code, _, comment = example.partition("  # ")
    return [example] if len(example) <= LONGEST or not comment else [f"# {comment}", code.rstrip()]


class _ByPanel(TyperGroup):
    """Lists commands in the order of their panels; typer alone lists groups of commands before all others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: PANELS.index(
            getattr(self.commands[name], "rich_help_panel")))


# click names the nearest command from 8.4 on; typer would name it a second time.
_SUGGESTS = tuple(map(int, metadata.version("click").split(".")[:2])) < (8, 4)

app = typer.Typer(
    name="fedms", cls=_ByPanel, suggest_commands=_SUGGESTS, no_args_is_help=True, rich_markup_mode="markdown",
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}, epilog=epilog(
        "fedms run digits                      # a first run, no download",
        "fedms init                            # a run file for your own data",
        "fedms run my-run.toml                 # train, then read the report",
        "fedms compare my-run.toml --seeds 3   # is it better than other methods?",
        "fedms export runs/my-run/fedms_plus-seed0 --out model",
        "fedms predict model new.csv --client 7",
        notes=["Every command explains itself: `fedms run --help`. Tab completes commands, options and names once "
               "`fedms --install-completion` has been run."]))


def command(panel: str, *examples: str, notes: Sequence[str] = (), name: Optional[str] = None,
            to: typer.Typer = app) -> Callable[[Command], Command]:
    """Make a function a command whose errors are reported in words.

    Args:
        panel: Panel of `fedms --help` that lists the command.
        examples: Lines of shell input that the help page shows.
        notes: Sentences below the examples, in Markdown.
        name: Name of the command, if it is not the function's.
        to: Application that the command is added to.
    """
    def register(function: Command) -> Command:
        @functools.wraps(function)
        def reporting(*args: Any, **kwargs: Any) -> Any:
            with reported_errors():
                return function(*args, **kwargs)

        to.command(name, rich_help_panel=panel, epilog=epilog(*examples, notes=notes))(reporting)
        return function

    return register
