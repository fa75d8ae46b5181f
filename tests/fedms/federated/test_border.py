"""Every decoder that reads foreign bytes, against bytes and data that nobody meant: it reads them or refuses them by name,
and what it has read can be averaged, recorded and summarized. A few thousand cases; with FEDMS_FULL many more."""
from __future__ import annotations

import copy
import json
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedms.federated import encoding, schema
from fedms.federated.encoding import WireError
from fedms.federated.packing import Packed, unpack_message, unpack_reply
from fedms.federated.schema import KINDS, SchemaError, Table, read_json
from fedms.foreign import printable
from fedms.runs.summary import accuracies, gate_summary

CASES = 30_000 if "FEDMS_FULL" in os.environ else 250
many = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))

HEX = "0123456789abcdef" * 4
SHARES = {name: 0.5 for name in schema.ACCURACY.fields}
REPLY = {"client": 2, "n_train": 10, "n_validation": 5, "score": 0.5, "metrics": {"trained_params": 7, "loss": 1.0}}
RECORD = {"id": 2, "group": "a", "unseen": False, "n_train": 10, "n_validation": 5, "n_test": 4, "accuracy": SHARES,
          "macro_f1": 0.5, "calibration_error": 0.1, "auroc": 0.7, "gate_mean": 0.5, "gate_std": 0.1, "gate_entropy": 0.6}
ECHO = {"client": 2, "run": HEX[:32], "nonce": HEX[:16]}
MESSAGE = {"stage": "stage1", "round": 1, "depth": 1, "applied_depth": 1}
TASK = {"format": schema.FORMAT, "run": HEX[:32], "nonce": HEX[:16], "model": "0" * 64, "message": MESSAGE, "config": {},
        "kept": None}
GOOD = {
    "greeting": {"format": schema.FORMAT, "release": "0.1.0", "client": 2},
    "sum": {**{name: TASK[name] for name in ("format", "run", "nonce")}, "phase": "join", "attempt": 0, "clients": [0, 2]},
    "summed": ECHO, "joined": {**ECHO, "share": {"client": 2}, "kept": HEX},
    "train": TASK, "evaluate": {**TASK, "on_common_test": True},
    "hello": {"client": 2, "release": "0.1.0", "n_train": 10, "n_validation": 5},
    "evaluated": {**ECHO, "record": RECORD, "on_common_test": None},
    "trained": {**ECHO, "visit": {"reason": None, "flops": 1, "seconds": 0.1, "peak_memory_bytes": 1}, "kept": HEX,
                "private": True, "reply": REPLY},
    "problem": {**ECHO, "problem": "no memory"},
}
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-10**400, 10**400), st.floats(), st.text(max_size=8),
                    st.sampled_from(["\ud800", "\x1b[31m", "../..", "", HEX, "x" * 5000, float("inf"), 2**63, -1, 2**1023]))
JSON = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(
    st.text(max_size=6), inner, max_size=4)), max_leaves=12)


def test_every_kind_of_message_has_an_example_that_is_read():
    assert GOOD.keys() == KINDS.keys()
    for kind, good in GOOD.items():
        assert json.loads(json.dumps(KINDS[kind].read(good))) == good


def places(value, path=()):
    """Paths of all fields, nested ones too."""
    for name, inner in value.items():
        yield (*path, name)
        if isinstance(inner, dict):
            yield from places(inner, (*path, name))


@st.composite
def damaged(draw):
    """A good message with up to three fields replaced, removed or added."""
    kind = draw(st.sampled_from(sorted(GOOD)))
    message = copy.deepcopy(GOOD[kind])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(message)) or [("format",)]))
        table = message
        for name in path[:-1]:
            table = table[name]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                table[path[-1]] = draw(JSON)
            case "remove":
                table.pop(path[-1])
            case "add":
                table[draw(st.text(max_size=5))] = draw(JSON)
        if not message:
            break
    return kind, message


def harmless(value):
    """Whether a value can be written, shown and calculated with; run files are read by their own schema."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    text.encode()
    return text.isprintable()


@many
@given(damaged())
def test_a_damaged_message_is_refused_by_name_or_harmless(case):
    kind, message = case
    try:
        read = KINDS[kind].read(message)
    except SchemaError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        return
    read.pop("config", None)
    assert harmless(read)
    if kind == "evaluated":
        assert harmless([accuracies([read["record"]]), gate_summary([read["record"]], True)])


@many
@given(st.sampled_from(sorted(KINDS)), JSON)
def test_anything_else_is_refused(kind, value):
    with pytest.raises(SchemaError):
        KINDS[kind].read(value)


@many
@given(st.one_of(st.text(max_size=60), JSON.map(lambda value: json.dumps(value)),
                 st.sampled_from(["[" * 10**5, '{"a":' * 10**4, '{"a": 1e999}', '{"a": NaN}', "9" * 5000])))
def test_a_head_is_read_or_refused(text):
    try:
        json.dumps(read_json(text), allow_nan=False)
    except SchemaError as error:
        assert str(error).isprintable()


ENTRY = st.one_of(JSON, st.tuples(
    st.one_of(st.sampled_from(["a", "expert/b", "\ud800"]), SCALARS),
    st.one_of(st.lists(st.one_of(st.integers(-1, 4), st.sampled_from([2**47, 2**63, True, 1.5])), max_size=70), JSON),
    st.sampled_from(["float32", "float64", "int64", "float16", []]),
    st.sampled_from(["fp32", "bf16", "int8", "exact", None])).map(list))


@many
@given(st.one_of(st.binary(max_size=80), st.lists(ENTRY, max_size=3).map(lambda entries: json.dumps(entries).encode())),
       st.binary(max_size=64), st.sampled_from([0, 0, 0, 1, -1, 2**62]))
def test_buffers_are_read_or_refused(head, payload, off):
    message = struct.pack("<Q", max(0, len(head) + off)) + head + payload
    try:
        read = encoding.unpack(message)
    except WireError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    else:
        assert sum(tensor.numel() for tensor in read.values()) <= len(message)


@many
@given(st.sampled_from([(unpack_reply, REPLY), (unpack_message, MESSAGE)]), JSON, st.sampled_from(["tensors", "sums", "x", ""]),
       st.binary(max_size=40), st.booleans())
def test_messages_and_replies_are_read_or_refused(decoder, head, part, buffer, good):
    unpack, example = decoder
    try:
        unpack(Packed(example if good else head, {part: buffer}))
    except (SchemaError, WireError) as error:
        assert str(error).isprintable()


@many
@given(st.text(), st.integers(1, 300))
def test_text_is_printable_and_cut(text, most):
    harmless_text = printable(text, most)
    assert harmless_text.isprintable() and len(harmless_text) <= most
    assert not text.isprintable() or len(text) > most or harmless_text == text


def test_every_field_says_who_may_send_it():
    def fields(table):
        for field in table.fields.values():
            yield field
            if isinstance(field.type, Table):
                yield from fields(field.type)

    sides = {kind: {field.sender for field in fields(table)} for kind, table in KINDS.items()}
    assert sides == {kind: {"server"} if kind in ("greeting", "train", "evaluate", "sum") else {"client"} for kind in KINDS}
