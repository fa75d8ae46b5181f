"""`fedms init`: a commented run file for a user's own data, from a few questions."""
from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fedms.config import ConfigError, RunConfig, load_config, registry
from fedms.errors import DataError, RunFolderError
from fedms.storage.durable import write_durably

from .columns import TASKS, ask, check_together, chosen_task, has_terminal, with_columns
from .command import START, command
from .run_files import Answers, run_file
from .terminal import say, show

if TYPE_CHECKING:
    from fedms.data.samples import Samples
    from fedms.data.tables import Table

USUAL_MODELS = {"text": "minilm", "images": "google/vit-base-patch16-224-in21k", "conversations": "smollm2"}
SAMPLES = 8         # of a simulated client of a language model, at least, as far as there are so many


@dataclass(frozen=True)
class Place:
    """What lies where the data are said to be. All is empty for data that are not on this machine.

    Attributes:
        files: The tables, or the texts.
        texts: Whether the files are texts, which only a language model learns.
        images: Whether it is a folder of images.
    """

    files: tuple[Path, ...] = ()
    texts: bool = False
    images: bool = False


@command(
    START,
    "fedms init                          # asks, then writes my-run.toml",
    "fedms init mail.toml --data mail.csv --label folder",
    "fedms init mail.toml --data mail.csv --label folder --client office --yes",
    "fedms init faq.toml --data faq.csv --model tiny-lm --question q --answer a",
    notes=["What options leave open is asked; with --yes, or without a terminal, it is guessed, and the guess is printed.",
           "The data are read once to see that the answers fit them; nothing is trained. Edit the file as you like: "
           "`fedms run FILE --dry-run` checks it and prints every key."])
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The run file to write.")] = Path("my-run.toml"),
    data: Annotated[Optional[str], typer.Option(
        "--data", metavar="PATH|ID", help="A table (.csv, .tsv, .parquet, .jsonl), a folder of tables or of images "
        "(CLASS/IMAGE or CLIENT/CLASS/IMAGE), a data set of the Hugging Face hub, or for a language model a text or a folder of texts "
        "(.txt).", show_default="asked")] = None,
    task: Annotated[Optional[str], typer.Option(
        "--task", metavar="|".join(TASKS), help="What is learned: labels, or the answers or texts of a language model.",
        show_default="asked")] = None,
    content: Annotated[Optional[str], typer.Option(
        "--text", "--image", metavar="NAME", help="Column of texts, or of images.", show_default="asked")] = None,
    label: Annotated[Optional[str], typer.Option(
        "--label", metavar="NAME", help="Column of labels.", show_default="asked")] = None,
    question: Annotated[Optional[str], typer.Option(
        "--question", metavar="NAME", help="Column of questions, for a language model.", show_default="asked")] = None,
    answer: Annotated[Optional[str], typer.Option(
        "--answer", metavar="NAME", help="Column of their answers.", show_default="asked")] = None,
    messages: Annotated[Optional[str], typer.Option(
        "--messages", metavar="NAME", help="Column of conversations, instead of both.", show_default="asked")] = None,
    client: Annotated[Optional[str], typer.Option(
        "--client", metavar="NAME", help="Column that says whose a sample is; none: clients are simulated.",
        show_default="asked")] = None,
    model: Annotated[Optional[str], typer.Option(
        "--model", metavar="NAME|ID", help=f"Foundation model: {', '.join(registry.models())}, a folder, or an id of "
        "the Hugging Face hub.", show_default="asked")] = None,
    delimiter: Annotated[Optional[str], typer.Option(
        "--delimiter", metavar="C", help="Character between the fields of a .csv or .tsv.", show_default="guessed")] = None,
    encoding: Annotated[Optional[str], typer.Option(
        "--encoding", metavar="NAME", help="Encoding of a table or a text, such as cp1252.", show_default="guessed")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the guess for each open question.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Ask a few questions about your data, and write a commented run file that trains on them."""
    if file.exists() and not force:
        raise RunFolderError(f"{file}: exists already; choose another file, or replace it by --force")
    if task not in (None, *TASKS):
        raise ConfigError(f"--task: got {task!r}; accepted: {', '.join(TASKS)}")
    asks = not yes and has_terminal()
    if data is None and not asks:
        raise ConfigError("--data: without a terminal to ask on, name the data: fedms init --data mail.csv")
    data = data or ask("1. Where are your data? A table, a folder, or a hub data set", None)
    place, named = _place(data), {"messages": messages, "question": question, "answer": answer, "text": content, "label": label}
    named = {key: name for key, name in named.items() if name}
    answers, table = Answers(data, images=place.images), None
    if place.files:
        answers = _written(place.files[0], answers, delimiter, encoding)
        table = None if place.texts else _read(place.files[0], answers)
    if task is None:
        task = "causal_lm" if place.texts else chosen_task(named, _is_language_model(model), table, asks and not place.images)
    answers = _with_task(answers, task, named, place)
    if table is not None:
        answers = with_columns(answers, table, named, client, asks)
    elif client or named:
        answers = replace(answers, client=None if client == "none" else client,
                          columns=named if answers.learns_language else {"text": "text", "label": "label", **named})
    usual = USUAL_MODELS["conversations" if answers.learns_language else "images" if answers.images else "text"]
    model = model or (ask("6. Which foundation model? A built-in name, a folder, or a hub id", usual) if asks else usual)
    text = run_file(_looked_at(_with_model(answers, model)))
    _check(text, file)
    try:
        write_durably(file, text.encode())
    except OSError as error:
        raise RunFolderError(f"{file}: cannot be written: {error.strerror or error}") from error
    show(f"{file}: written. Now:  fedms run {shlex.quote(str(file))}")


def _place(data: str) -> Place:
    """Look at what lies where the data are.

    Raises:
        DataError: If the name is that of a file or folder that does not exist, or that holds nothing that can be read.
    """
    path = Path(data).expanduser()
    if not path.exists():
        if data.startswith((".", "/", "~")) or path.suffix or data.count("/") > 1:
            raise DataError(f"--data: {path}: no such file or folder (seen from {Path.cwd()})")
        return Place()
    say(f"looking at {path} ...")
    from fedms.data.image_folder import scan
    from fedms.data.language import REMEDY, files_of
    from fedms.data.tables import table_kind

    if path.is_dir():
        tree = scan(path)
        if tree.tables:
            return Place(tuple(sorted(tree.tables)))
        if tree.images:
            return Place(images=True)
    elif table_kind(path):
        return Place((path,))
    if files := files_of(path)[0]:
        return Place(tuple(files), texts=True)
    raise DataError(f"--data: {path} is neither a table (.csv, .tsv, .parquet, .jsonl) nor a text (.txt), nor a folder of tables, texts "
                    f"or images. {REMEDY}")


def _is_language_model(model: Optional[str]) -> bool:
    from fedms.models.inspection import look

    return model is not None and look(model).reads == "conversations"


def _with_task(answers: Answers, task: str, named: dict[str, str], place: Place) -> Answers:
    """Note what is learned.

    Raises:
        ConfigError: If the data or the options are not for it.
    """
    check_together(task, named)
    if task == "causal_lm":
        if place.images:
            raise ConfigError(f"--task: {answers.data} holds images, which a language model does not read; accepted: classification")
        if not place.files:
            from fedms.data.language import REMEDY

            raise DataError(f"--data: {answers.data} is not on this machine. {REMEDY}")
    elif place.texts:
        raise ConfigError(f"--task: texts in files of their own have no labels; write {answers.data} as a table with the columns text and "
                          "label, or give --task causal_lm")
    return replace(answers, task=task)


def _with_model(answers: Answers, model: str) -> Answers:
    """Note the model, and what its files say."""
    from fedms.models.inspection import look

    seen = look(model)
    images = answers.images or seen.reads == "images"
    columns = {"image" if images and key == "text" else key: name for key, name in answers.columns.items()}
    return replace(answers, model=model, images=images, columns=columns, chat=seen.has_chat_template, max_tokens=seen.max_tokens)


def _written(table: Path, answers: Answers, delimiter: Optional[str], encoding: Optional[str]) -> Answers:
    """Note the format of the tables: as the options say, otherwise as guessed from one of the tables. Guesses are printed."""
    from fedms.data.guess import guess_format

    guess = guess_format(table)
    for key, option, found in (("delimiter", delimiter, guess.delimiter),
                               ("encoding", encoding, guess.encoding if guess.encoding != "utf-8" else None)):
        if option is None and found is not None:
            say(f"guessed: data.{key} = {json.dumps(found)}; another one is given by --{key}")
    return replace(answers, delimiter=delimiter or guess.delimiter, encoding=encoding or guess.encoding)


def _read(path: Path, answers: Answers) -> Table:
    """Return a table with all its columns.

    Raises:
        DataError: If the table cannot be read.
    """
    from fedms.data.tables import read_table

    config = load_config("sentiment").data.model_copy(update={"delimiter": answers.delimiter, "encoding": answers.encoding})
    return read_table(path, config, {}, every=True)


def _looked_at(answers: Answers) -> Answers:
    """Read data that are on this machine, say what was found, and note whether they say whose a sample is.

    Raises:
        DataError: If the answers do not fit the data.
    """
    if not Path(answers.data).expanduser().exists():
        say(f"{answers.data} is fetched from the hub by the first run, which says what it found")
        return replace(answers, owned=answers.client is not None)
    config = _check(run_file(answers), Path("the answers"))
    if answers.learns_language:
        return _looked_at_language(answers, config)
    from fedms.data import user_data
    from fedms.data.labels import classes_of

    samples = user_data.read(config.data, "images" if answers.images else "text")
    classes_of(config.data, samples)
    for line in (_found(samples), *samples.notes):
        say(f"found: {line}")
    return replace(answers, owned=samples.clients is not None)


def _looked_at_language(answers: Answers, config: RunConfig) -> Answers:
    from fedms.data import language
    from fedms.data.samples import counted

    material = language.read(config.data)
    plain = not material.exchanges[0].messages
    size = sum(len(exchange.answer) for exchange in material.exchanges)
    what = f"{counted(len(material.exchanges), 'text' if plain else 'answer')} of {counted(size, 'character')}"
    for line in (f"{what}; {_owners(material.clients)}", *material.notes):
        say(f"found: {line}")
    # Plain texts are cut into pieces of so many tokens, each of some four or five characters.
    samples = max(len(material.exchanges), size // (5 * answers.sequence) if plain else 0)
    return replace(answers, owned=material.clients is not None, clients=max(2, min(answers.clients, samples // SAMPLES)))


def _owners(clients: Optional[list[str]]) -> str:
    from fedms.data.samples import counted

    return counted(len(set(clients)), "client") if clients else "no column is named as their owner (--client), so clients are simulated"


def _found(samples: Samples) -> str:
    """Return how many samples, labels and clients there are, in one line."""
    from fedms.data.samples import counted

    labels = Counter(map(str, samples.labels))
    shown = ", ".join(f"{label} ({count:,})" for label, count in labels.most_common(5))
    return (f"{counted(len(samples.content), 'sample')}; {len(labels)} labels: {shown}{', ...' if len(labels) > 5 else ''}; "
            + _owners(samples.clients))


def _check(text: str, file: Path) -> RunConfig:
    """Return the configuration that the text of a run file means. ConfigError if it cannot be used."""
    from fedms.config import config_from_dict
    from fedms.foreign import parse_toml

    try:
        return config_from_dict(parse_toml(text))
    except ConfigError as error:
        raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from None

