"""What the documents say is so."""
from __future__ import annotations

import ast
import html
import importlib.util
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from pages import ELSEWHERE, PAGES, ROOT, blocks, check_predictions, run_page

from fedms.config import config_from_dict, reference
from fedms.config.reference import methods_table
from fedms.foreign import parse_toml

full = pytest.mark.skipif("FEDMS_FULL" not in os.environ, reason="minutes: make test-full")
RUNNING = [page for page in PAGES if any(block.runs_here for block in blocks(page))]
QUICK = [page for page in RUNNING if not any(block.runs_here and block.language == "sh" for block in blocks(page))]


def _module(path):
    """A script beside the pages, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_configuration_page_is_current():
    assert (ROOT / "docs/reference/configuration.md").read_text() == reference(), "run: make docs"


def test_the_page_of_commands_is_current():
    assert (ROOT / "docs/reference/commands.md").read_text() == _module("docs/commands.py").commands(), "run: make docs"


def test_the_table_of_methods_is_that_of_the_catalogue():
    assert methods_table() in (ROOT / "docs/guide/compare.md").read_text()


def test_every_block_has_a_language_that_is_known():
    """An indented or an unnamed block would be run by nobody."""
    for page in PAGES:
        for block in blocks(page):
            known = block.language in ("sh", "python", "toml", "text") or block.language.startswith("{")
            assert known, f"{page.name}: {block.language!r} for\n{block.code}"
            if found := ELSEWHERE.match(block.above):
                assert page.name in (ROOT / found[1]).read_text(), f"{found[1]} does not read {page.name}"
        if page.name != "README.md":
            loose = re.findall(r"^ {4}(?:[A-Z_]+=\S+ )*(?:fedms|python|pytest|make|pip) .*", page.read_text(), re.M)
            assert not loose, f"{page.name}: give it a fence: {loose[0]}"


@pytest.mark.parametrize("page", QUICK, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    run_page(page, tmp_path)


@full
@pytest.mark.parametrize("page", [page for page in RUNNING if page not in QUICK], ids=lambda page: page.name)
def test_all_blocks_run(page, tmp_path):
    printed = run_page(page, tmp_path)
    if page.name == "models.md":
        check_predictions(printed, tmp_path)


def test_toml_blocks_are_run_files():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "toml":
                config_from_dict(parse_toml(block.code.encode()))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_messages_that_are_explained_are_those_of_the_code():
    """Of each, the words between what is filled in stand in some string of the code."""
    strings = [node.value for package in ("fedms_ext", "python/fedms") for path in (ROOT / package).rglob("*.py")
               for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    explained = re.findall(r"^\*\*`(.+?)`\*\*", (ROOT / "docs/reference/errors.md").read_text(), re.M)
    assert len(explained) > 10
    for message in explained:
        for words in re.split(r"\bN\b|\bDIR\b|\.\.\.|'triton'|nan|\d", message):
            assert any(words.strip() in string for string in strings), f"{message}: {words!r}"


def test_names_in_the_table_from_the_paper_exist():
    names = re.findall(r"`(fedms(?:_ext)?(?:\.\w+)+)`", (ROOT / "docs/method/paper.md").read_text())
    assert len(names) >= 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_map_of_the_rooms_is_whole():
    """docs/architecture.md names every room of both packages, in the order in which they may import each other."""
    source = ast.parse((ROOT / "tests/test_architecture.py").read_text())
    rooms = next(ast.literal_eval(node.value) for node in source.body
                 if isinstance(node, ast.Assign) and node.targets[0].id == "ROOMS")
    page = (ROOT / "docs/architecture.md").read_text()
    for package, names in rooms.items():
        table = page.partition(f"## `{package}`,")[2].partition("\n## ")[0]
        listed = [name for row in re.findall(r"^\| (`[^|]+) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
        assert listed == [name for name in names if not name.startswith("_")], package


def test_the_summary_of_a_benchmark_page_shows_the_numbers_of_its_table():
    summaries = _module("docs/evidence/summaries.py")
    for summary in summaries.SUMMARIES:
        drawn = re.findall(r">([^<>]+)</text>", (ROOT / f"docs/evidence/img/{summary.page}-summary.svg").read_text())
        written = Counter(html.escape(text, quote=False) for text in summary.written())
        assert written and not written - Counter(drawn), f"{summary.page}: run: python docs/evidence/summaries.py"
