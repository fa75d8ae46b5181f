"""What a causal language model is trained on: prompts and answers, as tokens.

An answer is never cut without a word: a prompt that leaves it too little room loses its beginning, and an answer that is too
long by itself is an error, is dropped or is cut, as `[data] long_answers` says. Both are counted in the notes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fedms.errors import DataError

from .inputs import TextInputs

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Exchange:
    """What comes before an answer, and the answer.

    Attributes:
        messages: The messages before the answer, each with a role and a content. Empty for plain text, which has no prompt.
        answer: The text of the answer, not empty.
        place: Where it came from, for error messages.
    """

    messages: tuple[Message, ...]
    answer: str
    place: str


def question(prompt: str, answer: str, place: str) -> Exchange:
    """Return an exchange of one question and its answer.

    Raises:
        DataError: If the prompt or the answer is empty or not a text.
    """
    for what, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: the {what} is {text!r}, expected a text that is not empty")
    return Exchange(({"role": "user", "content": prompt},), answer, place)


def plain_text(text: Any, place: str) -> Exchange:
    """Return an exchange of a text without a prompt.

    Raises:
        DataError: If the text is empty or not a text.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: the text is {text!r}, expected one that is not empty")
    return Exchange((), text, place)


def conversation(value: Any, place: str) -> list[Exchange]:
    """Return every answer of a conversation, in order, each with what came before it.

    Args:
        value: A list of {"role": ..., "content": ...}, or such a list as JSON.
        place: Where it came from, for error messages.

    Raises:
        DataError: If the value has another form, a role is unknown, an answer is empty, or there is no answer to anything.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{place}: the messages are {value[:60]!r}, expected a list of messages as JSON") from None
    value = [] if value is None else value
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise DataError(f"{place}: the messages are {value!r:.60}, expected a list of messages")
    messages: list[Message] = []
    found = []
    for number, message in enumerate(value, start=1):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if role not in ROLES:
            raise DataError(f"{place}: message {number} has the role {role!r}, expected {', '.join(ROLES)}")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise DataError(f"{place}: message {number}, of role {role}, has the content {content!r}, expected a text"
                            f"{' that is not empty' if role == 'assistant' else ''}")
        if role == "assistant":
            if not messages:
                raise DataError(f"{place}: the first message is an answer; expected what it answers before it")
            found.append(Exchange(tuple(messages), content, place))
        messages.append({"role": role, "content": content})
    if not found:
        raise DataError(f"{place}: no message has the role assistant, so there is no answer to learn; got "
                        f"{len(messages)} messages")
    return found


@dataclass(frozen=True)
class Encoded:
    """Exchanges as tokens.

    Attributes:
        inputs: Their tokens.
        starts: (n,) int64, the first token of each answer, at least 1.
        origin: (n,) int64, the exchange that each sample came from. A long plain text gives several samples, a dropped one none.
        notes: A line for each thing that was cut or dropped.
    """

    inputs: TextInputs
    starts: Tensor
    origin: Tensor
    notes: tuple[str, ...]


def encode(exchanges: Sequence[Exchange], tokenizer: Any, *, max_tokens: int, template: str = "chat", loss_on: str = "answer",
           long_answers: str = "error", stop_tokens: Sequence[int] = ()) -> Encoded:
    """Tokenize exchanges.

    Args:
        exchanges: The exchanges.
        tokenizer: A tokenizer of transformers.
        max_tokens: Length of the longest sequence, at least 2.
        template: "chat" for the chat template of the tokenizer; "plain" for prompt and answer as they are; or a format with
            {prompt} and, at its end, {answer}. An answer ends with the end of sequence, or with the template's end of turn.
        loss_on: "answer", or "all" to learn prompts, too.
        long_answers: "error", "drop" or "cut".
        stop_tokens: Tokens that end an answer. What a template writes after the last of them is left out.

    Raises:
        DataError: If answers are too long (`long_answers = "error"`), the tokenizer lacks the template, the template has no place
            for the answer, or nothing is left.
    """
    rendered = [_rendered(tokenizer, exchange, template) for exchange in exchanges]
    prompts = _tokens(tokenizer, [prompt for prompt, _ in rendered])
    answers = _tokens(tokenizer, [answer for _, answer in rendered])
    rows: list[list[int]] = []
    starts: list[int] = []
    origin: list[int] = []
    shortened, cut, dropped = 0, 0, 0
    for i, (exchange, prompt, answer) in enumerate(zip(exchanges, prompts, answers)):
        prompt, answer = _with_ends(tokenizer, exchange, template, prompt, answer, stop_tokens)
        if not exchange.messages:
            for first in range(0, len(answer), max_tokens - 1):     # a token of overlap: nothing goes unlearned
                piece = answer[first:first + max_tokens]
                if len(piece) > 1:
                    rows.append(piece)
                    starts.append(1)
                    origin.append(i)
            continue
        room = max_tokens - 1
        if len(answer) > room:
            if long_answers == "error":
                raise DataError(f"{exchange.place}: its answer has {len(answer)} tokens, and data.max_tokens = {max_tokens} leaves "
                                f'room for {room}; raise it, or set data.long_answers to "cut" or "drop"')
            if long_answers == "drop":
                dropped += 1
                continue
            answer, cut = answer[:room], cut + 1
        shortened += len(prompt) + len(answer) > max_tokens
        prompt = prompt[-(max_tokens - len(answer)):]
        rows.append(prompt + answer)
        origin.append(i)
        starts.append(len(prompt) if loss_on == "answer" else 1)
    if not rows:
        raise DataError(f"none of {len(exchanges)} samples is left; data.max_tokens is {max_tokens}")
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    inputs = TextInputs({"input_ids": torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)}, offsets,
                        {"input_ids": tokenizer.pad_token_id or 0})
    counts = ((shortened, "prompts lost their beginning, so that the answer fits"), (cut, "answers were cut at their end"),
              (dropped, "samples were dropped, because their answer is too long"))
    notes = tuple(f"{count} of {len(exchanges)} {what} (data.max_tokens = {max_tokens})" for count, what in counts if count)
    return Encoded(inputs, torch.tensor(starts), torch.tensor(origin), notes)


def prompt_tokens(tokenizer: Any, messages: Sequence[Message], template: str = "chat") -> list[int]:
    """Return the tokens of the prompt with which a model answers the last of these messages, as `encode` makes prompts."""
    prompt, _ = _rendered(tokenizer, Exchange(tuple(messages), "", "the prompt"), template)
    ids = _tokens(tokenizer, [prompt])[0]
    return _with_start(tokenizer, ids) if template != "chat" else ids


def _rendered(tokenizer: Any, exchange: Exchange, template: str) -> tuple[str, str]:
    """Prompt and answer as they are written for the model. They are tokenized apart, so that the tokens of a prompt are
    the same whether an answer follows or is to be generated."""
    if not exchange.messages:
        return "", exchange.answer
    if template == "chat":
        return _by_chat_template(tokenizer, exchange)
    prompt = "\n".join(message["content"] for message in exchange.messages)
    if template == "plain":
        return prompt, exchange.answer
    before, found, after = template.partition("{answer}")
    if not found or after or "{prompt}" not in before:
        raise DataError(f'data.template: got {template!r}; expected "chat", "plain", or a text with {{prompt}} in it and '
                        "{answer} at its end")
    return before.replace("{prompt}", prompt), exchange.answer


def _by_chat_template(tokenizer: Any, exchange: Exchange) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise DataError(f'data.template: "chat", but the model\'s tokenizer has no chat template; use "plain", or a format such '
                        'as "Question: {prompt}\\nAnswer: {answer}"')
    try:
        prompt = tokenizer.apply_chat_template(list(exchange.messages), add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*exchange.messages, {"role": "assistant", "content": exchange.answer}],
                                              tokenize=False)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{exchange.place}: the model's chat template refuses these messages: {error}") from error
    if not whole.startswith(prompt):
        raise DataError(f"{exchange.place}: the model's chat template writes another beginning once there is an answer: "
                        f"{prompt[-60:]!r} is not how {whole[:len(prompt)][-60:]!r} goes on; use data.template = \"plain\" or a format")
    return prompt, whole[len(prompt):]


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def _with_ends(tokenizer: Any, exchange: Exchange, template: str, prompt: list[int], answer: list[int],
               stop_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Add the tokens of the beginning and the end of a sequence, if no chat template has written them."""
    if exchange.messages and template == "chat":
        ends = [i for i, token in enumerate(answer) if token in stop_tokens]
        return prompt, answer[:ends[-1] + 1] if ends else answer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not exchange.messages:
        return prompt, _with_start(tokenizer, answer + end)
    return _with_start(tokenizer, prompt), answer + end


def _with_start(tokenizer: Any, ids: list[int]) -> list[int]:
    """With the beginning of a sequence, if the tokenizer writes one in front of a text."""
    start = tokenizer.bos_token_id
    writes = start is not None and tokenizer("a")["input_ids"][:1] == [start]
    return [start, *ids] if writes else ids
