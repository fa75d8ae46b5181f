"""`fedms init`: a commented run file for a user's own data, from five questions."""
from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fedms.config import ConfigError, RunConfig, load_config, registry
from fedms.errors import DataError, RunFolderError
from fedms.storage.durable import write_durably

from .command import START, command
from .terminal import say, show

if TYPE_CHECKING:
    from fedms.data.samples import Samples
    from fedms.data.tables import Table

TEXT_MODEL, IMAGE_MODEL = "minilm", "google/vit-base-patch16-224-in21k"
SIMULATED_CLIENTS = 10
# Names that columns often have, the likeliest first.
TEXTS = ("text", "sentence", "review", "content", "message", "question", "body", "title")
IMAGES = ("image", "img", "photo", "picture", "file", "filename", "path")
LABELS = ("label", "class", "category", "target", "rating", "sentiment", "y")
CLIENTS = ("client", "user", "site", "hospital", "office", "team", "group", "device", "source", "domain")


@dataclass(frozen=True)
class Answers:
    """What the five questions gave.

    Attributes:
        data: Path of a table or a folder, or id of a data set of the Hugging Face hub.
        content: Column of texts or images, or None where the data are a folder of images.
        label: Column of labels, or None likewise.
        client: Column that says whose a sample is, or None.
        model: Name, folder or hub id of the foundation model.
        images: Whether the content is images.
        owned: Whether the data say whose a sample is, by that column or by their files or folders.
        delimiter: Character between the fields of a table, or None for the usual one.
        encoding: Encoding of a table.
        empty: Whether a table has rows in which one of these columns is empty.
    """

    data: str
    content: Optional[str]
    label: Optional[str]
    client: Optional[str]
    model: str
    images: bool = False
    owned: bool = True
    delimiter: Optional[str] = None
    encoding: str = "utf-8"
    empty: bool = False


@command(
    START,
    "fedms init                          # asks, then writes my-run.toml",
    "fedms init mail.toml --data mail.csv --label folder",
    "fedms init mail.toml --data mail.csv --label folder --client office --yes",
    notes=["What options leave open is asked; with --yes, or without a terminal, it is guessed, and the guess is printed.",
           "The data are read once to see that the answers fit them; nothing is trained. Edit the file as you like: "
           "`fedms run FILE --dry-run` checks it and prints every key.",
           "It asks for labels; the run file of a language model is in docs/start/language_model.md."])
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The run file to write.")] = Path("my-run.toml"),
    data: Annotated[Optional[str], typer.Option(
        "--data", metavar="PATH|ID", help="A table (.csv, .tsv, .parquet, .jsonl), a folder of tables or of images "
        "(CLASS/IMAGE or CLIENT/CLASS/IMAGE), or a data set of the Hugging Face hub.", show_default="asked")] = None,
    content: Annotated[Optional[str], typer.Option(
        "--text", "--image", metavar="NAME", help="Column of texts, or of images.", show_default="asked")] = None,
    label: Annotated[Optional[str], typer.Option(
        "--label", metavar="NAME", help="Column of labels.", show_default="asked")] = None,
    client: Annotated[Optional[str], typer.Option(
        "--client", metavar="NAME", help="Column that says whose a sample is; none: clients are simulated.",
        show_default="asked")] = None,
    model: Annotated[Optional[str], typer.Option(
        "--model", metavar="NAME|ID", help=f"Foundation model: {', '.join(registry.models())}, a folder, or an id of "
        "the Hugging Face hub.", show_default="asked")] = None,
    delimiter: Annotated[Optional[str], typer.Option(
        "--delimiter", metavar="C", help="Character between the fields of a .csv or .tsv.", show_default="guessed")] = None,
    encoding: Annotated[Optional[str], typer.Option(
        "--encoding", metavar="NAME", help="Encoding of a table of text, such as cp1252.", show_default="guessed")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the guess for each open question.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Ask five questions about your data, and write a commented run file that trains on them."""
    if file.exists() and not force:
        raise RunFolderError(f"{file}: exists already; choose another file, or replace it by --force")
    asks = not yes and _has_terminal()
    if data is None and not asks:
        raise ConfigError("--data: without a terminal to ask on, name the data: fedms init --data mail.csv")
    data = data or _ask("1. Where are your data? A table, a folder, or a hub data set", None)
    tables, images = _tables(data)
    answers, table = Answers(data, None, None, None, "", images), None
    if tables:
        answers = _written(tables[0], answers, delimiter, encoding)
        table = _read(tables[0], answers)
        content, label, client = _chosen_columns(table, content, label, client, asks)
    if content or label or client:
        client = None if client in (None, "none") else client
        answers = replace(answers, content=content or "text", label=label or "label", client=client,
                          images=images or (content or "").lower() in IMAGES,
                          empty=table is not None and _has_gaps(table, (content, label, client)))
    usual = IMAGE_MODEL if answers.images else TEXT_MODEL
    model = model or (_ask("5. Which foundation model? A built-in name, a folder, or a hub id", usual) if asks else usual)
    answers = _looked_at(replace(answers, model=model, images=answers.images or _reads_images(model)))
    text = run_file(answers)
    _check(text, file)
    try:
        write_durably(file, text.encode())
    except OSError as error:
        raise RunFolderError(f"{file}: cannot be written: {error.strerror or error}") from error
    show(f"{file}: written. Now:  fedms run {file}")


def _has_terminal() -> bool:
    return sys.stdin.isatty()


def _ask(question: str, default: Optional[str]) -> str:
    return typer.prompt(question, default=default, err=True).strip()


def _chosen_columns(table: Table, content: Optional[str], label: Optional[str], client: Optional[str],
                    asks: bool) -> tuple[str, str, str]:
    """Return the columns of texts or images, of labels, and of clients ("none" for no column): as given, asked, or guessed.

    Raises:
        ConfigError: If a column is not there, or the label cannot be guessed.
    """
    from fedms.data.guess import longest_texts, repeated_values

    names = list(table.names)
    if content is None:
        guess = _named(names, TEXTS) or _named(names, IMAGES) or longest_texts(table)
        content = _choose("2. Which column holds the texts or images?", "image" if (guess or "").lower() in IMAGES else "text",
                          names, guess, asks)
    rest = [name for name in names if name != content]
    values = {} if label else repeated_values(table, but=(content, client or ""))
    guess = _named(rest, LABELS) or (next(iter(values), None) if asks or len(values) == 1 else None)
    if label is None and guess is None and not asks:
        shown = ", ".join(f"{name} ({count} values)" for name, count in values.items()) or ", ".join(rest) or "none"
        raise ConfigError(f"--label: no column has a usual name for labels ({', '.join(LABELS[:3])}, ...); name one of: {shown}")
    label = label or _choose("3. Which column holds the label?", "label", rest, guess, asks)
    rest = [name for name in rest if name != label]
    client = client or _choose("4. Which column says whose a sample is? (none: clients are simulated)", "client",
                               [*rest, "none"], _named(rest, CLIENTS) or "none", asks)
    return content, label, client


def _named(names: list[str], likely: tuple[str, ...]) -> Optional[str]:
    """Return the name that stands first in the list of likely names, or None."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[word] for word in likely if word in lower), None)


def _has_gaps(table: Table, names: tuple[Optional[str], ...]) -> bool:
    """Return whether a cell of one of these columns is empty."""
    from fedms.data.samples import is_missing

    return any(is_missing(cell) for name in names for cell in table.columns.get(name, ()))


def _choose(question: str, key: str, names: list[str], guess: Optional[str], asks: bool) -> str:
    """Return one of the names: the answer to a question, or else the guess, which is said.

    Args:
        question: The question.
        key: Key of the table [data] that the answer becomes, and the option's name.
        names: The names to choose from.
        guess: The likeliest one, or None.
        asks: Whether there is somebody to ask.

    Raises:
        ConfigError: If the answer is none of them.
    """
    if not names or (guess is None and not asks):
        raise ConfigError(f"{question} the table has no column for it; a table needs one of texts or images, and one of labels")
    if not asks:
        if guess != "none":
            say(f"guessed: data.{key} = {json.dumps(guess, ensure_ascii=False)}; another one is given by --{key}")
        return guess
    answer = _ask(f"{question} {', '.join(names)}", guess)
    if answer not in names:
        raise ConfigError(f"{question} got {answer!r}; the columns are {', '.join(names)}")
    return answer


def _tables(data: str) -> tuple[list[Path], bool]:
    """Return the tables of the data, and whether they are a folder of images instead.

    Data that are not on this machine have neither.

    Raises:
        DataError: If the name is that of a file or folder that does not exist, or that holds neither tables nor images.
    """
    path = Path(data).expanduser()
    if not path.exists():
        if data.startswith((".", "/", "~")) or path.suffix or data.count("/") > 1:
            raise DataError(f"--data: {path}: no such file or folder (seen from {Path.cwd()})")
        return [], False
    say(f"looking at {path} ...")
    from fedms.data.image_folder import scan
    from fedms.data.tables import table_kind

    if path.is_dir():
        tree = scan(path)
        tables, images = sorted(tree.tables), not tree.tables and bool(tree.images)
    else:
        tables, images = [path] if table_kind(path) else [], False
    if not tables and not images:
        raise DataError(f"--data: {path} is neither a table (.csv, .tsv, .parquet, .jsonl) nor a folder of tables or images")
    return tables, images


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


def _reads_images(model: str) -> bool:
    row = registry.models().get(model)
    return row is not None and row.reads == "images"


def _looked_at(answers: Answers) -> Answers:
    """Read data that are on this machine, say what was found, and note whether they say whose a sample is.

    Raises:
        DataError: If the answers do not fit the data.
    """
    if not Path(answers.data).expanduser().exists():
        say(f"{answers.data} is fetched from the hub by the first run, which says what it found")
        return replace(answers, owned=answers.client is not None)
    from fedms.data import user_data
    from fedms.data.labels import classes_of

    config = _check(run_file(answers), Path("the answers"))
    samples = user_data.read(config.data, "images" if answers.images else "text")
    classes_of(config.data, samples)
    for line in (_found(samples), *samples.notes):
        say(f"found: {line}")
    return replace(answers, owned=samples.clients is not None)


def _found(samples: Samples) -> str:
    """Return how many samples, labels and clients there are, in one line."""
    from fedms.data.samples import counted

    labels, clients = Counter(map(str, samples.labels)), set(samples.clients or ())
    shown = ", ".join(f"{label} ({count:,})" for label, count in labels.most_common(5))
    return (f"{counted(len(samples.content), 'sample')}; {len(labels)} labels: {shown}{', ...' if len(labels) > 5 else ''}; "
            + (counted(len(clients), "client") if clients else "no column is named as their owner (--client), so clients are simulated"))


def _check(text: str, file: Path) -> RunConfig:
    """Return the configuration that the text of a run file means. ConfigError if it cannot be used."""
    from fedms.config import config_from_dict
    from fedms.foreign import parse_toml

    try:
        return config_from_dict(parse_toml(text))
    except ConfigError as error:
        raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from None


def run_file(answers: Answers) -> str:
    """Return the text of a run file, with a comment on every key."""
    quoted = {name: json.dumps(getattr(answers, name), ensure_ascii=False) for name in ("data", "label", "client", "model")}
    content = json.dumps(answers.content, ensure_ascii=False)
    lines = [
        "# A run file of FedMS, written by `fedms init`. `fedms run FILE` trains; `fedms run FILE --dry-run` prints every key.",
        "# All keys and their meaning: docs/reference/configuration.md.", "",
        "[model]", f"id = {quoted['model']}  # the frozen foundation model: a built-in name, a folder, or a hub id", "",
        "[data]", f"name = {quoted['data']}  # a table, a folder, or a hub data set"]
    if answers.content is not None:
        lines += [f"{'image' if answers.images else 'text'} = {content}  # column of {'images' if answers.images else 'texts'}",
                  f"label = {quoted['label']}  # column of labels"]
    if answers.delimiter is not None:
        lines.append(f"delimiter = {json.dumps(answers.delimiter)}  # character between the fields of a row")
    if answers.encoding != "utf-8":
        lines.append(f"encoding = {json.dumps(answers.encoding)}  # of the table's text")
    if answers.client is not None:
        lines.append(f"client = {quoted['client']}  # column that says whose a sample is; each value is one client")
    if answers.empty:
        lines.append('empty = "drop"  # rows without one of these are left out; "error": they are refused')
    if not answers.owned:
        lines += ['partition = "dirichlet"  # nobody owns the samples, so they are dealt to simulated clients',
                  "alpha = 0.5  # the smaller, the more do the clients' classes differ"]
    lines += ["# max_samples = 2000  # a stratified subsample, for a first look", "",
              "[clients]"]
    lines += ["# count is the number of clients in the data; sampled each round: fraction = 0.5" if answers.owned else
              f"count = {SIMULATED_CLIENTS}  # simulated clients", "",
              "[stage1]  # all clients train one global expert together", "rounds = 8", "# lr = 0.01", "",
              "[stage2]  # each client trains a local expert and the gate that mixes the two", "rounds = 4", "# lr = 0.005",
              "", "[run]", f'method = "{registry.RECOMMENDED}"  # `fedms compare FILE` runs all methods', "seed = 0", ""]
    return "\n".join(lines)
