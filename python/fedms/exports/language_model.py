"""A run of a causal language model, or its export, ready to answer."""
from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedms import methods, models
from fedms.data.conversations import Message, prompt_tokens
from fedms.errors import ConfigError
from fedms.exports.manifest import MANIFEST
from fedms.exports.predict import bind
from fedms.exports.trained_run import TrainedRun, check_fingerprint, read_trained_run
from fedms.federated.client import Private
from fedms.models.causal_lm import CausalModel
from fedms.models.generation import Sampling, Token, text_pieces
from fedms.training.answering import Answerer
from fedms.training.expert_model import ExpertModel


@dataclass(frozen=True)
class Answer:
    """What was generated: text; log_p: the sum of its tokens' log-probabilities at temperature 1; tokens: how many;
    gate_weight: mean weight of the client's own expert, None where one expert answers alone; stopped: whether it ended by
    itself, or for want of room."""

    text: str
    log_p: float
    tokens: int
    gate_weight: float | None
    stopped: bool


class LanguageModel:
    """The experts of a finished run on their language model. One answer is made at a time."""

    def __init__(self, model: ExpertModel, trained: TrainedRun) -> None:
        config, foundation = trained.task.config, model.foundation
        if config.task.kind != "causal_lm" or not isinstance(foundation, CausalModel):
            raise ConfigError(f"the run is of task.kind {config.task.kind!r}, which predicts classes; use `fedms predict`")
        self.model, self.trained, self.method = model, trained, methods.create(config)
        self.tokenizer, self.stop_tokens = foundation.tokenizer, foundation.stop_tokens
        self._alone = threading.Lock()
        self._loaded: tuple[int | None, Answerer] | None = None

    @property
    def clients(self) -> Mapping[str, int]:
        """Names of clients that answer, by which they are asked for, and their ids."""
        groups = self.trained.task.groups
        names = list(groups.values())
        return {name if name is not None and names.count(name) == 1 else str(i): i for i, name in groups.items()}

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """The tokens of a question, or of a conversation whose last message is to be answered."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return prompt_tokens(self.tokenizer, messages, self.trained.task.config.data.template)

    def stream(self, messages: str | Sequence[Message], client: str | int | None = None,
               sampling: Sampling = Sampling()) -> Iterator[str]:
        """The answer in pieces of text, as they come."""
        tokens, _ = self._tokens(messages, client, sampling)
        return text_pieces(self.tokenizer, tokens, self.stop_tokens)

    def answer(self, messages: str | Sequence[Message], client: str | int | None = None,
               sampling: Sampling = Sampling()) -> Answer:
        """The whole answer.

        Args:
            messages: a question, or messages with a role and a content.
            client: id or name; None: the global expert.

        Raises:
            ConfigError: if there is no such client, or no global expert.
            ValueError: for a prompt that leaves no room for an answer.
        """
        tokens, answerer = self._tokens(messages, client, sampling)
        found = list(tokens)
        weights = answerer.weights
        return Answer("".join(text_pieces(self.tokenizer, iter(found), self.stop_tokens)), sum(t.log_p for t in found), len(found),
                      sum(weights) / len(weights) if weights else None, found[-1].id in self.stop_tokens)

    def _tokens(self, messages: str | Sequence[Message], client: str | int | None,
                sampling: Sampling) -> tuple[Iterator[Token], Answerer]:
        number, prompt = self.trained.client(client), self.prompt(messages)
        answerer = self.answerer(number)

        def tokens() -> Iterator[Token]:
            with self._alone:
                answerer.weights.clear()
                yield from answerer.tokens(prompt, sampling)
        return tokens(), answerer

    def answerer(self, number: int | None) -> Answerer:
        """What answers for the client of this id, or for none in particular; it is not to be used by two threads at once."""
        with self._alone:
            if self._loaded is None or self._loaded[0] != number:
                private = Private() if number is None else self.trained.private.get(number, Private())
                if number is None and self.method.name == "local":
                    raise ConfigError("client: the method local shares no expert; give a client")
                self.model.clear()
                self._loaded = number, Answerer(self.model, self.method.speaker(self.model, private, self.trained.final))
            return self._loaded[1]


def open_language_model(folder: Path, states: Path | None = None) -> LanguageModel:
    """The language model of a run folder, or of a folder that `fedms export --format mixture` wrote.

    Args:
        states: of a run on Flower, where clients keep what is their own.

    Raises:
        RunFolderError, CheckpointError, ConfigError, ModelError: as `fedms export` and `fedms.load` do.
    """
    if (folder / MANIFEST).is_file():
        from fedms.exports.mixture import load

        loaded = load(folder)
        return LanguageModel(loaded.model, loaded.trained)
    trained = read_trained_run(folder, states)
    task = trained.task
    if task.config.task.kind != "causal_lm":
        raise ConfigError(f"{folder}: the run is of task.kind {task.config.task.kind!r}, which predicts classes; use `fedms "
                          "predict`")
    foundation = models.load(task.config.model, task.config.task.kind)
    check_fingerprint(foundation, task)
    return LanguageModel(bind(foundation, task), trained)
