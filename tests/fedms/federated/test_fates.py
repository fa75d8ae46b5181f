"""The table of what becomes of each field, against the schema, the documentation, and what clients really send."""
from pathlib import Path

import pytest

from fedms.federated.fates import ANSWERS, DROPPED, FATES, MODES, fates_table, fields
from fedms.federated.schema import KINDS

ROOT = Path(__file__).parents[3]
SERVERS = {"greeting", "train", "evaluate", "sum"}


def test_every_kind_of_message_is_a_servers_or_in_the_table():
    assert {id(KINDS[name]) for name in KINDS if name not in SERVERS} == {id(table) for table in ANSWERS.values()}


def test_every_field_has_a_fate_and_no_other():
    known = {name for kind, table in ANSWERS.items() for name in fields(table, kind)}
    assert {name for name in FATES if not name.startswith("buffer ")} == known
    assert all(set(fate) == set(MODES) for fate in FATES.values())


def test_every_buffer_has_a_fate():
    pytest.importorskip("flwr")
    from fedms.engines.flower.transport import _PARTS

    from_the_server = {"constants", "keys"}
    assert {name.removeprefix("buffer ") for name in FATES if name.startswith("buffer ")} == set(_PARTS) - from_the_server


def test_the_page_has_the_table():
    assert fates_table() in (ROOT / "docs/reference/message_fields.md").read_text(encoding="utf-8")


def test_nothing_of_a_plain_visit_is_sent_with_privacy():
    for mode in MODES[1:]:
        sent = {name for name, fate in FATES.items() if fate[mode] != DROPPED and name.startswith(("trained.", "evaluated."))}
        assert sent == {"trained.reply.score", "evaluated.record.accuracy.personalized"}     # in the sum
