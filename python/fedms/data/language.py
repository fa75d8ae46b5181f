"""Data for causal language models: the built-in ones, and one's own tables of conversations, of prompts and answers, or of
plain texts; also plain texts in files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedms.errors import DataError

from . import dictionaries, projects
from .conversations import Encoded, Exchange, conversation, encode, plain_text, question
from .dataset import Dataset, make_dataset, stratified_sample
from .image_folder import scan
from .labels import groups_of, name_of, natural
from .samples import left_out, normal
from .tables import TABLES, Table, check_columns, complete_rows, read_plain_text, read_table, table_kind, table_stem

PLAIN = ".txt"              # a file of plain text
REMEDY = ("A data set of the hub, or one that save_to_disk wrote, is saved as a table first: datasets.load_dataset(ID, "
          'split="train").to_parquet("my-data.parquet"), or datasets.load_from_disk(FOLDER)')
UNLABELED = ("text",)       # what is in the place of class names where samples have no category
BUILT_IN = {"dictionaries": dictionaries.read, "projects": projects.read}


def load(config, model, seed: int) -> Dataset:
    """Load a data set for a causal language model, see `fedms.data.load`.

    Args:
        config: The [data] table of the run file.
        model: A `CausalModel`.
        seed: Seed of the subsample.
    """
    categories: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    if config.name in BUILT_IN:
        exchanges, clients = BUILT_IN[config.name](config.path, config.max_samples, seed)
    else:
        material = read(config)
        exchanges, clients, categories, notes = material.exchanges, material.clients, material.categories, material.notes
        if config.max_samples is not None:
            strata = _codes(clients or categories or [""] * len(exchanges))
            kept = stratified_sample(strata, config.max_samples, np.random.default_rng(seed))
            exchanges = [exchanges[i] for i in kept]
            clients = clients and [clients[i] for i in kept]
            categories = categories and [categories[i] for i in kept]
    encoded = as_tokens(exchanges, config, model)
    origin = encoded.origin.tolist()
    names = tuple(dict.fromkeys(categories)) if categories else UNLABELED
    labels = torch.tensor([names.index(categories[i]) for i in origin] if categories else [0] * len(origin))
    groups, group_names = groups_of(None if clients is None else [clients[i] for i in origin])
    sizes = torch.tensor([len(exchange.answer.encode()) for exchange in exchanges])
    pieces = torch.bincount(encoded.origin, minlength=len(exchanges))
    whole = (pieces[encoded.origin] == 1) & (config.loss_on == "answer")     # bytes are known of answers that are not cut
    return make_dataset(config.name, encoded.inputs, labels, names, groups=None if groups is None else torch.from_numpy(groups),
                        group_names=group_names, answers=encoded.starts, notes=(*notes, *encoded.notes),
                        answer_bytes=sizes[encoded.origin] if bool(whole.all()) else None)


def as_tokens(exchanges: Sequence[Exchange], config, model) -> Encoded:
    """Encode exchanges for a `CausalModel` as the [data] table says.

    Raises:
        DataError: As `encode` does.
        ModelError: If the model has no embedding of a token.
    """
    encoded = encode(exchanges, model.tokenizer, max_tokens=_max_tokens(config, model), template=config.template,
                     loss_on=config.loss_on, long_answers=config.long_answers, stop_tokens=model.stop_tokens)
    return replace(encoded, inputs=model.readable(encoded.inputs))


def _codes(names: Sequence[str]) -> np.ndarray:
    return np.unique(np.array(names), return_inverse=True)[1]


def _max_tokens(config, model) -> int:
    if config.max_tokens > model.max_tokens:
        raise DataError(f"data.max_tokens: got {config.max_tokens}, but {model.name} reads {model.max_tokens} tokens at most")
    return config.max_tokens


@dataclass(frozen=True)
class Material:
    """What was read to be learned.

    Attributes:
        exchanges: Prompts and answers, or plain texts.
        clients: The name of the client of each, or None if nobody owns them.
        categories: The category of each, or None without data.category.
        notes: One line for everything that was left out.
    """

    exchanges: list[Exchange]
    clients: list[str] | None
    categories: list[str] | None
    notes: tuple[str, ...]


def read(config) -> Material:
    """Read exchanges from a table or a file of plain text, or from a folder of them.

    Args:
        config: The [data] table, in which `messages`, or `question` and `answer`, or `text` name the columns.

    Raises:
        DataError: If there is no such file, one cannot be read, a column is missing, or a cell is empty.
    """
    files, notes = files_of(Path(config.name).expanduser())
    if not files:
        raise DataError(f"data.name: {config.name!r} is neither {' nor '.join(BUILT_IN)}, nor a table ({', '.join(TABLES)}) or a text "
                        f"({PLAIN}), nor a folder of them (seen from {Path.cwd()}). {REMEDY}")
    content = _columns(config)
    wanted = {**content, **{f"data.{key}": normal(name) for key in ("client", "category") if (name := getattr(config, key))}}
    exchanges: list[Exchange] = []
    clients: list[str] = []
    categories: list[str] = []
    for file in files:
        table = read_table(file, config, wanted) if table_kind(file) else read_plain_text(file, config)
        if config.empty == "drop":
            table = complete_rows(table, wanted.values())
        check_columns(table, wanted)
        notes += table.notes
        for row, place in enumerate(table.places):
            found = _exchanges(table, content, row, place)
            exchanges += found
            owner = table.columns[wanted["data.client"]][row] if "data.client" in wanted else None
            clients += [table_stem(file) if owner is None else name_of(owner)] * len(found)
            if "data.category" in wanted:
                categories += [name_of(table.columns[wanted["data.category"]][row])] * len(found)
    grouped = "data.client" in wanted or len(files) > 1
    return Material(exchanges, clients if grouped else None, categories or None, tuple(notes))


def files_of(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files that are read of a file or folder, in the order of their names, and notes about those that are not.

    A folder's tables are read; one without tables has its texts read. There are no files if there is nothing to read.

    Raises:
        DataError: If a folder cannot be listed.
    """
    if not path.is_dir():
        return [path] if path.is_file() and (table_kind(path) or path.suffix.lower() == PLAIN) else [], []
    tree = scan(path)
    tables = [table for table in tree.tables if table.parent == path]
    files = tables or [text for text in tree.others if text.parent == path and text.suffix.lower() == PLAIN]
    rest = [file for file in (*tree.tables, *tree.others) if file not in files]
    files.sort(key=lambda file: natural(table_stem(file)))
    return files, left_out(rest, path, f"as {'no tables' if tables else 'no texts'} of this folder itself") if files else []


def _columns(config) -> dict[str, str]:
    if config.messages and (config.question or config.answer):
        raise DataError("data.messages: a conversation holds its answers; leave out data.question and data.answer")
    if bool(config.question) != bool(config.answer):
        missing = "data.answer" if config.question else "data.question"
        raise DataError(f"{missing}: data.question and data.answer belong together; give both")
    keys = ("messages",) if config.messages else ("question", "answer") if config.question else ("text",)
    return {f"data.{key}": normal(getattr(config, key)) for key in keys}


def _exchanges(table: Table, content: dict[str, str], row: int, place: str) -> list[Exchange]:
    values: list[Any] = [table.columns[name][row] for name in content.values()]
    if "data.messages" in content:
        return conversation(values[0], place)
    return [question(values[0], values[1], place)] if len(values) == 2 else [plain_text(values[0], place)]
