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

GLOBAL = "global"           # the name by which the expert that all clients share is addressed


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The text.
        log_p: Sum of the log-probabilities of its tokens at temperature 1.
        tokens: Number of tokens.
        gate_weight: Mean weight of the client's own expert; None if one expert answers alone.
        stopped: Whether a stop token ended the answer. Otherwise it was cut off.
    """

    text: str
    log_p: float
    tokens: int
    gate_weight: float | None
    stopped: bool


class LanguageModel:
    """A causal language model with the experts of a finished run. It generates one answer at a time."""

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
        """The ids of the clients that answer, by the names by which they are addressed."""
        groups = self.trained.task.groups
        names = list(groups.values())
        return {name if name is not None and names.count(name) == 1 else str(i): i for i, name in groups.items()}

    @property
    def shares_expert(self) -> bool:
        """Whether the clients share an expert, which answers where no client is named."""
        return self.method.name != "local"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all that answer: the global expert, if there is one, and the clients."""
        return (GLOBAL, *self.clients) if self.shares_expert else (*self.clients,)

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """Return the tokens of a question, or of a conversation whose last message is to be answered."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return prompt_tokens(self.tokenizer, messages, self.trained.task.config.data.template)

    def stream(self, messages: str | Sequence[Message], client: str | int | None = None,
               sampling: Sampling = Sampling()) -> Iterator[str]:
        """Yield an answer in pieces of text, as they are generated."""
        tokens, _ = self._tokens(messages, client, sampling)
        return text_pieces(self.tokenizer, tokens, self.stop_tokens)

    def answer(self, messages: str | Sequence[Message], client: str | int | None = None,
               sampling: Sampling = Sampling()) -> Answer:
        """Generate an answer.

        Args:
            messages: A question, or messages with a role and a content.
            client: Id or name of the client; None for the global expert.
            sampling: How tokens are chosen.

        Raises:
            ConfigError: If there is no such client, or no global expert.
            ValueError: If the prompt leaves no room for an answer.
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
                yield from answerer.tokens(prompt, sampling)
        return tokens(), answerer

    def answerer(self, number: int | None) -> Answerer:
        """Return what generates the answers of a client, or of the global expert if `number` is None.

        Two threads must not use it at the same time.
        """
        with self._alone:
            if self._loaded is None or self._loaded[0] != number:
                private = Private() if number is None else self.trained.private.get(number, Private())
                if number is None and not self.shares_expert:
                    raise ConfigError(f"client: the method {self.method.name} shares no expert; clients are: {', '.join(self.clients)}")
                self.model.clear()
                self._loaded = number, Answerer(self.model, self.method.speaker(self.model, private, self.trained.final))
            return self._loaded[1]


def open_language_model(folder: Path, states: Path | None = None, device: str = "auto") -> LanguageModel:
    """Open the language model of a run folder, or of a folder that `fedms export --format mixture` wrote.

    Args:
        folder: The folder.
        states: For a run on Flower, the folder in which clients keep their private experts.
        device: Where it computes, as in `[run] device`.

    Raises:
        RunFolderError, CheckpointError, ConfigError, ModelError: As `fedms export` and `fedms.load` do.
    """
    if (folder / MANIFEST).is_file():
        from fedms.exports.mixture import load

        loaded = load(folder, device=device)
        return LanguageModel(loaded.model, loaded.trained)
    trained = read_trained_run(folder, states)
    task = trained.task
    if task.config.task.kind != "causal_lm":
        raise ConfigError(f"{folder}: the run is of task.kind {task.config.task.kind!r}, which predicts classes; use `fedms "
                          "predict`")
    foundation = models.load(task.config.model, task.config.task.kind)
    check_fingerprint(foundation, task)
    return LanguageModel(bind(foundation, task, device), trained)
