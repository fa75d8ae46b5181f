"""Data for causal language models: the built-in ones, and one's own tables of conversations, of prompts and answers, or of
plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from .samples import is_missing, normal
from .tables import TABLES, Table, complete_rows, read_table, table_kind, table_stem

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
    if config.name in BUILT_IN:
        exchanges, clients = BUILT_IN[config.name](config.path, config.max_samples, seed)
    else:
        exchanges, clients, categories = read(config)
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
                        group_names=group_names, answers=encoded.starts, notes=encoded.notes,
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


def read(config) -> tuple[list[Exchange], list[str] | None, list[str] | None]:
    """Read exchanges from a table, or a folder of tables, with the client and the category of each, if there are any.

    Args:
        config: The [data] table, in which `messages`, or `question` and `answer`, or `text` name the columns.
    """
    path = Path(config.name).expanduser()
    if path.is_dir():
        tables = sorted((t for t in scan(path).tables if t.parent == path), key=lambda table: natural(table_stem(table)))
    else:
        tables = [path] if path.is_file() and table_kind(path) else []
    if not tables:
        raise DataError(f"data.name: {config.name!r} is neither {' nor '.join(BUILT_IN)}, nor a table ({', '.join(TABLES)}), nor "
                        "a folder of tables; a data set of the hub is saved as .jsonl or .parquet first")
    content = _columns(config)
    wanted = {**content, **{f"data.{key}": normal(name) for key in ("client", "category") if (name := getattr(config, key))}}
    exchanges: list[Exchange] = []
    clients: list[str] = []
    categories: list[str] = []
    for file in tables:
        table = read_table(file, config, wanted)
        if config.empty == "drop":
            table = complete_rows(table, wanted.values())
        _check(table, wanted)
        for row, place in enumerate(table.places):
            found = _exchanges(table, content, row, place)
            exchanges += found
            owner = table.columns[wanted["data.client"]][row] if "data.client" in wanted else None
            clients += [table_stem(file) if owner is None else name_of(owner)] * len(found)
            if "data.category" in wanted:
                categories += [name_of(table.columns[wanted["data.category"]][row])] * len(found)
    grouped = "data.client" in wanted or len(tables) > 1
    return exchanges, clients if grouped else None, categories or None


def _columns(config) -> dict[str, str]:
    if config.messages and (config.question or config.answer):
        raise DataError("data.messages: a conversation holds its answers; leave out data.question and data.answer")
    if bool(config.question) != bool(config.answer):
        missing = "data.answer" if config.question else "data.question"
        raise DataError(f"{missing}: data.question and data.answer belong together; give both")
    keys = ("messages",) if config.messages else ("question", "answer") if config.question else ("text",)
    return {f"data.{key}": normal(getattr(config, key)) for key in keys}


def _check(table: Table, wanted: dict[str, str]) -> None:
    for key, name in wanted.items():
        if name not in table.columns:
            raise DataError(f"{table.source}: no column {name!r} ({key}); its columns are: {', '.join(table.names)}{table.hint}")
    if not table.places:
        raise DataError(f"{table.source}: holds no samples")
    for key in ("data.client", "data.category"):
        if key in wanted:
            bad = [i for i, value in enumerate(table.columns[wanted[key]]) if is_missing(value)]
            if bad:
                raise DataError(f"{table.places[bad[0]]} has nothing in column {wanted[key]!r} ({key}; {len(bad)} of "
                                f"{len(table.places)} rows)")


def _exchanges(table: Table, content: dict[str, str], row: int, place: str) -> list[Exchange]:
    values: list[Any] = [table.columns[name][row] for name in content.values()]
    if "data.messages" in content:
        return conversation(values[0], place)
    return [question(values[0], values[1], place)] if len(values) == 2 else [plain_text(values[0], place)]
