"""`fedms generate` and `fedms serve`: a finished run of a causal language model answers."""
from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from fedms.errors import ConfigError, RunFolderError

from .command import EXPORT, command
from .options import UseDevice, checked_device
from .terminal import run_progress, show

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended, or of its export in the format "
                                     "mixture.")]
States = Annotated[Optional[Path], typer.Option(
    "--states", metavar="STATES", help="For a run on Flower: the folder where a client keeps its private expert, or one with "
    "those of several clients.", show_default="a simulation's own")]


@command(
    EXPORT,
    'fedms generate runs/dictionaries/fedms-seed0 "What does \\"kernel\\" mean?" --client jargon',
    'fedms generate runs/dictionaries/fedms-seed0 "What is a cat?" --temperature 0.8 --seed 3')
def generate(
    folder: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='The question; "-" reads it from the standard input.')],
    client: Annotated[Optional[str], typer.Option(
        "--client", "-c", metavar="ID", help="Id or name of the client that answers.", show_default="the global expert")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Most tokens.")] = 64,
    temperature: Annotated[float, typer.Option(
        "--temperature", "-t", metavar="T", min=0.0, help="0: the most probable token each time; 1: as likely as the model says.")] = 0.0,
    top_p: Annotated[float, typer.Option(
        "--top-p", metavar="P",
        help="Sample from the fewest most likely tokens whose probabilities add up to this (nucleus sampling).")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the sampling.")] = 0,
    states: States = None,
    device: UseDevice = "auto",
) -> None:
    """Answer a question with a run's language model, as one of its clients."""
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p: got {top_p}; accepted: above 0, at most 1")
    _check(folder)
    from fedms.exports.language_model import open_language_model
    from fedms.models.generation import Sampling

    question = sys.stdin.read() if prompt == "-" else prompt
    language = open_language_model(folder, states, checked_device(device))
    try:
        for piece in language.stream(question, client, Sampling(max_new_tokens, temperature, top_p, seed)):
            print(piece, end="", flush=True)
    except ValueError as error:
        raise ConfigError(f"PROMPT: {error}") from None
    print()


@command(
    EXPORT,
    "fedms serve runs/dictionaries/fedms-seed0 --port 8000",
    notes=['With OpenAI\'s client: `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=TOKEN)`, and as `model` the name of a '
           "client, or global for the expert that they share."])
def serve(
    folder: Run,
    port: Annotated[int, typer.Option("--port", "-p", metavar="N", min=1, max=65535, help="Port on this machine.")] = 8000,
    token: Annotated[Optional[str], typer.Option(
        "--token", metavar="TOKEN", envvar="FEDMS_TOKEN", help="API key that requests must send.",
        show_default="a new one, shown at the start")] = None,
    states: States = None,
    device: UseDevice = "auto",
) -> None:
    """Serve a run's language model on this machine, in the form of OpenAI's chat completions."""
    if token is not None and len(token) < 8:
        raise ConfigError(f"--token: got {len(token)} characters; accepted: at least 8")
    _check(folder)
    try:
        import uvicorn

        from fedms.exports.serve import endpoint
    except ModuleNotFoundError as error:
        raise ConfigError(f"fedms serve needs {error.name}, which is not installed: pip install 'fedms[lm]'") from None
    from fedms.exports.language_model import open_language_model

    language = open_language_model(folder, states, checked_device(device))
    key = token or secrets.token_urlsafe(24)
    server = uvicorn.Server(uvicorn.Config(endpoint(language, key), host="127.0.0.1", port=port, log_level="warning"))
    show(f"http://127.0.0.1:{port}/v1   clients: {', '.join(language.names)}")
    show(f"API key: {key}" if token is None else "API key: as given")
    server.run()


@command(
    EXPORT,
    "fedms samples runs/dictionaries/fedms-seed0 --clients 6",
    notes=["Each client is asked the first question of its test samples. The report shows the answers before and after training."])
def samples(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")],
    clients: Annotated[int, typer.Option("--clients", metavar="N", min=1, help="How many clients, those with the lowest ids.")] = 3,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Most tokens.")] = 64,
    device: UseDevice = "auto",
) -> None:
    """Record what some clients of a language model answer, and show it in the run's report."""
    _check(folder)
    from fedms.exports.samples import write_samples
    from fedms.models.generation import Sampling
    from fedms.report import write_report

    where = checked_device(device)
    with run_progress(folder) as progress:
        write_samples(folder, clients, Sampling(max_new_tokens), progress, where)
    show(f"report: {write_report(folder)}")


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder")
