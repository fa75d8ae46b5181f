"""What may cross the border between server and clients: every field of every message, its type, its bounds, who sends it.

Whoever reads bytes of another machine passes their plain data through one of these tables first, on every engine and in
both directions. A table is strict: a key that is missing, unknown, of another type or out of its bounds refuses the whole
message with a :class:`SchemaError`, and what comes out holds plain, finite, printable values alone. A new field is one row
here; what rows must be to each other is the rule of their table.

Text that people wrote (reasons, names of groups) is not refused but made harmless, once: what is not printable is escaped,
what is too long is cut. Nothing here imports torch.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedms.errors import FedMSError
from fedms.foreign import parse_json, printable

FORMAT = 4                  # of all messages; both sides must have the same
REASON = 1000               # most characters of a reason in the records: it may quote what a client sent
NAME = 200                  # most characters of a name
SAMPLES = 2**31 - 1         # most samples of a client
EXACT = 2**53               # whole numbers up to here are exact as floats, in JSON readers too
SECONDS = 1e9
PUBLIC_KEY_BYTES = 32
LOSS = 1e12                 # a mean of such losses over any number of samples is still finite


class SchemaError(FedMSError):
    """Data that is not of the form agreed on; the message says which field, what it holds, and what was expected."""


def shown(value: Any) -> str:
    """Return a foreign value for an error message: short, printable, and never a nested structure, whose `repr` may recurse too
    deep.
    """
    if isinstance(value, (Mapping, list, tuple)):
        return f"a {'table' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    return printable(repr(value[:NAME] if isinstance(value, (str, bytes)) else value), 60)


# Types of fields. Each has `read(value)`, which returns the value as it may be used or raises SchemaError, and `words`.

@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]; `True` is none."""

    low: int = 0
    high: int = EXACT

    @property
    def words(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high]."""

    low: float
    high: float

    @property
    def words(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def read(self, value: Any) -> float:
        # The bounds are finite, and no comparison with NaN holds; whole numbers of any length compare without overflow.
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return value


@dataclass(frozen=True)
class Flag:
    """A field that is true or false."""

    words = "true or false"

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return value


@dataclass(frozen=True)
class Word:
    """Text that programs read: all of it matches the pattern."""

    pattern: str
    words: str

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or re.fullmatch(self.pattern, value, re.ASCII) is None:
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return value


@dataclass(frozen=True)
class Name:
    """Text that programs read and people see: printable throughout."""

    most: int = NAME

    @property
    def words(self) -> str:
        return f"a printable name of 1 to {self.most} characters"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= self.most or not value.isprintable():
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return value


@dataclass(frozen=True)
class Prose:
    """Text that people read; see :func:`fedms.foreign.printable`."""

    most: int = REASON
    words = "text"

    def read(self, value: Any) -> str:
        if not isinstance(value, str):
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return printable(value, self.most)


@dataclass(frozen=True)
class Config:
    """The tables of a run file, which `fedms.config.config_from_dict` reads as strictly."""

    words = "the tables of a run file"

    def read(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return value


@dataclass(frozen=True)
class Clients:
    """Ids of clients, ascending."""

    words = "a list of clients in ascending order"

    def read(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(client) is int and 0 <= client <= SAMPLES for client in value) or \
                any(a >= b for a, b in zip(value, value[1:])):
            raise SchemaError(f"{shown(value)}, expected {self.words}")
        return tuple(value)


@dataclass(frozen=True)
class Table:
    """Named fields, and no other. rule: what they must be to each other."""

    fields: Mapping[str, Field]
    rule: Callable[[dict[str, Any]], None] | None = None
    words = "a table"

    def read(self, value: Any, where: str = "") -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise SchemaError(f"{where or 'it'} is {shown(value)}, expected {self.words} of {', '.join(self.fields)}")
        prefix = where and f"{where}."
        for name in value:
            if name not in self.fields:
                raise SchemaError(f"{prefix}{printable(str(name), NAME)}: unknown; expected {', '.join(self.fields)}")
        read = {name: field.read(value, name, prefix) for name, field in self.fields.items()
                if name in value or not field.optional}
        if self.rule is not None:
            self.rule(read)
        return read


Sender = Literal["server", "client", "both"]


@dataclass(frozen=True)
class Field:
    """One row: its type, who may send it, whether it may be null, and whether it may be left out."""

    type: Any
    sender: Sender
    null: bool = False
    optional: bool = False

    def read(self, table: Mapping[str, Any], name: str, prefix: str) -> Any:
        if name not in table:
            raise SchemaError(f"{prefix}{name} is missing, expected {self.type.words}")
        value = table[name]
        if value is None and self.null:
            return None
        if isinstance(self.type, Table):
            return self.type.read(value, prefix + name)
        try:
            return self.type.read(value)
        except SchemaError as error:
            raise SchemaError(f"{prefix}{name} is {error}") from None


def _sent_by(sender: Sender) -> Callable[..., Field]:
    return lambda type, null=False, optional=False: Field(type, sender, null, optional)


_server, _client, _both = _sent_by("server"), _sent_by("client"), _sent_by("both")

SHARE = Number(0, 1)
STAGE = Word("stage1|stage2|done", "stage1, stage2 or done")
ROUND = Whole(1, 10**9)
DEPTH = Whole(0, 10**6)
CLIENT = Whole(0, SAMPLES)
RUN = Word("[0-9a-f]{32}", "the id of a run, 32 hexadecimal digits")
NONCE = Word("[0-9a-f]{16}", "16 hexadecimal digits")
DIGEST = Word("[0-9a-f]{64}", "a SHA-256, 64 hexadecimal digits")
TENSOR = Name(300)

# The server's messages. Buffers beside the head: `tensors`, `constants`, `statistics` (fedms.federated.encoding).

GREETING = Table({"format": _server(Whole(FORMAT, FORMAT)), "release": _server(Name(40)),
                  "client": _server(CLIENT, null=True)})      # the number of whom the server knows by its key

MESSAGE = Table({
    "stage": _server(STAGE), "round": _server(ROUND), "depth": _server(DEPTH), "applied_depth": _server(DEPTH),
    "constants": _server(DIGEST, optional=True),        # of the buffer that a client may have already
})

_TASK = {
    "format": _server(Whole(FORMAT, FORMAT)), "run": _server(RUN), "nonce": _server(NONCE), "model": _server(Prose(NAME)),
    "message": _server(MESSAGE), "config": _server(Config()), "kept": _server(DIGEST, null=True),
}
TRAIN = Table(_TASK)
EVALUATE = Table({**_TASK, "on_common_test": _server(Flag())})

# The clients' answers.

HELLO = Table({"client": _client(CLIENT), "release": _client(Name(40)),
               "n_train": _client(Whole(0, SAMPLES), null=True), "n_validation": _client(Whole(0, SAMPLES), null=True)})

METRICS = Table({
    "trained_params": _client(Whole(0, EXACT)),
    "loss": _client(Number(-LOSS, LOSS), null=True, optional=True),
    "validation_accuracy": _client(SHARE, null=True, optional=True),
    "validation_loss": _client(Number(-LOSS, LOSS), null=True, optional=True),
    "gate_mean": _client(SHARE, null=True, optional=True),
    "gate_entropy": _client(SHARE, null=True, optional=True),       # nats, at most log 2
})

REPLY = Table({"client": _client(CLIENT), "n_train": _client(Whole(0, SAMPLES)), "n_validation": _client(Whole(0, SAMPLES)),
               "score": _client(SHARE, null=True), "metrics": _client(METRICS)})

VISIT = Table({"reason": _client(Prose(), null=True), "flops": _client(Whole(0, EXACT)),
               "seconds": _client(Number(0, SECONDS)), "peak_memory_bytes": _client(Whole(0, EXACT))})

ACCURACY = Table({name: _client(SHARE, null=True, optional=True) for name in (
    "personalized", "mixture", "global", "local", "zero_shot", "half", "oracle")})


# Nats a token, of the client's own prediction and of others, and what else `CausalLM.details` says. Rounding may take
# the logarithm of a probability above 0.
_NATS = Number(-1, LOSS)
LANGUAGE = Table({
    "nats": _client(_NATS), **{f"nats_{name}": _client(_NATS, optional=True) for name in ("global", "local", "zero_shot")},
    "tokens": _client(Whole(1, EXACT)), "perplexity": _client(Number(0, 1e305)), "exact_match": _client(SHARE),
    "bits_per_byte": _client(_NATS, null=True),
    **{name: _client(SHARE, null=True, optional=True) for name in ("choice_accuracy", "choice_accuracy_zero_shot")}})


def _record_rule(record: dict[str, Any]) -> None:
    """Whoever was tested says how well; whoever has a gate says all of it."""
    accuracy, gate = record["accuracy"], record.get("gate_mean") is not None
    speaks = "language" in record
    if record["n_test"] and ("zero_shot" not in accuracy or not (speaks or "macro_f1" in record)):
        raise SchemaError("accuracy.zero_shot, language or macro_f1 is missing, expected it from a client with test samples")
    needed = {"personalized"} if record["n_test"] else set()
    needed |= {"oracle", "mixture"} | (set() if speaks else {"half"}) if gate else set()
    if missing := sorted(name for name in needed if accuracy.get(name) is None):
        raise SchemaError(f"accuracy.{missing[0]} is missing, expected {SHARE.words}")
    for name in ("gate_std", "gate_entropy"):
        if gate and record.get(name) is None:
            raise SchemaError(f"{name} is missing, expected {SHARE.words}")


RECORD = Table({
    "id": _client(CLIENT), "group": _client(Prose(NAME), null=True), "unseen": _client(Flag()),
    "n_train": _client(Whole(0, SAMPLES)), "n_validation": _client(Whole(0, SAMPLES)),
    "n_test": _client(Whole(0, SAMPLES)), "accuracy": _client(ACCURACY),
    **{name: _client(SHARE, null=True, optional=True) for name in (
        "validation_accuracy", "macro_f1", "calibration_error", "auroc", "gate_mean", "gate_std", "gate_entropy")},
    "validation_loss": _client(Number(-LOSS, LOSS), null=True, optional=True),
    "language": _client(LANGUAGE, optional=True),
}, _record_rule)

_ECHO = {"client": _client(CLIENT), "run": _client(RUN), "nonce": _client(NONCE)}


def _trained_rule(answer: dict[str, Any]) -> None:
    if (answer["visit"]["reason"] is None) != ("reply" in answer):
        raise SchemaError("it holds neither a reply nor a reason, or both")


# In runs with privacy: a client's share, and the phases of a secure sum. Buffers: see fedms.privacy.secure_round.

VECTOR = Table({"client": _client(CLIENT)})
JOINED = Table({**_ECHO, "share": _client(VECTOR), "kept": _client(DIGEST)})
SUM = Table({"format": _server(Whole(FORMAT, FORMAT)), "run": _server(RUN), "nonce": _server(NONCE),
             "phase": _server(Word("join|share|mask|reveal", "join, share, mask or reveal")),
             "attempt": _server(Whole(0, 1000)), "clients": _server(Clients())})
SUMMED = Table(_ECHO)

TRAINED = Table({**_ECHO, "visit": _client(VISIT), "kept": _client(DIGEST), "private": _client(Flag()),
                 "reply": _client(REPLY, optional=True)}, _trained_rule)
EVALUATED = Table({**_ECHO, "record": _client(RECORD), "on_common_test": _client(SHARE, null=True)})
PROBLEM = Table({"client": _client(CLIENT), "run": _client(RUN, optional=True), "nonce": _client(NONCE, optional=True),
                 "problem": _client(Prose())})

KINDS: Mapping[str, Table] = {
    "greeting": GREETING, "train": TRAIN, "evaluate": EVALUATE, "hello": HELLO, "trained": TRAINED,
    "evaluated": EVALUATED, "problem": PROBLEM, "joined": JOINED, "sum": SUM, "summed": SUMMED}
"""Every kind of message, by name."""

TASKS: Mapping[str, Table] = {"query": GREETING, "train": TRAIN, "evaluate": EVALUATE, "query.sum": SUM}
"""What a server may ask, by Flower's type of message."""


def read_json(text: str) -> dict[str, Any]:
    """Parse a JSON object whose numbers are finite.

    Raises:
        SchemaError: If the text is not such an object; also for NaN and infinities, text that is nested too deep, and endless
            digits.
    """
    try:
        head = parse_json(text, surrogates=True)        # a name of a file may have some; texts are made printable
    except ValueError as error:
        raise SchemaError(f"the head is no JSON: {printable(str(error), NAME)}") from None
    if not isinstance(head, dict):
        raise SchemaError("the head is no JSON object")
    return head
