"""Divide a data set among clients, and each client's share into training, validation and test samples.

The result depends only on the data set, the settings and the seed. PyTorch's random state is neither read nor changed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from fedms.errors import DataError
from fedms.foreign import few

from .dataset import Dataset, evenly_spaced, strata_of, stratified_sample

SCHEMES = ("natural", "own", "dirichlet", "domains", "classes", "quantity", "iid")
BY_GROUP = ("natural", "own", "domains")

# What the Dirichlet draw tries to give every client before it gives up (flwr-datasets' default).
MIN_DIRICHLET_SAMPLES = 10


@dataclass(frozen=True)
class ClientSplit:
    """A client's samples: sorted, disjoint int64 indices into the data set. Each part may be empty."""

    id: int
    group: str | None
    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Partition:
    """The division of a data set among clients.

    Attributes:
        clients: The participating clients; the id of a client is its position.
        unseen: Clients that never train; their ids follow.
        global_test: (m,) int64 indices of the common test set, which belong to no client.
        notes: One line for everything unusual.
    """

    clients: tuple[ClientSplit, ...]
    unseen: tuple[ClientSplit, ...]
    global_test: Tensor
    notes: tuple[str, ...]


def partition(dataset: Dataset, data, clients, seed: int) -> Partition:
    """Divide `dataset` among `clients.count + clients.unseen` clients.

    The key `data.partition` names the scheme:

    - "natural": client i belongs to group i mod (number of groups), and each group is divided evenly at random among its
      clients;
    - "own": client i has all samples of group i. The split depends only on the name of the group and the seed, so a client
      that holds nothing but its own data gets the same split;
    - "dirichlet": each class is divided by a draw from Dirichlet(alpha) (arXiv 1905.12022; flwr-datasets);
    - "domains": each group is divided by a draw from Dirichlet(alpha);
    - "classes": each client has samples of `classes_per_client` classes (arXiv 1602.05629; flwr-datasets);
    - "quantity": at random, in sizes drawn from Dirichlet(alpha);
    - "iid": evenly at random.

    Then `data.global_test` is the fraction of each class of each participating client that goes to the common test set, and
    `data.split` gives the fractions of training, validation and test samples, stratified by class. Fractions of a sample are
    rounded up or down at random. A client with too few samples for three parts gets training samples first, then test
    samples, then validation samples. A client without samples is kept, with a note.

    Args:
        dataset: The data set.
        data: The [data] table of the run file.
        clients: The [clients] table, for `count` and `unseen`.
        seed: The seed of the run.

    Raises:
        DataError: If the scheme is unknown, "natural" or "domains" is used without groups, there are fewer samples than
            clients, or no client gets a sample.
    """
    total = clients.count + clients.unseen
    if data.partition not in SCHEMES:
        raise DataError(f"data.partition: unknown scheme {data.partition!r}; known: {', '.join(SCHEMES)}")
    if total < 1:
        raise DataError(f"clients.count: expected at least one client, got {clients.count}")

    labels = dataset.labels.numpy()
    rng = np.random.default_rng([seed, 0])
    notes = list(dataset.notes)
    shares, names = _shares(dataset, data, total, seed, rng, notes)
    if data.partition != "own":        # real clients keep what is theirs
        shares = _at_least(data.min_samples, shares, rng)
    in_test = _common_test(shares[: clients.count], labels, data.global_test, rng)
    shares = [share[~np.isin(share, in_test)] for share in shares]
    if not any(map(len, shares)):
        raise DataError(f"{dataset.name}: of its samples ({len(dataset)}) no client gets one; give more data or clients "
                        "(clients.count), a smaller data.global_test, or another data.partition")
    by_class = _by_class(shares, labels)
    keys = [_key(names[i]) if data.partition == "own" else i for i in range(total)]
    parts = [part for key, of in zip(keys, by_class) for part in _split(key, of, data.split, seed, data.stratify)]
    indices = _indices(chain.from_iterable(parts)).split(list(map(len, parts)))
    splits = tuple(ClientSplit(i, names[i], *indices[3 * i:3 * i + 3]) for i in range(total))
    notes += _oddities(splits, shares, by_class, dataset.classes)
    notes += _duplicates(dataset, splits, in_test)
    return Partition(splits[: clients.count], splits[clients.count :], _indices(in_test), tuple(notes))


def _shares(dataset: Dataset, data, total: int, seed: int, rng: np.random.Generator,
            notes: list[str]) -> tuple[list[np.ndarray], list[str | None]]:
    """Divide the samples among clients by the scheme `data.partition`; see `partition`.

    Args:
        total: Number of clients.
        notes: What is worth telling is appended.

    Returns:
        The samples of each client, and the name of its group or None.
    """
    labels = dataset.labels.numpy()
    groups = None if dataset.groups is None else dataset.groups.numpy()
    every = np.arange(len(dataset))
    nameless: list[str | None] = [None] * total
    if data.partition in BY_GROUP and groups is None:
        raise DataError(f"data.partition: {dataset.name} has no natural groups; use 'dirichlet' or 'iid', or "
                        "give data of your own a column of clients (data.client) or a file a client")
    if data.partition == "natural":
        if total < len(dataset.group_names):
            notes.append(f"{total} clients: no client holds the groups {few(dataset.group_names[total:])}")
        return (_natural(every, groups, len(dataset.group_names), total, rng),
                [dataset.group_names[i % len(dataset.group_names)] for i in range(total)])
    if data.partition == "own":
        if total != len(dataset.group_names):
            raise DataError(f"clients.count: {total} clients, but data of {len(dataset.group_names)}, and each has its own "
                            "(data.partition)")
        return [np.flatnonzero(groups == i) for i in range(total)], list(dataset.group_names)
    if data.partition in ("dirichlet", "domains"):
        codes = labels if data.partition == "dirichlet" else groups
        return _dirichlet(every, codes, data.alpha, total, seed, notes), nameless
    if data.partition == "classes":
        return _classes(every, labels, data.classes_per_client, total, seed), nameless
    if data.partition == "quantity":
        ends = np.cumsum(rng.dirichlet(np.full(total, data.alpha)))[:-1]
        return np.split(rng.permutation(every), np.round(ends * len(every)).astype(int)), nameless
    return np.array_split(rng.permutation(every), total), nameless


def _at_least(minimum: int, shares: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Move random samples from the largest clients to those with fewer than `minimum`, and return the new shares."""
    shares = list(shares)
    while (missing := minimum - min(map(len, shares))) > 0:
        small, large = min(range(len(shares)), key=lambda i: len(shares[i])), max(range(len(shares)), key=lambda i: len(shares[i]))
        if len(shares[large]) - missing < minimum:
            raise DataError(f"data.min_samples: got {minimum}, but {sum(map(len, shares))} samples do not give so many to each "
                            f"of {len(shares)} clients; choose a lower number or fewer clients")
        given = rng.permutation(len(shares[large]))[:missing]
        shares[small] = np.concatenate([shares[small], shares[large][given]])
        shares[large] = np.delete(shares[large], given)
    return shares


def _common_test(shares: list[np.ndarray], labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the common test set from the samples of participating clients; return it as (m,) int64, ascending."""
    held = np.concatenate(shares)
    owner = np.repeat(np.arange(len(shares)), list(map(len, shares)))
    drawn = stratified_sample(strata_of(labels[held], owner), round(share * len(held)), rng)
    return np.sort(held[drawn])


def _natural(
    indices: np.ndarray, groups: np.ndarray, n_groups: int, total: int, rng: np.random.Generator
) -> list[np.ndarray]:
    shares: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * total
    for group in range(n_groups):
        members = range(group, total, n_groups)
        if len(members):
            parts = np.array_split(rng.permutation(indices[groups == group]), len(members))
            for client, part in zip(members, parts):
                shares[client] = part
    return shares


def _dirichlet(
    indices: np.ndarray, codes: np.ndarray, alpha: float, total: int, seed: int, notes: list[str]
) -> list[np.ndarray]:
    def draw(minimum: int) -> list[np.ndarray]:
        partitioner = _partitioners(total, indices).DirichletPartitioner(
            num_partitions=total,
            partition_by="label",
            alpha=float(alpha),
            min_partition_size=minimum,
            self_balancing=False,
            seed=seed,
        )
        return _apply(partitioner, indices, codes)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one per redraw; the note below says what matters
        try:
            return draw(MIN_DIRICHLET_SAMPLES)
        except ValueError:
            notes.append(
                f"Dirichlet({alpha:g}) over {total} clients: no draw gave every client "
                f"{MIN_DIRICHLET_SAMPLES} samples, so clients with fewer (or none) are kept"
            )
            return draw(0)


def _classes(
    indices: np.ndarray, labels: np.ndarray, classes: int, total: int, seed: int
) -> list[np.ndarray]:
    present = len(np.unique(labels))
    if classes > present:
        raise DataError(f"data.classes_per_client: {classes}, but the data set holds {present}")
    partitioner = _partitioners(total, indices).PathologicalPartitioner(
        num_partitions=total,
        partition_by="label",
        num_classes_per_partition=classes,
        class_assignment_mode="first-deterministic",  # client i has class i mod classes, so all are in use
        seed=seed,
    )
    return _apply(partitioner, indices, labels)


def _partitioners(total: int, indices: np.ndarray):
    """Return the partitioners of flwr-datasets, after a check that all need."""
    try:
        from flwr_datasets import partitioner
    except ImportError as error:
        raise DataError("data.partition: needs flwr-datasets; pip install 'fedms[train]'") from error
    if total > len(indices):
        raise DataError(f"clients.count: {total} clients, but only {len(indices)} samples to divide")
    return partitioner


def _apply(partitioner, indices: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
    from datasets import Dataset as Table

    partitioner.dataset = Table.from_dict({"label": codes, "index": indices})
    total = partitioner.num_partitions
    return [np.array(partitioner.load_partition(i)["index"], dtype=np.int64) for i in range(total)]


def _by_class(shares: list[np.ndarray], labels: np.ndarray) -> list[list[np.ndarray]]:
    """Return each client's samples grouped by class, classes ascending. All clients are sorted in one call."""
    samples = np.concatenate(shares)
    owner = np.repeat(np.arange(len(shares)), [len(share) for share in shares])
    order = np.lexsort((labels[samples], owner))
    samples, owner = samples[order], owner[order]
    own = labels[samples]
    first = np.flatnonzero(np.diff(own, prepend=-1) | np.diff(owner, prepend=-1))
    pieces = iter(np.split(samples, first[1:]))
    return [list(islice(pieces, count)) for count in np.bincount(owner[first], minlength=len(shares))]


def _split(
    client: int, classes: list[np.ndarray], fractions: tuple[float, float, float], seed: int, stratify: bool = True
) -> tuple[list[int], list[int], list[int]]:
    """Split a client's samples into sorted training, validation and test parts with sizes by `fractions`.

    With `stratify` each part takes evenly spaced samples from the shuffled samples of the classes, so that its share of each
    class is right up to rounding, which is random. Without it samples are taken at random. The split depends only on the
    seed and on `client`, the client's own number, not on the number of clients.
    """
    if not classes:
        return [], [], []
    rng = np.random.default_rng([seed, 1, client])
    samples = np.concatenate([rng.permutation(classes[k]) for k in rng.permutation(len(classes))])
    if not stratify:
        samples = rng.permutation(samples)
    _, validation_size, test_size = _sizes(len(samples), tuple(fractions))
    parts = []
    for size in (test_size, validation_size):
        taken = evenly_spaced(len(samples), size, rng)
        parts.append(sorted(samples[taken].tolist()))
        samples = np.delete(samples, taken)
    test, validation = parts
    return sorted(samples.tolist()), validation, test


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


@lru_cache(maxsize=4096)
def _sizes(count: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the sizes of the training, validation and test parts of `count` samples, by the method of largest remainders.

    Fewer than three samples go to training first, then to test, then to validation.
    """
    quota = count * np.asarray(fractions)
    sizes = np.floor(quota + 1e-9).astype(int)
    by_remainder = np.argsort(-(quota - sizes), kind="stable")
    sizes[by_remainder[: count - sizes.sum()]] += 1
    by_need = (0, 2, 1)
    for rank, part in enumerate(by_need):
        donor = max(by_need, key=lambda k: (sizes[k], by_need.index(k)))
        if not sizes[part] and (sizes[donor] >= 2 or (sizes[donor] and by_need.index(donor) > rank)):
            sizes[part], sizes[donor] = 1, sizes[donor] - 1
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _indices(values: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.fromiter(values, dtype=np.int64))


def _oddities(
    splits: tuple[ClientSplit, ...], shares: list[np.ndarray], by_class: list[list[np.ndarray]],
    classes: tuple[str, ...]
) -> list[str]:
    notes = []
    if empty := [split.id for split, share in zip(splits, shares) if not len(share)]:
        notes.append(f"{_clients(empty)} no samples")
    if small := [split.id for split, share in zip(splits, shares) if 0 < len(share) < 3]:
        notes.append(f"{_clients(small)} one or two samples, too few for training, validation and test: the first one is for "
                     "training, a second one for test")
    missing = sum(0 < len(of) < len(classes) for of in by_class)
    if missing:
        notes.append(f"{missing} of {len(splits)} clients lack at least one of the {len(classes)} classes")
    return notes


def _clients(ids: list[int]) -> str:
    """Return a text that names clients: all of a few, or the number and the first ones of many."""
    return f"client {ids[0]} has" if len(ids) == 1 else f"{len(ids):,} clients ({few(ids)}) have"


def _duplicates(dataset: Dataset, splits: tuple[ClientSplit, ...], in_test: np.ndarray) -> list[str]:
    """Return notes about duplicate samples that may inflate an accuracy: at several clients, in the training or validation
    part and the test part of one client, or in the common test set and at a client."""
    keys = dataset.inputs.keys()
    if len(set(keys)) == len(keys):
        return []
    fitted = [{keys[i] for part in (split.train, split.validation) for i in part.tolist()} for split in splits]
    held = [own | {keys[i] for i in split.test.tolist()} for own, split in zip(fitted, splits)]
    holders = Counter(chain.from_iterable(held))
    notes = []
    shared = [(i, split.id) for split in splits for part in (split.train, split.validation, split.test)
              for i in part.tolist() if holders[keys[i]] > 1]
    if shared:
        first = min(shared)[0]
        at = " and ".join([str(split.id) for split, own in zip(splits, held) if keys[first] in own][:2])
        notes.append(f"{len(shared)} samples occur at more than one client (sample {first} at clients {at}): one may train "
                     "on what another is tested on")
    within = [(i, split.id) for split, own in zip(splits, fitted) for i in split.test.tolist() if keys[i] in own]
    if within:
        count = len({client for _, client in within})
        occur = "samples occur" if len(within) > 1 else "sample occurs"
        first, client = within[0]
        notes.append(f"{len(within)} test {occur} among the training or validation samples of the same client, too "
                     f"({count} client{'s' * (count > 1)}, first client {client}, sample {first}): its accuracy will look better than "
                     "it is; remove what occurs twice")
    common = [i for i in in_test.tolist() if holders[keys[i]]]
    if common:
        notes.append(f"{len(common)} of {len(in_test)} samples of the common test set occur at a client, too (first "
                     f"sample {common[0]}): the common accuracy will look better than it is; remove what occurs twice")
    return notes
