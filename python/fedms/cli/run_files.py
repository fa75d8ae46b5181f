"""The text of the run file that `fedms init` writes, with a comment on every key."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

from fedms.config import registry

LONGEST_SEQUENCE = 256          # tokens of a question with its answer, where the model reads as many
TEMPLATE = "Question: {prompt}\nAnswer: {answer}"
SIMULATED_CLIENTS = 10

_COLUMNS = {"text": "column of texts", "image": "column of images", "label": "column of labels", "question": "column of questions",
            "answer": "column of answers", "messages": "column of conversations: lists of messages with a role and a content"}


@dataclass(frozen=True)
class Answers:
    """What the questions of `fedms init` gave.

    Attributes:
        data: Path of a table, a text or a folder, or id of a data set of the Hugging Face hub.
        columns: Names of the columns that are read, by their keys in [data]: text or image, and label; or what a language model
            learns. None where the data are a folder of images or texts.
        client: Column that says whose a sample is, or None.
        model: Name, folder or hub id of the foundation model.
        task: "classification" or "causal_lm".
        images: Whether the samples are images.
        owned: Whether the data say whose a sample is, by that column or by their files or folders.
        clients: How many clients are simulated, if nobody owns the samples.
        delimiter: Character between the fields of a table, or None for the usual one.
        encoding: Encoding of a table or a text.
        empty: Whether a table has rows in which one of these columns is empty.
        chat: Whether the language model has a chat template.
        max_tokens: The longest sequence that the model reads, or None if it is not known.
    """

    data: str
    columns: Mapping[str, str] = field(default_factory=dict)
    client: Optional[str] = None
    model: str = ""
    task: str = "classification"
    images: bool = False
    owned: bool = True
    clients: int = SIMULATED_CLIENTS
    delimiter: Optional[str] = None
    encoding: str = "utf-8"
    empty: bool = False
    chat: bool = False
    max_tokens: Optional[int] = None

    @property
    def learns_language(self) -> bool:
        """Whether a causal language model is trained."""
        return self.task == "causal_lm"

    @property
    def sequence(self) -> int:
        """Most tokens of a question with its answer, or of a piece of plain text."""
        return min(LONGEST_SEQUENCE, self.max_tokens or LONGEST_SEQUENCE)


def run_file(answers: Answers) -> str:
    """Return the text of a run file, with a comment on every key."""
    return "\n".join([
        "# A run file of FedMS, written by `fedms init`. `fedms run FILE` trains; `fedms run FILE --dry-run` prints every key.",
        "# All keys and their meaning: docs/reference/configuration.md.", "",
        *(["[task]", 'kind = "causal_lm"  # the next token of an answer is learned; docs/guide/language-models.md', ""]
          if answers.learns_language else []),
        "[model]", f"id = {_quoted(answers.model)}  # the frozen foundation model: a built-in name, a folder, or a hub id",
        *(['# frozen = "int8_rotated"  # its weights in a quarter of the memory, rounded'] if answers.learns_language else []), "",
        *_data(answers), "",
        "[clients]", "# count is the number of clients in the data; sampled each round: fraction = 0.5" if answers.owned else
        f"count = {answers.clients}  # simulated clients", "",
        *(_language_stages() if answers.learns_language else _stages()), "",
        "[run]", f'method = "{registry.RECOMMENDED}"  # `fedms compare FILE` runs all methods', "seed = 0", ""])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _data(answers: Answers) -> list[str]:
    lines = ["[data]", f"name = {_quoted(answers.data)}  # a table, a text, or a folder of them" if answers.learns_language else
             f"name = {_quoted(answers.data)}  # a table, a folder, or a hub data set"]
    lines += [f"{key} = {_quoted(name)}  # {_COLUMNS[key]}" for key, name in answers.columns.items()]
    if answers.delimiter is not None:
        lines.append(f"delimiter = {_quoted(answers.delimiter)}  # character between the fields of a row")
    if answers.encoding != "utf-8":
        lines.append(f"encoding = {_quoted(answers.encoding)}  # of the files' text")
    if answers.client is not None:
        lines.append(f"client = {_quoted(answers.client)}  # column that says whose a sample is; each value is one client")
    if answers.empty:
        lines.append('empty = "drop"  # rows without one of these are left out; "error": they are refused')
    if answers.learns_language:
        lines += _tokens(answers)
    if not answers.owned:
        lines += (['partition = "iid"  # nobody owns the samples, so they are dealt evenly to simulated clients'] if answers.learns_language
                  else ['partition = "dirichlet"  # nobody owns the samples, so they are dealt to simulated clients',
                        "alpha = 0.5  # the smaller, the more do the clients' classes differ"])
    return [*lines, "# max_samples = 2000  # a stratified subsample, for a first look"]


def _tokens(answers: Answers) -> list[str]:
    """Return the keys that say how a language model's samples become tokens."""
    if "question" not in answers.columns and "messages" not in answers.columns:
        return [f"max_tokens = {answers.sequence}  # a longer text is cut into pieces of so many tokens, and nothing is lost"]
    template = ('template = "chat"  # the model\'s chat template; or "plain", or a text with {prompt} in it and {answer} at its end'
                if answers.chat else
                f'template = {_quoted(TEMPLATE)}  # how both are written for the model; "chat": by its chat template')
    return [template, f"max_tokens = {answers.sequence}  # of a question with its answer; a longer question loses its beginning",
            'long_answers = "cut"  # an answer that is longer by itself loses its end; "drop": it is left out; "error": it is refused',
            '# loss_on = "all"  # questions are learned, too']


def _stages() -> list[str]:
    return ["[stage1]  # all clients train one global expert together", "rounds = 8", "# lr = 0.01", "",
            "[stage2]  # each client trains a local expert and the gate that mixes the two", "rounds = 4", "# lr = 0.005"]


def _language_stages() -> list[str]:
    return ["[stage1]  # all clients train one global expert together", "rounds = 4", "lr = 2e-3  # learning rate",
            "batch = 4  # samples a step; more take more memory", "",
            "[stage2]  # each client trains a local expert, which is mixed with the global one", "rounds = 3", "lr = 2e-3", "batch = 4", "",
            "[gate]",
            'on = "probabilities"  # what is mixed; keeps four numbers a token of the global expert, where "logits" keeps its hidden state']
