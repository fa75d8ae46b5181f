"""One vector a client, one sum a round: what goes in comes out, bounded, rounded and divided by what was expected."""
import numpy as np
import pytest

from fedms.privacy.clipping import Layout
from fedms.privacy.sums import Section, Sums

LAYOUT = Layout((("a", (2, 3)), ("b", (4,))))


def sums(*extra, bits=16, clip=1.0, noise=None):
    return Sums((Section("update", LAYOUT.size, clip, noise), *extra), LAYOUT, bits)


def test_mean_of_updates_that_are_not_clipped():
    rng = np.random.default_rng(0)
    clients = [{"a": rng.normal(size=(2, 3)) / 10, "b": rng.normal(size=4) / 10} for _ in range(5)]
    one = sums()
    total = sum(one.encode(client).astype(np.int64) for client in clients)
    means = one.decode(total, {"a": 5, "b": 5}, 5)
    for name in ("a", "b"):
        assert np.abs(means.changes[name] - sum(c[name] for c in clients) / 5).max() < 2 * 2**-16
    assert means.score is None and means.accuracy is None and means.classes is None


def test_tensor_that_few_are_expected_to_train_is_divided_by_those_few():
    one = sums()
    total = one.encode({"a": np.full((2, 3), 0.1)}).astype(np.int64)
    means = one.decode(total, {"a": 2, "b": 4}, 4)
    assert means.changes["a"] == pytest.approx(0.05, abs=1e-4) and not means.changes["b"].any()


def test_whole_update_is_clipped_at_once():
    one = sums(clip=0.5)
    vector = one.encode({"a": np.full((2, 3), 3.0), "b": np.full(4, 4.0)})
    assert np.linalg.norm(vector) <= 2**16 and np.linalg.norm(vector) > 2**16 - 4
    assert vector[6] / vector[0] == pytest.approx(4 / 3, rel=1e-3)


def test_scores_counts_and_accuracies():
    one = sums(Section("score", 1, 1.0), Section("counts", 3, 1.0), Section("accuracy", 1, 1.0))
    vectors = [one.encode({}, score, counts, accuracy) for score, counts, accuracy in (
        (0.5, [3, 0, 4], 0.25), (7.0, [0, 5, 0], None), (None, None, 1.0), (-2.0, [0, 0, 0], 0.75))]
    means = one.decode(sum(v.astype(np.int64) for v in vectors), {"a": 4, "b": 4}, 4)
    assert means.score == pytest.approx((0.5 + 1 + 0 + 0) / 4, abs=1e-4)
    assert means.accuracy == pytest.approx(0.5, abs=1e-4)
    assert means.classes == pytest.approx(np.array([0.6, 1, 0.8]) / 2.4, abs=1e-4)


def test_noise_cannot_leave_the_ranges():
    one = Sums((Section("score", 1, 1.0), Section("counts", 3, 1.0)), Layout(()), 16)
    low = one.decode(np.array([-9, -5, -1, -2]), {}, 1)
    assert low.score == 0 and low.classes == pytest.approx(np.full(3, 1 / 3)) and low.changes == {}
    assert one.decode(np.array([2**30, -5, 10, 30]), {}, 1).score == 1


def test_noise_in_steps():
    one = sums(Section("score", 1, 1.0), noise=2.0, bits=4)
    assert one.sections() == ((10, 32), (1, 0))
    assert one.sections(4) == ((10, 16), (1, 0)) and one.sections(3)[0] == (10, 19)


def test_what_cannot_be_encoded():
    with pytest.raises(ValueError, match="NaN or infinity"):
        sums().encode({"a": np.full((2, 3), np.nan)})
    with pytest.raises(ValueError, match="c: not part of this update"):
        sums().encode({"c": np.zeros(3)})
    assert not sums().nothing().any() and sums().nothing().shape == (10,)
