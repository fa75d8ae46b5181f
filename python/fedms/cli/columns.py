"""Which columns of a user's table hold what, and what is learned from them: as `fedms init` is told, by asking, or by a guess."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Optional

import typer

from fedms.errors import ConfigError

from .run_files import Answers
from .terminal import say

if TYPE_CHECKING:
    from fedms.data.tables import Table

TASKS = ("classification", "causal_lm")
# Columns that are read together, by task.
TOGETHER = {"classification": (("text", "label"),), "causal_lm": (("messages",), ("question", "answer"), ("text",))}
# Names that columns often have, the likeliest first.
TEXTS = ("text", "sentence", "review", "content", "message", "question", "body", "title")
IMAGES = ("image", "img", "photo", "picture", "file", "filename", "path")
LABELS = ("label", "class", "category", "target", "rating", "sentiment", "y")
CLIENTS = ("client", "user", "site", "hospital", "office", "team", "group", "device", "source", "domain")
QUESTIONS = ("question", "prompt", "instruction", "query", "input", "q")
ANSWERS = ("answer", "response", "completion", "output", "reply", "a")


def has_terminal() -> bool:
    """Return whether there is somebody to ask."""
    return sys.stdin.isatty()


def ask(question: str, default: Optional[str]) -> str:
    """Return what a user answers to a question, without spaces around it."""
    return typer.prompt(question, default=default, err=True).strip()


def chosen_task(named: Mapping[str, str], is_language_model: bool, table: Optional[Table], asks: bool) -> str:
    """Return what is learned, "classification" or "causal_lm": by the columns that are named, asked, or guessed.

    Args:
        named: Columns that options name, by their keys in [data].
        is_language_model: Whether the model is known to be a causal language model, which can be made a classifier, too.
        table: The data, or None where they are no table.
        asks: Whether there is somebody to ask.
    """
    if named.keys() & {"messages", "question", "answer"}:
        return "causal_lm"
    if "label" in named:
        return "classification"
    if table is None:
        return "causal_lm" if is_language_model else "classification"
    labeled = _likely(table.names, LABELS) is not None
    answered = all(_likely(table.names, names) for names in (QUESTIONS, ANSWERS)) or _conversations(table) is not None
    guess = "causal_lm" if (is_language_model or answered) and not labeled else "classification"
    if asks:
        return _chosen("2. What is learned? classification: a label of each sample; causal_lm: a language model's answers or texts.", TASKS,
                       guess)
    if guess == "causal_lm":
        say('guessed: task.kind = "causal_lm"; another one is given by --task')
    return guess


def check_together(task: str, named: Iterable[str]) -> None:
    """Raise a ConfigError if options name columns that a task does not read, or not together; `named` are their keys in [data]."""
    if not any(set(named) <= set(columns) for columns in TOGETHER[task]):
        accepted = ", or ".join(" and ".join(f"--{key}" for key in columns) for columns in TOGETHER[task])
        raise ConfigError(f"{', '.join(f'--{key}' for key in named)}: --task {task} reads {accepted}; leave the others out, or give "
                          "another --task")


def with_columns(answers: Answers, table: Table, named: Mapping[str, str], client: Optional[str], asks: bool) -> Answers:
    """Add the columns of a table to answers: as they are named, asked, or guessed.

    Args:
        answers: The answers so far.
        table: A table with all its columns.
        named: Columns that options name, by their keys in [data].
        client: Column that says whose a sample is, "none" for no column, or None if that is open.
        asks: Whether there is somebody to ask.

    Raises:
        ConfigError: If a column is not there, or the label cannot be guessed.
    """
    from fedms.data.samples import is_missing

    columns = (_language_columns if answers.learns_language else _labeled_columns)(table, named, client, asks)
    rest = [name for name in table.names if name not in columns.values()]
    client = client or _choose("5. Which column says whose a sample is? (none: clients are simulated)", "client", [*rest, "none"],
                               _likely(rest, CLIENTS) or "none", asks)
    needed = [*columns.values(), *([client] if client != "none" else [])]
    return replace(answers, columns=columns, client=None if client == "none" else client, images="image" in columns,
                   empty=any(is_missing(cell) for name in needed for cell in table.columns.get(name, ())))


def _labeled_columns(table: Table, named: Mapping[str, str], client: Optional[str], asks: bool) -> dict[str, str]:
    """Return the columns of texts or images, and of labels."""
    from fedms.data.guess import longest_texts, repeated_values

    names, content, label = list(table.names), named.get("text"), named.get("label")
    if content is None:
        guess = _likely(names, TEXTS) or _likely(names, IMAGES) or longest_texts(table)
        content = _choose("3. Which column holds the texts or images?", "image" if _is_image(guess) else "text", names, guess, asks)
    rest = [name for name in names if name != content]
    values = {} if label else repeated_values(table, but=(content, client or ""))
    guess = _likely(rest, LABELS) or (next(iter(values), None) if asks or len(values) == 1 else None)
    if label is None and guess is None and not asks:
        shown = ", ".join(f"{name} ({count} values)" for name, count in values.items()) or ", ".join(rest) or "none"
        raise ConfigError(f"--label: no column has a usual name for labels ({', '.join(LABELS[:3])}, ...); name one of: {shown}. Without "
                          "labels, --task causal_lm trains a language model")
    label = label or _choose("4. Which column holds the label?", "label", rest, guess, asks)
    return {"image" if _is_image(content) else "text": content, "label": label}


def _language_columns(table: Table, named: Mapping[str, str], client: Optional[str], asks: bool) -> dict[str, str]:
    """Return the columns of questions and answers, of conversations, or of plain texts."""
    from fedms.data.guess import longest_texts

    given = {key: named[key] for key in ("messages", "question", "answer", "text") if key in named}
    if given and not given.keys() & {"question", "answer"}:
        return given
    names = [name for name in table.names if name != client]
    conversations = _conversations(table)
    asked, answer = given.get("question") or _likely(names, QUESTIONS), given.get("answer") or _likely(names, ANSWERS)
    if not given and not asks and conversations:
        say(f"guessed: data.messages = {json.dumps(conversations, ensure_ascii=False)}; another one is given by --messages")
        return {"messages": conversations}
    if given or asks or (asked and answer):
        guess = asked if answer else conversations or _likely(names, TEXTS) or longest_texts(table)
        first = given.get("question") or _choose("3. Which column holds the questions, the conversations, or the texts?", "question",
                                                 names, guess, asks)
        rest = [name for name in names if name != first]
        second = given.get("answer") or _choose("4. Which column holds the answers? (none: there are no questions)", "answer",
                                                [*rest, "none"], answer if answer in rest else "none", asks)
        if second != "none":
            return {"question": first, "answer": second}
        if "question" in given:
            raise ConfigError(f"--answer: no column has a usual name for answers ({', '.join(ANSWERS[:3])}, ...); name one of: "
                              f"{', '.join(rest) or 'none'}")
        return {"messages": first} if first == conversations else {"text": first}
    return {"text": _choose("3. Which column holds the texts?", "text", names, _likely(names, TEXTS) or longest_texts(table), asks)}


def _conversations(table: Table) -> Optional[str]:
    """Return the first column whose cells are lists of messages, or such lists as JSON; None if there is none."""
    from fedms.data.conversations import conversation
    from fedms.data.samples import is_missing
    from fedms.errors import DataError

    for name, cells in table.columns.items():
        first = next((cell for cell in cells if not is_missing(cell)), None)
        try:
            if not isinstance(first, str) or first.lstrip().startswith("["):
                conversation(first, name)
                return name
        except DataError:
            continue
    return None


def _is_image(name: Optional[str]) -> bool:
    return (name or "").lower() in IMAGES


def _likely(names: Sequence[str], likely: tuple[str, ...]) -> Optional[str]:
    """Return the name that stands first in the list of likely names, or None."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[word] for word in likely if word in lower), None)


def _choose(question: str, key: str, names: list[str], guess: Optional[str], asks: bool) -> str:
    """Return one of the columns: the answer to a question, or else the guess, which is said.

    Args:
        question: The question.
        key: Key of the table [data] that the answer becomes, and the option's name.
        names: The columns to choose from.
        guess: The likeliest one, or None.
        asks: Whether there is somebody to ask.

    Raises:
        ConfigError: If the answer is none of them.
    """
    if not names or (guess is None and not asks):
        raise ConfigError(f"{question} the table has no column for it; its columns are {', '.join(names) or 'used already'}. Name one by "
                          f"--{key}")
    if asks:
        return _chosen(question, names, guess)
    if guess != "none":
        say(f"guessed: data.{key} = {json.dumps(guess, ensure_ascii=False)}; another one is given by --{key}")
    return guess


def _chosen(question: str, accepted: Sequence[str], guess: Optional[str]) -> str:
    answer = ask(f"{question} {', '.join(accepted)}", guess)
    if answer not in accepted:
        raise ConfigError(f"{question} got {answer!r}; accepted: {', '.join(accepted)}")
    return answer
