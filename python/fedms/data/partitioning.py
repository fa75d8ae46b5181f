"""Divide a data set among clients, and each client's share into training, validation and test samples.

Everything here is a function of (data set, settings, seed) alone; torch's random state is neither read nor
changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from fedms.foreign import few

from .dataset import Dataset, strata_of, stratified_sample
from .inputs import DataError

SCHEMES = ("natural", "dirichlet", "domains", "classes", "quantity", "iid")
BY_GROUP = ("natural", "domains")

# What the Dirichlet draw tries to give every client before it gives up (flwr-datasets' default).
MIN_DIRICHLET_SAMPLES = 10


@dataclass(frozen=True)
class ClientSplit:
    """One client's samples: sorted, disjoint int64 indices into the data set; any of them may be empty."""

    id: int
    group: str | None
    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Partition:
    """clients: those that take part, id = position. unseen: those that never train, ids go on from there.
    global_test: (m,) int64, in no client. notes: a line for each oddity worth telling the user."""

    clients: tuple[ClientSplit, ...]
    unseen: tuple[ClientSplit, ...]
    global_test: Tensor
    notes: tuple[str, ...]


def partition(dataset: Dataset, data, clients, seed: int) -> Partition:
    """Divide `dataset` among `clients.count + clients.unseen` clients.

    data:    the run file's [data] table. `global_test` is the share taken out first, stratified by (group,
             class). `partition` is the scheme for the rest: "natural" (client i belongs to group i mod
             #groups, a group is divided evenly at random among its clients), "dirichlet" (each class is
             divided by a draw from Dirichlet(alpha), as in arXiv 1905.12022, by flwr-datasets), "domains" (each
             group is, likewise), "classes" (`classes_per_client` of them a client, as in arXiv 1602.05629, by
             flwr-datasets), "quantity" (at random, in sizes drawn from Dirichlet(alpha)) or "iid" (evenly at
             random). `split` are each client's shares of training, validation and test samples, stratified by class.
    clients: the [clients] table (count, unseen).

    A client with too few samples for three parts gets training samples first, then test, then validation; a
    client without any sample is kept, with a note. Raises DataError for an unknown scheme, "natural" or
    "domains" without groups, more clients than samples, no sample at all.
    """
    total = clients.count + clients.unseen
    if data.partition not in SCHEMES:
        raise DataError(f"data.partition: unknown scheme {data.partition!r}; known: {', '.join(SCHEMES)}")
    if total < 1:
        raise DataError(f"clients.count: expected at least one client, got {clients.count}")

    labels = dataset.labels.numpy()
    groups = None if dataset.groups is None else dataset.groups.numpy()
    rng = np.random.default_rng([seed, 0])
    in_test = stratified_sample(strata_of(labels, groups), round(data.global_test * len(dataset)), rng)
    rest = np.setdiff1d(np.arange(len(dataset)), in_test)
    if len(rest) == 0:
        raise DataError(f"{dataset.name}: {len(dataset)} samples leave none for the clients")

    notes: list[str] = []
    names: list[str | None] = [None] * total
    if data.partition in BY_GROUP and groups is None:
        raise DataError(f"data.partition: {dataset.name} has no natural groups; use 'dirichlet' or 'iid', or "
                        "give data of your own a column of clients (data.client) or a file a client")
    if data.partition == "natural":
        shares = _natural(rest, groups[rest], len(dataset.group_names), total, rng)
        names = [dataset.group_names[i % len(dataset.group_names)] for i in range(total)]
        if total < len(dataset.group_names):
            notes.append(
                f"{total} clients: no client holds the groups {few(dataset.group_names[total:])}"
            )
    elif data.partition in ("dirichlet", "domains"):
        codes = labels if data.partition == "dirichlet" else groups
        shares = _dirichlet(rest, codes[rest], data.alpha, total, seed, notes)
    elif data.partition == "classes":
        shares = _classes(rest, labels[rest], data.classes_per_client, total, seed)
    elif data.partition == "quantity":
        ends = np.cumsum(rng.dirichlet(np.full(total, data.alpha)))[:-1]
        shares = np.split(rng.permutation(rest), np.round(ends * len(rest)).astype(int))
    else:
        shares = np.array_split(rng.permutation(rest), total)

    by_class = _by_class(shares, labels)
    parts = [part for i, of in enumerate(by_class) for part in _split(i, of, data.split, seed)]
    indices = _indices(chain.from_iterable(parts)).split(list(map(len, parts)))
    splits = tuple(ClientSplit(i, names[i], *indices[3 * i:3 * i + 3]) for i in range(total))
    notes += _oddities(splits, shares, by_class, dataset.classes)
    notes += _duplicates(dataset, shares)
    return Partition(splits[: clients.count], splits[clients.count :], _indices(in_test), tuple(notes))


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
    """flwr-datasets' partitioners, after the check that all have in common."""
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
    """Each client's samples, apart by class, classes ascending; all clients are sorted at once."""
    samples = np.concatenate(shares)
    owner = np.repeat(np.arange(len(shares)), [len(share) for share in shares])
    order = np.lexsort((labels[samples], owner))
    samples, owner = samples[order], owner[order]
    own = labels[samples]
    first = np.flatnonzero(np.diff(own, prepend=-1) | np.diff(owner, prepend=-1))
    pieces = iter(np.split(samples, first[1:]))
    return [list(islice(pieces, count)) for count in np.bincount(owner[first], minlength=len(shares))]


def _split(
    client: int, classes: list[np.ndarray], fractions: tuple[float, float, float], seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Training, validation and test part of a client's samples, each sorted, stratified by class (largest remainders, ties
    to training first, so that a class with one sample is trained on). It hangs on the client's id and the seed only,
    not on how many clients there are."""
    parts: list[list[int]] = [[], [], []]
    rng = np.random.default_rng([seed, 1, client])
    for samples in classes:
        # One sample alone takes nothing from the generator.
        members = rng.permutation(samples).tolist() if len(samples) > 1 else samples.tolist()
        first, second = _bounds(len(members), tuple(fractions))
        for part, piece in zip(parts, (members[:first], members[first:second], members[second:])):
            part.extend(piece)

    # Rounding by class can leave a small client without a part. In order of need, an empty part takes a
    # sample from the largest one, if that keeps some or is needed less.
    train, validation, test = parts
    by_need = [train, test, validation]
    for rank, part in enumerate(by_need):
        if not part:
            donor = max(range(3), key=lambda k: (len(by_need[k]), k))
            if len(by_need[donor]) >= 2 or (by_need[donor] and donor > rank):
                part.append(by_need[donor].pop(int(rng.integers(len(by_need[donor])))))
    return sorted(train), sorted(validation), sorted(test)


@lru_cache(maxsize=4096)
def _bounds(count: int, fractions: tuple[float, float, float]) -> tuple[int, int]:
    """Where `count` samples are cut into three parts of these shares: largest remainders, ties to the first."""
    quota = count * np.asarray(fractions)
    sizes = np.floor(quota + 1e-9).astype(int)
    by_remainder = np.argsort(-(quota - sizes), kind="stable")
    sizes[by_remainder[: count - sizes.sum()]] += 1
    return int(sizes[0]), int(sizes[0] + sizes[1])


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
    """Who has what follows; of many, how many they are and the first."""
    return f"client {ids[0]} has" if len(ids) == 1 else f"{len(ids):,} clients ({few(ids)}) have"


def _duplicates(dataset: Dataset, shares: list[np.ndarray]) -> list[str]:
    """What one client trains on another may be tested on: such samples are worth a warning."""
    keys = dataset.inputs.keys()
    if len(set(keys)) == len(keys):
        return []
    holders: dict[bytes, set[int]] = {}
    for client, share in enumerate(shares):
        for i in share.tolist():
            holders.setdefault(keys[i], set()).add(client)
    shared = [i for share in shares for i in share.tolist() if len(holders[keys[i]]) > 1]
    if not shared:
        return []
    clients = " and ".join(map(str, sorted(holders[keys[shared[0]]])[:2]))
    return [f"{len(shared)} samples occur at more than one client (sample {shared[0]} at clients {clients}): one may train "
            "on what another is tested on"]
