"""Print how the README and the pages read: words, words a sentence, readability, and what proselint finds.

    pip install '.[docs]'
    python docs/prose.py                # this checkout
    python docs/prose.py FOLDER         # another one, for example of an earlier commit

Counted is prose alone, without headings, blocks of code, tables and pages that the code generates. Readability is the automated
readability index: the school grade, in the United States, that a text is written for, by characters a word and words a sentence.
"""
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

GENERATED = {"commands.md", "configuration.md", "cpu_roofline.md", "message_fields.md", "faults.md"}
MOST_WORDS = 1800       # of a page that is to be read from its beginning to its end
LOOKED_UP = {"reference", "evidence"}


def prose(text: str) -> str:
    """Return the sentences of a page in Markdown, a paragraph or list item a line."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"<[^>]+>|!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(\||#|:::|\$\$| {4}).*$", "", text, flags=re.M)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n", text, flags=re.M)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return "\n".join(re.sub(r"[*`]", "", part) for part in paragraphs if re.search(r"[.?!:]$", part))


def group_of(page: Path) -> str:
    """Return the kind of page: its folder in docs/, or README, or docs itself."""
    return "README" if len(page.parts) == 1 else page.parts[1] if len(page.parts) > 2 else "docs"


def lint(texts: dict[Path, str]) -> list[str]:
    """Return what proselint finds, each with its page and the line of the page's prose.

    Its rules of typography are left out: Sphinx sets quotation marks, and x, (c), ... and resume are shapes, clauses, code and a command.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts.values()):
            Path(folder, f"{number}.md").write_text(text)
        done = subprocess.run([sys.executable, "-m", "proselint", "check", "-o", "compact", folder], capture_output=True, text=True)
    pages = list(texts)
    return [f"{pages[int(found[1])]}:{found[2]}"
            for line in done.stdout.splitlines()
            if (found := re.search(r"(\d+)\.md:(.*)", line)) and "typography." not in line]


def main(root: Path) -> None:
    import textstat

    pages = [page.relative_to(root) for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if page.name not in GENERATED]
    texts = {page: prose((root / page).read_text()) for page in pages}
    groups: dict[str, list[str]] = defaultdict(list)
    for page, text in texts.items():
        groups[group_of(page)].append(text)
    print("| pages | words of prose | words a sentence | grade |\n| --- | ---: | ---: | ---: |")
    for group, parts in {**groups, "all": texts.values()}.items():
        text = "\n".join(parts)
        grade = textstat.automated_readability_index(text)
        print(f"| {group} | {len(text.split()):,} | {textstat.words_per_sentence(text):.1f} | {grade:.1f} |")
    words = {page: sum(any(map(str.isalnum, word)) for word in (root / page).read_text().split())
             for page in pages if group_of(page) not in LOOKED_UP}
    long = [f"{page} ({count:,})" for page, count in words.items() if count > MOST_WORDS]
    print(f"\npages of more than {MOST_WORDS:,} words, code and tables counted, outside of reference and evidence: "
          f"{', '.join(long) or 'none'}")
    found = lint(texts)
    print(f"proselint: {len(found)} problems", *found, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
