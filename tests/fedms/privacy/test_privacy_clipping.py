"""The norm of what a client sends is bounded exactly, whatever it trained."""
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedms.privacy.clipping import Layout, dequantize, quantize, unit_norm, within_bound

CASES = 10_000 if "FEDMS_FULL" in os.environ else 300
ANY = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=CASES, deadline=None)
@given(ANY, st.floats(1e-6, 1e6), st.integers(1, 20))
def test_the_norm_never_exceeds_the_bound(vector, clip, bits):
    steps = quantize(vector.astype(np.float64), clip, bits)
    assert sum(int(s) ** 2 for s in steps) <= 4**bits and within_bound(steps, bits)
    assert all(int(s) * float(v) >= 0 for s, v in zip(steps, vector))
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    exact = vector.astype(np.float64) * min(1.0, clip / norm if norm else 1.0)
    assert np.all(np.abs(dequantize(steps, clip, bits) - exact) <= clip / 2**bits * (1 + 1e-6))


@settings(max_examples=CASES, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_one_client_of_any_depth_moves_the_sum_by_no_more_than_the_bound(data, bits):
    """Clients train different blocks; a block that one did not train counts as zeros in its one vector."""
    layout = Layout((("a", (3, 2)), ("b", (4,)), ("c", ())))
    vectors = []
    for _ in range(3):
        trained = data.draw(st.sets(st.sampled_from(["a", "b", "c"])))
        tensors = {name: data.draw(arrays.arrays(np.float32, dict(layout.shapes)[name], elements=st.floats(-9, 9, width=32)))
                   for name in trained}
        vectors.append(quantize(layout.flatten(tensors), 1.0, bits).astype(np.int64))
    for left_out in range(3):
        others = sum(v for i, v in enumerate(vectors) if i != left_out)
        assert int(np.square(sum(vectors) - others).sum()) <= 4**bits


def test_zero_update_stays_zero():
    assert not quantize(np.zeros(5), 1.0, 16).any()
    assert quantize(np.zeros(0), 1.0, 16).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_norm_no_update(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(np.array([1.0, bad]), 1.0, 16)


def test_bound_is_exact_for_hostile_integers():
    assert within_bound(np.array([3, -4]), 3) and not within_bound(np.array([8, 1]), 3)
    assert not within_bound(np.array([2**40, 0]), 16) and not within_bound(np.array([-2**62]), 16)
    assert within_bound(np.zeros(0, np.int32), 16)


def test_layout_and_back():
    tensors = {"b": np.arange(4.0), "a": np.arange(6.0).reshape(3, 2)}
    layout = Layout.of(tensors)
    back = layout.split(layout.flatten(tensors))
    assert layout.size == 10 and all((back[name] == tensors[name]).all() for name in tensors)
    assert not layout.split(layout.flatten({"b": np.arange(4.0)}))["a"].any()
    with pytest.raises(ValueError, match="c: not part of this update, which holds a, b"):
        layout.flatten({"c": np.zeros(1)})
    with pytest.raises(ValueError, match=r"b: shape \(2,\), expected \(4,\)"):
        layout.flatten({"b": np.zeros(2)})


def test_counts_have_norm_one():
    assert np.linalg.norm(unit_norm([3, 0, 4])) == pytest.approx(1) and not unit_norm([0, 0]).any()
