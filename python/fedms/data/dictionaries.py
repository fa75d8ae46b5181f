"""Six English dictionaries, one client each: what a word means depends on whom one asks.

    devil    The Devil's Dictionary, Ambrose Bierce          public domain
    jargon   the Jargon File                                 public domain
    foldoc   the Free On-line Dictionary of Computing        GFDL
    vera     Virtual Entity of Relevant Acronyms             GFDL
    wn       WordNet 3.0                                     WordNet license
    gcide    GNU Collaborative International Dictionary      GPL

A sample asks `What does "X" mean?`, and a definition of 20 to 300 characters answers. The files are those of the Debian
packages dict-*: from /usr/share where they are installed, else fetched with apt-get, which needs no root, verified and
unpacked into `cache_dir()` once. They are in the DICT format: gzipped definitions, and an index of headword, offset and
length, the numbers in base 64.
"""

from __future__ import annotations

import base64
import gzip
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fedms.errors import DataError

from .cache import cache_dir, filling_cache, new_folder, scratch_folder, verify
from .conversations import Exchange, question
from .debian import unpack_packages
from .programs import FetchError

SPACE = 90_000_000      # bytes of the packages and of what is unpacked of them, roughly
INSTALLED = Path("/usr/share/dictd")
FILES = {
    "devil": ("995ca92760d677965cb2780e78b808e982f9d49e8c12d795c1854476bbf13819",
              "c53a3f8d1f889c44716782fe64796d162b7083d239545cf9e7e7c0a390d4ccde"),
    "jargon": ("856ced964d3a3cfd79a3dc251df04365eefd848966e3ae94e58f2671d6e79ca5",
               "ba834d4907f0f3eabc79644e2c3b85961e28b0fde92ae5ae24a44702bb5a98a9"),
    "foldoc": ("f3476f455be35c3301a4dfe5406d74854d0b992bc49f4cd1737f779c99e0178f",
               "35d0d990bba9f6c314395f1dda40e32ad22d14b9ab032c0e58bcebdf6b845efc"),
    "vera": ("e0c41dee6e400c05de75fc7eaefe8a7e3b12ea654d31f2c26860dadececae4a4",
             "01d2d2915a6d88f9143b4e731efd4de7a1879974cbb4ed282c57d36495687fbd"),
    "wn": ("325e0547e216aee7f71c6f4130c3717e4b1a0a2ecb905e5c116f5bd6a285cae9",
           "389a8ccda6d65b9f3285f6f48d24538f23b60b9119e260401ea17d537376bb6d"),
    "gcide": ("3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517",
              "e78de035e075f16dd686dd87a4dbf5b4525130d0550968a02d929f5ddf63a6a1"),
}
PER_DICTIONARY = 120
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
SHORTEST, LONGEST = 20, 300


def read(path: str | None, max_samples: int | None, seed: int) -> tuple[list[Exchange], list[str]]:
    """Read exchanges, and the dictionary of each: equally many of each dictionary, drawn with a seed.

    Args:
        path: A folder with the same files, or with other files NAME.dict.dz and NAME.index, each pair a dictionary.
        max_samples: Number of samples of all dictionaries together, or None for 120 of each. A small dictionary gives fewer.
        seed: Seed of the draw.
    """
    folder = default_folder() if path is None else Path(path)
    names = list(FILES) if path is None else sorted(file.name.removesuffix(".index") for file in folder.glob("*.index"))
    if not names:
        raise DataError(f"data.path: {folder} holds no NAME.index with its NAME.dict.dz")
    wanted = PER_DICTIONARY if max_samples is None else max(1, max_samples // len(names))
    exchanges: list[Exchange] = []
    owners: list[str] = []
    for name in names:
        found = entries(folder, name)
        random.Random(f"{seed} {name}").shuffle(found)
        of_this = list(_some(found, name, wanted))
        if not of_this:
            raise DataError(f"{folder / name}.index: none of its {len(found)} entries is a word of 2 to 40 characters with a "
                            f"definition of {SHORTEST} to {LONGEST}")
        exchanges += of_this
        owners += [name] * len(of_this)
    return exchanges, owners


def _some(found: list[bytes], name: str, wanted: int) -> Iterator[Exchange]:
    for entry in found:
        word, body = _split(name, entry.decode("utf-8", "replace"))
        answer = clean(name, body)
        if len(answer) > LONGEST:
            answer = answer[:LONGEST].rpartition(". ")[0] + "."
        if SHORTEST <= len(answer) <= LONGEST and 2 <= len(word) <= 40:
            yield question(f'What does "{word}" mean?', answer, f"{name}, {word!r}")
            wanted -= 1
            if wanted == 0:
                return


def entries(folder: Path, name: str) -> list[bytes]:
    """Return the entries, headword and definition, in the order of the index. One that two headwords share occurs once.

    Raises:
        DataError: If the files are not in the DICT format.
    """
    index, definitions = folder / f"{name}.index", folder / f"{name}.dict.dz"
    try:
        text = gzip.decompress(definitions.read_bytes())
        lines = index.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{folder / name}: cannot be read as a dictionary ({error}); replace both files by whole copies") from error
    found: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        word, *place = line.split("\t")[:3]
        if word.startswith("00"):       # about the dictionary itself
            continue
        try:
            start, size = map(_number, place)
        except ValueError:
            raise DataError(f"{index}, line {number}: expected `headword TAB offset TAB length`, got {line[:60]!r}") from None
        if start + size > len(text):
            raise DataError(f"{index}, line {number}: ends at byte {start + size} of {definitions.name}, which has {len(text)}")
        if start not in found:
            found[start] = text[start:start + size]
    return list(found.values())


def _number(text: str) -> int:
    if not text or "=" in text:
        raise ValueError(f"no number of the digits {DIGITS}")
    whole = text.rjust(-(-len(text) // 4) * 4, DIGITS[0])      # what base64 reads: three bytes of four digits
    return int.from_bytes(base64.b64decode(whole, validate=True), "big")


def _split(name: str, entry: str) -> tuple[str, str]:
    head, _, body = entry.partition("\n")
    if name == "devil":                 # CARTESIAN, adj.  Relating to ...
        head, _, rest = head.partition(",")
        body = f"{rest}\n{body}"
    return re.sub(r"\s*\\.*", "", head).strip(), body


def clean(name: str, body: str) -> str:
    """Return the first paragraph of more than three words of a definition, on one line and without markup."""
    if name == "gcide":
        body = re.sub(r"^.*?\n\s*(?=1\. |[A-Z])", "", body, count=1, flags=re.S)
        body = body.split("[1913 Webster]")[0]
    body = re.sub(r"[{}]", "", body)
    if name != "vera":                  # acronyms may be of few words
        body = next((part for part in re.split(r"\n\s*\n", body) if len(part.split()) > 3), "")
    return re.sub(r"\s+", " ", body).strip()


def default_folder() -> Path:
    """Return the folder of the files. They are fetched if necessary, and verified."""
    if all((INSTALLED / file).exists() for name in FILES for file in _files(name)):
        return INSTALLED
    folder = cache_dir() / "dictionaries"
    if not folder.exists():
        _fetch(folder)
    for name, digests in FILES.items():
        for file, digest in zip(_files(name), digests):
            verify(folder / file, digest, f"delete the folder {folder} and run again")
    return folder


def _files(name: str) -> tuple[str, str]:
    return f"{name}.dict.dz", f"{name}.index"


def _fetch(folder: Path) -> None:
    packages = [f"dict-{name}" for name in FILES]
    with filling_cache(SPACE), scratch_folder() as scratch:
        try:
            unpack_packages(packages, scratch)
        except FetchError as error:
            raise DataError(
                f"the dictionaries are not here and could not be fetched: {error}\nEither make `apt-get download "
                f"{' '.join(packages)}` work (Debian, Ubuntu; `apt-get update` first), or put their files NAME.dict.dz and "
                "NAME.index into a folder and name it by --set data.path=FOLDER"
            ) from error
        with new_folder(folder) as new:
            for name, digests in FILES.items():
                for file, digest in zip(_files(name), digests):
                    source = scratch / INSTALLED.relative_to("/") / file
                    verify(source, digest, "the package holds another version of the dictionary; set data.path")
                    (new / file).write_bytes(source.read_bytes())
