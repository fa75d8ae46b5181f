"""Options that several commands have, and how their values are read. Nothing here imports torch."""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedms.config import (ConfigError, RunConfig, builtin_names, config_from_dict, load_config, parse_size, registry,
                          with_run)
from fedms.errors import DataError, ModelError, RunFolderError

from .terminal import say


def _complete(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the function that completes one of these words in a shell."""
    known = list(words)
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def _complete_list(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the function that completes the last of several words with commas between them."""
    known = list(words)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + word for word in known if word.startswith(last)]

    return complete


def _complete_key(incomplete: str) -> list[str]:
    """Complete the key of a `TABLE.KEY=VALUE`."""
    if "=" in incomplete:
        return []
    tables = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return [f"{name}.{key}=" for name, table in tables.items() for key in getattr(table, "model_fields", ())
            if f"{name}.{key}".startswith(incomplete)]


Source = Annotated[str, typer.Argument(
    metavar="SOURCE", autocompletion=_complete(builtin_names()),
    help=f"A run file (TOML; `fedms init` writes one) or a built-in one: {', '.join(builtin_names())}.")]
Sets = Annotated[Optional[list[str]], typer.Option(
    "--set", "-s", metavar="TABLE.KEY=VALUE", autocompletion=_complete_key,
    help="Override one key of the run file; may be repeated. The value is TOML, other text is taken as a string, "
         "and none unsets an optional key.")]
RunOut = Annotated[Optional[Path], typer.Option(
    "--out", "-o", metavar="DIR", help="Run folder.", show_default="runs/SOURCE/METHOD-seedN")]
Methods = Annotated[str, typer.Option(
    "--methods", "-m", metavar="A,B|all", autocompletion=_complete_list([*registry.method_names(), "all"]),
    help=f"Methods, with commas between them: {', '.join(registry.method_names())}.")]
Method = Annotated[Optional[str], typer.Option(
    "--method", "-m", metavar="NAME", autocompletion=_complete(registry.method_names()),
    help=f"Same as --set run.method=NAME: {', '.join(registry.method_names())}.")]
Device = Annotated[Optional[str], typer.Option(
    "--device", metavar="NAME", autocompletion=_complete(("auto", "cpu", "cuda", "mps")),
    help="Same as --set run.device=NAME: auto (the first CUDA GPU that works, else the CPU), cpu, cuda, cuda:N, mps.")]
UseDevice = Annotated[str, typer.Option(
    "--device", metavar="NAME", autocompletion=_complete(("auto", "cpu", "cuda", "mps")),
    help="Where to compute: auto (the first CUDA GPU that works, else the CPU), cpu, cuda, cuda:N, mps.")]
Force = Annotated[bool, typer.Option("--force", help="Replace earlier runs in the output folder.")]
Track = Annotated[Optional[list[str]], typer.Option(
    "--track", metavar="NAME", autocompletion=_complete(("tensorboard", "wandb", "mlflow")),
    help="Send the records to a tracker too: tensorboard, wandb or mlflow; may be repeated.")]
Jobs = Annotated[int, typer.Option(
    "--jobs", "-j", metavar="N", min=1, help="Runs at a time, each in a process of its own with run.threads threads.")]
Trust = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run the Python code that comes with the foundation model, where it needs some. Whoever "
    "wrote it can do here whatever you can.")]
Resume = Annotated[bool, typer.Option(
    "--resume", help="Go on where an earlier call with the same settings was stopped or killed.")]


def checked_device(name: str) -> str:
    """Return the name of a device. ConfigError if it is none."""
    try:
        return config_from_dict({"run": {"device": name}}).run.device
    except ConfigError as error:
        raise ConfigError(f"--device: {error.problems[0].removeprefix('run.device: ')}") from None


def on_device(overrides: Sequence[str] | None, device: Optional[str]) -> list[str]:
    """Return the texts of `--set`, and one more for `--device`."""
    return [*(overrides or ()), *([] if device is None else [f"run.device={device}"])]


def read_source(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, and refuse misspelled names in it before anything is loaded.

    Args:
        source: Path of a run file, or name of a built-in one.
        overrides: Texts `table.key=value` that override its keys.

    Raises:
        ConfigError: If the run file cannot be used.
        DataError: If `data.name` is no data set that could be found here or on the hub.
        ModelError: If `model.id` is no model that could be found here or on the hub.
    """
    config = load_config(source, overrides)
    if config.run.engine != "flower":       # a deployment's nodes have their own data
        _refuse_misspelled("data.name", config.data.name, registry.data_sets(), DataError)
        _refuse_misspelled("model.id", config.model.id, registry.models(), ModelError)
    return config


def _refuse_misspelled(key: str, name: str, known: Iterable[str], kind: type[DataError | ModelError]) -> None:
    """Refuse a path that does not exist, and a word that nearly is a built-in name.

    Any other name may be one of the Hugging Face hub, which is asked later.
    """
    path, known = Path(name).expanduser(), list(known)
    if name in known or path.exists():
        return
    if close := difflib.get_close_matches(name, known, 1, 0.75):
        raise kind(f"{key}: got {name!r}; did you mean {close[0]}? Built in are {', '.join(known)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise kind(f"{key}: {path}: no such file or folder (seen from {Path.cwd()})")


def fitting_methods(config: RunConfig, text: str) -> list[str]:
    """Return the methods that are asked for. Of `all`, those that do not fit the run file are named and left out.

    Args:
        text: The value of `--methods`.

    Raises:
        ConfigError: If a name is unknown, or there is none.
    """
    if text.strip() != "all":
        return _method_list(text)
    fitting = []
    for name in registry.method_names():
        try:
            with_run(config, method=name)
            fitting.append(name)
        except ConfigError as error:
            say(f"note: {name} is left out: {error.problems[0]}")
    return fitting


def _method_list(text: str) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = registry.method_names()
    accepted = f"accepted: all, or a list of {', '.join(known)}"
    if unknown := [name for name in chosen if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, 1)
        raise ConfigError(f"--methods: unknown method {unknown[0]!r}"
                          + (f"; did you mean {close[0]}? " if close else "; ") + accepted)
    if not chosen:
        raise ConfigError(f"--methods: names no method; {accepted}")
    return chosen


def seed_list(text: Optional[str], config: RunConfig) -> list[int]:
    """Return the seeds that `--seeds` asks for: 3 means 0, 1, 2; a list such as 0,7 means itself.

    Raises:
        ConfigError: If the text is neither, or a seed is out of range.
    """
    if text is None:
        return [config.run.seed]
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," not in text and numbers:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**32:
        raise ConfigError(f"--seeds: got {text!r}; accepted: a number of seeds (3 means 0, 1, 2), or a list such as "
                          "0,7 of integers from 0 to 4294967295")
    return list(dict.fromkeys(numbers))


def amount(option: str, text: str) -> int:
    """Return a number of bytes, or of bytes or operations a second: 512MiB, 5G, 5GFLOPS, 1MB/s.

    Args:
        option: Name of the option, for the error.

    Raises:
        ConfigError: If the text is no such number, or not above 0.
    """
    try:
        found = parse_size(re.sub(r"(?i)(flop|b)?s?(/s)?$", "", text.strip()))
    except ValueError:
        found = 0
    if found <= 0:
        raise ConfigError(f"{option}: got {text!r}; accepted: a number above 0, with k, M, G, T (thousands) or Ki, Mi, "
                          "Gi, Ti (1024s)")
    return found


def check_suffix(option: str, path: Optional[Path], *suffixes: str) -> None:
    """Raise ConfigError if a file's name does not end in one of these suffixes."""
    if path is not None and path.suffix not in suffixes:
        raise ConfigError(f"{option}: got {str(path)!r}; accepted: a file that ends in {', '.join(suffixes[:-1])} or "
                          f"{suffixes[-1]}")


def check_free(folder: Path, force: bool, resume: bool) -> None:
    """Refuse a run folder that is in use before the model is loaded; the writer of the records asks again.

    Raises:
        ConfigError: If both `--force` and `--resume` are given.
        RunFolderError: If the folder holds something, and neither is given.
    """
    if force and resume:
        raise ConfigError("--force and --resume exclude each other: --force starts the run again, --resume goes on with it; "
                          "give one of them")
    if not (force or resume) and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder}: exists and is not empty; go on with the run by --resume, replace it by "
                             "--force, or choose another --out")
