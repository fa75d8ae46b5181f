"""What becomes of each field that a client could send, in each mode of `[privacy]`: the table of docs/reference/message_fields.md.

A test compares it with the fields of `fedms.federated.schema`, and with what clients really send.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedms.federated.schema import EVALUATED, HELLO, JOINED, PROBLEM, SUMMED, TRAINED, Table

MODES = ("off", "central", "secure", "distributed")
SENT, DROPPED = "sent", "not sent"
NOISED, SUMMED_UP, BOTH = "sent; leaves the server noised", "only its sum is seen", "only its noised sum is seen"

_ALWAYS = dict.fromkeys(MODES, SENT)
_PLAIN_ONLY = {**dict.fromkeys(MODES, DROPPED), "off": SENT}
_PRIVATE_ONLY = {**dict.fromkeys(MODES, SENT), "off": DROPPED}
_MASKED_ONLY = {**dict.fromkeys(MODES, DROPPED), "secure": SENT, "distributed": SENT}
_IN_THE_SUM = {"off": SENT, "central": NOISED, "secure": SUMMED_UP, "distributed": BOTH}


def fields(table: Table, prefix: str) -> Iterator[str]:
    """Yield the dotted names of a table's fields, those of tables inside of it included."""
    for name, field in table.fields.items():
        if isinstance(field.type, Table):
            yield from fields(field.type, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


ANSWERS: Mapping[str, Table] = {"hello": HELLO, "trained": TRAINED, "evaluated": EVALUATED, "joined": JOINED, "summed": SUMMED,
                                "problem": PROBLEM}
"""The kinds of messages that clients send, by the name under which the table has their fields."""

FATES: Mapping[str, Mapping[str, str]] = {
    "hello.client": _ALWAYS, "hello.release": _ALWAYS,
    "hello.n_train": _PLAIN_ONLY,
    "hello.n_validation": _PLAIN_ONLY,
    # A visit without privacy, and an evaluation.
    **{name: _PLAIN_ONLY for kind in ("trained", "evaluated") for name in fields(ANSWERS[kind], kind)},
    # What goes into the round's sum instead.
    "trained.reply.score": _IN_THE_SUM,
    "evaluated.record.accuracy.personalized": _IN_THE_SUM,
    # A visit with privacy.
    "joined.client": _PRIVATE_ONLY, "joined.run": _PRIVATE_ONLY, "joined.nonce": _PRIVATE_ONLY, "joined.share.client": _PRIVATE_ONLY,
    "joined.kept": _PRIVATE_ONLY,
    **{name: _MASKED_ONLY for name in fields(SUMMED, "summed")},
    # Errors: with privacy, the same text whatever the client's data are.
    **{name: _ALWAYS for name in fields(PROBLEM, "problem")},
    # Buffers.
    "buffer tensors": _IN_THE_SUM,
    "buffer sums": _IN_THE_SUM,
    "buffer steps": {**dict.fromkeys(MODES, DROPPED), "central": SENT},
    "buffer key": _MASKED_ONLY, "buffer boxes": _MASKED_ONLY, "buffer masked": _MASKED_ONLY, "buffer shares": _MASKED_ONLY,
}


def fates_table() -> str:
    """Return the table in Markdown. Fields of one kind with one fate share a row."""
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, fate in FATES.items():
        kind = "buffer" if name.startswith("buffer ") else name.partition(".")[0]
        short = name.removeprefix("buffer ").removeprefix(f"{kind}.")
        rows.setdefault((kind, tuple(fate[mode] for mode in MODES)), []).append(f"`{short}`")
    lines = ["| message | field | off | central | secure | distributed |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {kind} | {', '.join(names)} | {' | '.join(fate)} |" for (kind, fate), names in rows.items()]
    return "\n".join(lines) + "\n"
