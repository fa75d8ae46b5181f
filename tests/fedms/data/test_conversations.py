"""Prompts and answers as tokens: templates, lengths, and what is refused."""
from __future__ import annotations

import gzip
import os

import pytest
import tiny_language_models as tiny

from fedms.config import load_config
from fedms.data import dictionaries, language, projects
from fedms.data.conversations import conversation, encode, plain_text, prompt_tokens, question
from fedms.data.inputs import DataError

TOKENIZER = tiny.tokenizer()


def encoded(exchanges, **settings):
    return encode(exchanges, TOKENIZER, **{"max_tokens": 100, "stop_tokens": (0,), **settings})


def text(found, row: int) -> tuple[str, str]:
    """The prompt and the answer of a row, special tokens written out."""
    first = int(found.inputs.offsets[row])
    ids = found.inputs.fields["input_ids"][first:int(found.inputs.offsets[row + 1])]
    start = int(found.starts[row])
    return TOKENIZER.decode(ids[:start]), TOKENIZER.decode(ids[start:])


ASKED = question("What is it?", "A cat.", "row 1")


def test_chat_template_and_the_prompt_that_generation_gets():
    found = encoded([ASKED])
    assert text(found, 0) == ("<|user|>What is it?<|end|><|assistant|>", "A cat.<|end|>")
    prompt = prompt_tokens(TOKENIZER, ASKED.messages)
    assert prompt == found.inputs.fields["input_ids"][:int(found.starts[0])].tolist()


def test_what_a_template_writes_after_the_end_of_the_turn_is_left_out():
    made = tiny.tokenizer()
    made.chat_template = tiny.TEMPLATE.replace("'<|end|>' }}", "'<|end|>' + '\n' }}")
    found = encode([ASKED], made, max_tokens=100, stop_tokens=(0,))
    assert made.decode(found.inputs.fields["input_ids"]).endswith("A cat.<|end|>")


def test_a_template_without_a_generation_prompt_has_its_header_in_the_answer():
    made = tiny.tokenizer()
    made.chat_template = tiny.TEMPLATE.partition("{% if")[0]
    found = encode([ASKED], made, max_tokens=100, stop_tokens=(0,))
    start = int(found.starts[0])
    assert made.decode(found.inputs.fields["input_ids"][start:]) == "<|assistant|>A cat.<|end|>"


@pytest.mark.parametrize("template, expected", [
    ("plain", ("What is it?", "A cat.<|end|>")), ("Q: {prompt}\nA: {answer}", ("Q: What is it?\nA: ", "A cat.<|end|>"))])
def test_other_templates(template, expected):
    found = encoded([ASKED], template=template)
    assert text(found, 0) == expected
    assert prompt_tokens(TOKENIZER, ASKED.messages, template) == TOKENIZER(expected[0])["input_ids"]


def test_all_tokens_may_be_learned():
    assert encoded([ASKED], loss_on="all").starts.tolist() == [1]


def test_a_plain_text_is_cut_into_pieces_and_nothing_is_lost():
    words = "".join(chr(97 + i % 26) for i in range(250))
    found = encoded([plain_text(words, "row 1")])
    pieces = ["".join(text(found, row)) for row in range(len(found.inputs))]
    assert found.starts.tolist() == [1, 1, 1] and found.origin.tolist() == [0, 0, 0]
    assert pieces[0] + pieces[1][1:] + pieces[2][1:] == words + "<|end|>"


def test_a_line_of_megabytes():
    length = 10_000_000 if "FEDMS_FULL" in os.environ else 1_000_000
    found = encoded([plain_text("x" * length, "row 1")], max_tokens=512)
    assert int((found.inputs.lengths - 1).sum()) == length


def test_a_long_prompt_loses_its_beginning_and_says_so():
    found = encoded([question("x" * 200 + "?", "A cat.", "row 1"), ASKED])
    assert text(found, 0)[0].endswith("xxx?<|end|><|assistant|>") and text(found, 0)[1] == "A cat.<|end|>"
    assert int(found.inputs.lengths[0]) == 100
    assert found.notes == ("1 of 2 prompts lost their beginning, so that the answer fits (data.max_tokens = 100)",)


def test_a_long_answer_is_refused_cut_or_dropped():
    long = question("Why?", "y" * 150, "row 2")
    with pytest.raises(DataError, match=r"row 2: its answer has 151 tokens, and data.max_tokens = 100 leaves room for 99; raise"):
        encoded([ASKED, long])
    cut = encoded([ASKED, long], long_answers="cut")
    assert text(cut, 1)[1] == "y" * 99 and cut.notes[-1].startswith("1 of 2 answers were cut")
    dropped = encoded([ASKED, long], long_answers="drop")
    assert dropped.origin.tolist() == [0] and dropped.notes[-1].startswith("1 of 2 samples were dropped")
    with pytest.raises(DataError, match="none of 1 samples is left"):
        encoded([long], long_answers="drop")


@pytest.mark.parametrize("answer", ["y", "שלום עולם", "👩‍👩‍👧 fine", "a\u0000b"])
def test_answers_come_back_as_they_were(answer):
    assert text(encoded([question("?", answer, "row 1")]), 0)[1] == answer + "<|end|>"


# Conversations

def test_every_answer_of_a_conversation_is_a_sample():
    turns = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    found = conversation([{"role": role, "content": content} for role, content in turns], "row 1")
    assert [(len(exchange.messages), exchange.answer) for exchange in found] == [(2, "1"), (4, "2")]
    assert conversation('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', "row 1")[0].answer == "b"


@pytest.mark.parametrize("value, message", [
    ([{"role": "boss", "content": "a"}], "message 1 has the role 'boss', expected system, user, assistant, tool"),
    ([{"role": "user", "content": "a"}], "no message has the role assistant"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "message 2, of role assistant, has the content ' '"),
    ([{"role": "assistant", "content": "a"}], "the first message is an answer"),
    ([{"role": "user", "content": 3}], "has the content 3"), (["hello"], "has the role None"), ("[", "expected a list of messages"),
    (None, "got 0 messages"), (7, "the messages are 7, expected a list"), ("7.5", "the messages are 7.5, expected a list"),
    ({"role": "user", "content": "a"}, "expected a list"), ("[" * 100_000, "expected a list of messages as JSON"),
    ([["user", "a"]], "has the role None")])
def test_conversations_that_are_refused(value, message):
    with pytest.raises(DataError, match=f"^row 7: .*{message}"):
        conversation(value, "row 7")


@pytest.mark.parametrize("call, message", [
    (lambda: question("", "a", "row 7"), "row 7: the prompt is ''"), (lambda: question("a", "  ", "row 7"), "the answer is '  '"),
    (lambda: question("a", None, "row 7"), "the answer is None"), (lambda: plain_text(" ", "row 7"), "row 7: the text is ' '"),
    (lambda: encoded([ASKED], template="{answer} {prompt}"), "data.template"), (lambda: encoded([ASKED], template="x"), "data.template")])
def test_what_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_a_tokenizer_without_a_template_is_named():
    made = tiny.tokenizer()
    made.chat_template = None
    with pytest.raises(DataError, match="has no chat template; use \"plain\""):
        encode([ASKED], made, max_tokens=100)


# Dictionaries and projects

def digits(value: int) -> str:
    return (digits(value // 64) if value >= 64 else "") + dictionaries.DIGITS[value % 64]


def write_dictionary(folder, name: str, entries: dict[str, str]) -> None:
    text, lines = b"", []
    for word, body in entries.items():
        entry = f"{word}\n{body}\n".encode()
        lines.append(f"{word}\t{digits(len(text))}\t{digits(len(entry))}")
        text += entry
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(text))
    (folder / f"{name}.index").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_dictionaries_of_ones_own(tmp_path):
    for name in ("one", "two"):
        write_dictionary(tmp_path, name, {f"word{i}": f"   The {{meaning}} of word {i},\n   in {name}.\n\n   More." for i in range(9)})
    exchanges, owners = dictionaries.read(str(tmp_path), 10, 0)
    assert owners == ["one"] * 5 + ["two"] * 5
    assert exchanges[0].answer.startswith("The meaning of word") and exchanges[0].answer.endswith("in one.")
    assert exchanges == dictionaries.read(str(tmp_path), 10, 0)[0] != dictionaries.read(str(tmp_path), 10, 1)[0]


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "one.dict.dz").write_bytes(b"no gzip"), "cannot be read as a dictionary"),
    (lambda f: (f / "one.index").write_text("word\n"), "line 1: expected `headword TAB offset TAB length`"),
    (lambda f: (f / "one.index").write_text("word\tA\tzzzzz\n"), "ends at byte"),
    (lambda f: (f / "one.index").write_text(""), "none of its 0 entries")])
def test_damaged_dictionaries_are_named(tmp_path, damage, message):
    write_dictionary(tmp_path, "one", {"word": "The meaning of this word."})
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        dictionaries.read(str(tmp_path), 10, 0)


def test_projects_of_ones_own(tmp_path):
    body = "\n".join(f"    value = value + {i}" for i in range(12))
    source = f'def add(value):\n    """Add numbers."""\n{body}\n    return value\n'
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.py").write_text(source + "\n\nclass A:\n" + "".join(f"    {line}\n" for line in source.splitlines()))
    (tmp_path / "mine" / "broken.py").write_text("def (:")
    exchanges, owners = projects.read(str(tmp_path), None, 0)
    assert owners == ["mine"]       # the method is the same function, not indented
    assert exchanges[0].messages[0]["content"] + exchanges[0].answer == source.rstrip("\n")
    with pytest.raises(DataError, match="holds no folder"):
        projects.read(str(tmp_path / "mine"), None, 0)


def test_rows_without_an_answer_are_refused_with_a_remedy_or_counted(tmp_path):
    (tmp_path / "faq.csv").write_text("q,a\nwhere?,here\nwhen?, \nwho?,me\n")
    own = [f"data.name={tmp_path / 'faq.csv'}", "data.question=q", "data.answer=a"]
    table = load_config("sentiment", ["task.kind=causal_lm", "model.id=smollm2", *own]).data
    with pytest.raises(DataError, match=r"faq.csv, line 3 has nothing in column 'a' \(1 of 3 rows\).*data.empty = \"drop\""):
        language.read(table)
    material = language.read(table.model_copy(update={"empty": "drop"}))
    assert [exchange.answer for exchange in material.exchanges] == ["here", "me"]
    assert len(material.notes) == 1 and "1 of 3 rows left out" in material.notes[0]


def test_a_folder_of_texts_is_read_text_by_text_and_tables_come_first(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzweite Übung".encode())
    (tmp_path / "a.txt").write_bytes("erste Übung".encode("cp1252"))
    (tmp_path / "note.pdf").write_bytes(b"x")
    table = load_config("sentiment", ["task.kind=causal_lm", "model.id=smollm2", f"data.name={tmp_path}"]).data
    with pytest.raises(DataError, match="a.txt: cannot be read as a text: line 1 .* data.encoding = \"cp1252\""):
        language.read(table)
    (tmp_path / "a.txt").write_bytes("erste Übung".encode())
    material = language.read(table)
    assert ([e.answer for e in material.exchanges], material.clients) == (["erste Übung", "zweite Übung"], ["a", "b"])
    assert len(material.notes) == 1 and "note.pdf" in material.notes[0]
    (tmp_path / "t.csv").write_text("text\nfrom a table\n")
    material = language.read(table)
    assert [e.answer for e in material.exchanges] == ["from a table"] and "3 files left out" in material.notes[0]
