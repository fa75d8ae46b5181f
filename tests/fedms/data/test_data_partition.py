"""Who gets which samples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedms.data import DataError, ImageInputs, make_dataset, partition
from fedms.data.dataset import strata_of, stratified_sample
from hypothesis import example, given, settings
from hypothesis import strategies as st


def dataset(n=600, classes=3, groups=4, seed=0):
    rng = np.random.default_rng(seed)
    return make_dataset(
        "made-up",
        ImageInputs(torch.arange(float(n)).view(n, 1, 1, 1), 1, "made-up"),
        torch.from_numpy(rng.integers(0, classes, n)),
        tuple(f"class {c}" for c in range(classes)),
        groups=torch.from_numpy(rng.integers(0, groups, n)) if groups else None,
        group_names=tuple(f"group {g}" for g in range(groups)),
    )


def settings_of(scheme="natural", alpha=0.3, split=(0.6, 0.15, 0.25), global_test=0.1, classes_per_client=2):
    return SimpleNamespace(min_samples=0, stratify=True, partition=scheme, alpha=alpha, split=split, global_test=global_test,
                           classes_per_client=classes_per_client)


def clients_of(count=12, unseen=0):
    return SimpleNamespace(count=count, unseen=unseen)


def pieces(result):
    return [result.global_test] + [
        part for c in (*result.clients, *result.unseen) for part in (c.train, c.validation, c.test)
    ]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(pieces(a), pieces(b))) and a.notes == b.notes


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    classes=st.integers(1, 10),
    groups=st.integers(1, 4),
    count=st.integers(1, 20),
    unseen=st.integers(0, 5),
    scheme=st.sampled_from(["natural", "quantity", "iid"]),
    global_test=st.sampled_from([0.0, 0.1, 0.4]),
    split=st.sampled_from([(0.6, 0.15, 0.25), (0.34, 0.33, 0.33), (0.9, 0.05, 0.05), (0.1, 0.1, 0.8)]),
    seed=st.integers(0, 2**31),
)
@example(n=1, classes=1, groups=2, count=1, unseen=0, scheme="natural", global_test=0.0, split=(0.6, 0.15, 0.25), seed=0)
def test_any_partition_is_disjoint_and_complete(
    n, classes, groups, count, unseen, scheme, global_test, split, seed
):
    data = dataset(n, classes, groups, seed)
    config = settings_of(scheme, split=split, global_test=global_test)
    if scheme == "natural" and not (data.groups < count + unseen).any():     # nobody holds a group that has samples
        with pytest.raises(DataError, match=rf"of its samples \({n}\) no client gets one; give more data or clients"):
            partition(data, config, clients_of(count, unseen), seed)
        return
    result = partition(data, config, clients_of(count, unseen), seed)
    assert [c.id for c in (*result.clients, *result.unseen)] == list(range(count + unseen))
    participants = sum(len(part) for c in result.clients for part in (c.train, c.validation, c.test))
    common = len(result.global_test)
    assert len(result.clients) == count and common == round(global_test * (participants + common))
    for piece in pieces(result):
        assert piece.dtype == torch.int64 and (piece.diff() > 0).all()
    together = torch.cat(pieces(result))
    assert len(together.unique()) == len(together)
    if scheme != "natural" or count + unseen >= groups:
        assert len(together) == n
    for c in (*result.clients, *result.unseen):
        sizes = len(c.train), len(c.test), len(c.validation)
        total = sum(sizes)
        # First training, then test, then validation.
        assert [size > 0 for size in sizes] == [total >= 1, total >= 2, total >= 3]
        if scheme == "natural":
            owner = data.groups[torch.cat([c.train, c.validation, c.test])]
            assert (owner == c.id % groups).all() and c.group == f"group {c.id % groups}"


@pytest.mark.parametrize("scheme", ["natural", "dirichlet", "domains", "classes", "quantity", "iid"])
def test_a_partition_is_a_function_of_the_seed_alone(scheme):
    data = dataset()
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    first = partition(data, settings_of(scheme), clients_of(8, 2), seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(first, partition(data, settings_of(scheme), clients_of(8, 2), seed=3))
    assert not same(first, partition(data, settings_of(scheme), clients_of(8, 2), seed=4))
    together = torch.cat(pieces(first))
    assert torch.equal(together.sort().values, torch.arange(600))


def test_a_natural_group_is_shared_evenly():
    data = dataset(n=1000)
    result = partition(data, settings_of(global_test=0.0), clients_of(10, 2), seed=0)
    sizes = [len(c.train) + len(c.validation) + len(c.test) for c in (*result.clients, *result.unseen)]
    for g in range(4):
        shares = sizes[g::4]
        assert sum(shares) == (data.groups == g).sum() and max(shares) - min(shares) <= 1


def test_global_test_and_client_splits_are_stratified():
    data = dataset(n=3000)
    result = partition(data, settings_of(), clients_of(4), seed=0)
    strata = data.groups * 3 + data.labels
    expected = torch.bincount(strata) * 0.1
    assert (torch.bincount(strata[result.global_test], minlength=12) - expected).abs().max() < 1
    for c in result.clients:
        counts = [torch.bincount(data.labels[part], minlength=3) for part in (c.train, c.validation, c.test)]
        for part, fraction in zip(counts, (0.6, 0.15, 0.25)):
            assert (part - fraction * sum(counts)).abs().max() < 2
            assert abs(int(part.sum()) - fraction * int(sum(counts).sum())) < 1


def users(count, each, classes=2):
    n = count * each
    return make_dataset("users", ImageInputs(torch.arange(float(n)).view(n, 1, 1, 1), 1, "users"), torch.arange(n) % classes,
                        tuple(f"class {c}" for c in range(classes)), groups=torch.arange(n) // each,
                        group_names=tuple(f"user {g}" for g in range(count)))


def test_the_common_test_set_is_drawn_from_all_clients_alike():
    data = users(300, 4)
    drawn = [torch.bincount(data.groups[partition(data, settings_of(), clients_of(300), seed).global_test], minlength=300)
             for seed in range(5)]
    for counts in drawn:
        assert counts.sum() == 120 and counts.max() == 1       # a tenth of four samples, rounded up or down
        assert 35 < counts[:150].sum() < 85
    assert not torch.equal(drawn[0], drawn[1])
    alone = partition(users(300, 1), settings_of(), clients_of(300), seed=0)
    assert max(c.id for c in alone.clients if not len(c.train)) > 150


def test_each_sample_is_as_likely_to_be_drawn_and_each_stratum_keeps_its_share():
    groups, labels = np.repeat([0, 0, 0, 1, 1, 2], 3), np.tile([0, 1, 1], 6)
    times = np.zeros(18)
    for seed in range(2000):
        drawn = stratified_sample(strata_of(labels, groups), 7, np.random.default_rng(seed))
        times[drawn] += 1
        assert len(set(drawn.tolist())) == 7
        assert (abs(np.bincount(groups[drawn], minlength=3) - np.array([9, 6, 3]) * 7 / 18) < 1).all()
        for g, c in {*zip(groups.tolist(), labels.tolist())}:
            mine = (groups == g) & (labels == c)
            assert abs(mine[drawn].sum() - mine.sum() * 7 / 18) < 1
    # A binomial count of 2000 at 7/18 has a standard deviation of 22.
    assert abs(times - 2000 * 7 / 18).max() < 5 * 22


def test_a_subsample_does_not_follow_the_order_of_the_clients():
    data = users(300, 4)
    kept = stratified_sample(strata_of(data.labels.numpy(), data.groups.numpy()), 120, np.random.default_rng(0))
    assert 35 < (data.groups[kept] < 150).sum() < 85


@pytest.mark.parametrize("each", [1, 2, 3, 7])
def test_the_shares_hold_for_a_client_of_many_small_classes(each):
    n = 20 * each
    data = make_dataset("small", ImageInputs(torch.arange(2.0 * n).view(-1, 1, 1, 1), 1, "small"), torch.arange(2 * n) % 20,
                        tuple(f"class {c}" for c in range(20)), groups=torch.arange(2 * n) // n, group_names=("p", "q"))
    for c in partition(data, settings_of(global_test=0.0), clients_of(2), 0).clients:
        for part, share in zip((c.train, c.validation, c.test), (0.6, 0.15, 0.25)):
            assert abs(len(part) - share * n) < 1
            assert (torch.bincount(data.labels[part], minlength=20) - share * each).abs().max() < 2


def test_clients_that_are_not_seen_in_training_give_nothing_to_the_common_test_set():
    data = users(6, 20)
    for seed in range(3):
        result = partition(data, settings_of(global_test=0.25), clients_of(4, 2), seed)
        assert torch.bincount(data.groups[result.global_test], minlength=6).tolist() == [5, 5, 5, 5, 0, 0]


def test_samples_that_a_client_holds_twice_are_noted():
    pixels = (torch.arange(120) // 2 % 4 + 100.0 * (torch.arange(120) // 60)).view(120, 1, 1, 1)
    data = make_dataset("twice", ImageInputs(pixels, 1, "twice"), torch.arange(120) % 2, ("a", "b"),
                        groups=torch.arange(120) // 60, group_names=("p", "q"))
    within, common = partition(data, settings_of(), clients_of(2), 0).notes
    assert within.startswith("28 test samples occur among the training or validation samples of the same client, too (2 clients")
    assert common.startswith("12 of 12 samples of the common test set occur at a client, too")


def test_dirichlet_skew_grows_as_alpha_falls():
    data = dataset(n=2000)
    overall = torch.bincount(data.labels) / len(data)

    def skew(alpha):
        """Mean total variation distance between a client's classes and all, weighted by samples."""
        distances = []
        for seed in range(4):
            result = partition(data, settings_of("dirichlet", alpha), clients_of(10), seed)
            for c in result.clients:
                labels = data.labels[torch.cat([c.train, c.validation, c.test])]
                counts = torch.bincount(labels, minlength=3)
                distances.append(float((counts - overall * len(labels)).abs().sum()) / 2)
        return sum(distances) / (4 * 1800)

    at = {alpha: skew(alpha) for alpha in (0.1, 0.5, 5.0, 1000.0)}
    assert at[0.1] > at[0.5] + 0.1 > at[5.0] + 0.2 and at[5.0] > at[1000.0] + 0.05 and at[1000.0] < 0.05


def test_an_unreachable_minimum_is_noted_and_the_clients_are_kept():
    result = partition(dataset(n=100), settings_of("dirichlet", 0.05), clients_of(20), seed=0)
    assert "no draw gave every client 10 samples" in result.notes[0]
    assert len(result.clients) == 20
    empty = [c.id for c in result.clients if len(c.train) == 0]
    [note] = [note for note in result.notes if "no samples" in note]
    assert note.startswith(f"{len(empty)} clients ({empty[0]}, ") and len(empty) > 6
    for c in result.clients:
        if c.id in empty:
            assert len(c.validation) == len(c.test) == 0


def test_a_client_with_one_sample_trains_on_it():
    result = partition(dataset(n=3, groups=0), settings_of("iid", global_test=0.0), clients_of(3), seed=0)
    assert [(len(c.train), len(c.validation), len(c.test)) for c in result.clients] == [(1, 0, 0)] * 3
    assert any(note.startswith("3 clients (0, 1, 2) have one or two samples") for note in result.notes)


def test_a_class_missing_at_a_client_is_noted():
    data = make_dataset(
        "sorted",
        ImageInputs(torch.arange(40.0).view(40, 1, 1, 1), 1, "sorted"),
        torch.arange(40) // 20,
        ("a", "b"),
        groups=torch.arange(40) // 20,
        group_names=("only a", "only b"),
    )
    result = partition(data, settings_of(), clients_of(4), seed=0)
    assert result.notes == ("4 of 4 clients lack at least one of the 2 classes",)
    assert data.labels[result.clients[0].train].unique().tolist() == [0]
    assert partition(dataset(), settings_of("iid"), clients_of(3), seed=0).notes == ()


def test_samples_that_several_clients_hold_are_noted():
    pixels = torch.arange(40.0).view(40, 1, 1, 1)
    pixels[21], pixels[22] = pixels[3], pixels[3]  # at client 1, with the other group
    data = make_dataset("twice", ImageInputs(pixels, 1, "twice"), torch.arange(40) % 2, ("a", "b"),
                        groups=torch.arange(40) // 20, group_names=("first", "second"))
    result = partition(data, settings_of(global_test=0.0), clients_of(2), seed=0)
    assert result.notes[0].startswith("3 samples occur at more than one client (sample 3 at clients 0 and 1)")
    assert partition(data, settings_of(global_test=0.0), clients_of(1), seed=0).notes == (
        "1 clients: no client holds the groups second",)


def test_groups_that_no_client_holds_are_noted():
    result = partition(dataset(), settings_of(), clients_of(2), seed=0)
    assert result.notes[0] == "2 clients: no client holds the groups group 2, group 3"


@pytest.mark.parametrize("count", [10, 30])
def test_clients_have_as_many_classes_as_asked_for(count):
    data = dataset(n=3000, classes=10)
    result = partition(data, settings_of("classes", classes_per_client=3), clients_of(count), seed=0)
    held = [torch.cat([c.train, c.validation, c.test]) for c in result.clients]
    assert all(len(data.labels[own].unique()) == 3 for own in held)
    assert len(torch.cat([*held, result.global_test])) == 3000


def test_domains_and_sizes_are_skewed_by_alpha():
    def spread(scheme, alpha):
        data = dataset(n=4000)
        result = partition(data, settings_of(scheme, alpha=alpha), clients_of(10), seed=0)
        held = [torch.cat([c.train, c.validation, c.test]) for c in result.clients]
        if scheme == "quantity":
            return float(np.std([len(own) for own in held]))
        shares = [torch.bincount(data.groups[own], minlength=4) / len(own) for own in held]
        return float(torch.stack(shares).std(0).mean())

    for scheme in ("domains", "quantity"):
        assert spread(scheme, 0.1) > 2 * spread(scheme, 5.0)


@pytest.mark.parametrize(
    ("data", "config", "clients", "message"),
    [
        (
            dataset(),
            settings_of("naturl"),
            clients_of(),
            "unknown scheme 'naturl'; known: natural, own, dirichlet, domains, classes, quantity, iid",
        ),
        (
            dataset(groups=0),
            settings_of(),
            clients_of(),
            "made-up has no natural groups; use 'dirichlet' or 'iid'",
        ),
        (dataset(groups=0), settings_of("domains"), clients_of(), "made-up has no natural groups"),
        (dataset(), settings_of("classes", classes_per_client=4), clients_of(), "data.classes_per_client: 4, but the data set holds 3"),
        (dataset(n=5), settings_of("dirichlet"), clients_of(12), "12 clients, but only 5 samples"),
        (dataset(), settings_of(), clients_of(0), "at least one client, got 0"),
        (dataset(n=1), settings_of(global_test=0.9), clients_of(1), "of its samples \\(1\\) no client gets one"),
    ],
)
def test_impossible_partitions(data, config, clients, message):
    with pytest.raises(DataError, match=message):
        partition(data, config, clients, seed=0)
