"""The discrete Gaussian: its distribution, its speed, and that nothing but the key decides its bits."""
import math
import time
from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.stats

from fedms.privacy import noise
from fedms.privacy.noise import discrete_gaussian

KEY = bytes(range(32))


@pytest.mark.parametrize("sigma", [1, 2, 3, 10])
def test_distribution(sigma):
    """Chi-squared against the exact probabilities; the draws are fixed, so the test cannot fail by chance later."""
    values = discrete_gaussian(KEY, sigma, 400_000)
    support = np.arange(-12 * sigma, 12 * sigma + 1)
    weights = np.exp(-support.astype(float) ** 2 / (2 * sigma**2))
    expected = weights / weights.sum() * len(values)
    counted = np.array([(values == x).sum() for x in support])
    assert counted.sum() == len(values)
    seen = expected >= 5
    rest = counted[~seen].sum(), expected[~seen].sum()
    observed, wanted = np.append(counted[seen], rest[0]), np.append(expected[seen], rest[1])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert scipy.stats.chi2.sf(statistic, len(wanted) - 1) > 1e-3


@pytest.mark.parametrize("sigma", [65_536, 3 * 65_536 + 1])
def test_moments_of_large_noise(sigma):
    values = discrete_gaussian(KEY, sigma, 1_000_000) / sigma
    assert abs(values.mean()) < 0.005 and abs(values.std() - 1) < 0.004
    assert abs((values**3).mean()) < 0.02 and abs((values**4).mean() - 3) < 0.03
    assert scipy.stats.kstest(values[:100_000], "norm").pvalue > 1e-3


def test_same_key_same_bits_and_any_other_argument_fresh_ones():
    first = discrete_gaussian(KEY, 1000, 5000)
    assert (first == discrete_gaussian(KEY, 1000, 5000)).all()
    others = [discrete_gaussian(bytes(32), 1000, 5000), discrete_gaussian(KEY, 1001, 5000),
              discrete_gaussian(KEY, 1000, 5001)[:5000]]
    assert all(abs(np.corrcoef(first, other)[0, 1]) < 0.06 for other in others)


KNOWN = [-48017, -40599, -20314, 59257, 45525, -57541]


def test_known_bits():
    """Written once: a change of these values breaks every run that is resumed."""
    assert discrete_gaussian(KEY, 65_536, 6).tolist() == KNOWN


def test_decimal_decides_as_float_does(monkeypatch):
    """With every decision called uncertain, all are made by decimal arithmetic, and are the same."""
    fast = discrete_gaussian(KEY, 50, 200)
    monkeypatch.setattr(noise, "UNCERTAIN", 2.0)
    assert (discrete_gaussian(KEY, 50, 200) == fast).all()


def test_word_at_the_limit_of_a_block():
    """64 bits that equal a limit rounded down do not say on which side they lie; the bits after them do."""
    sampler = noise._Sampler(KEY, 50)
    words = np.array(noise._limits(), np.uint64)
    blocks = sampler._blocks(np.repeat(words, 40), 0).reshape(-1, 40)
    for k, found in enumerate(blocks[:-2]):
        assert set(found) <= {k, k + 1}
    # The shares of the bits beyond the 64th in each limit: the second limit's share decides how often the lower one wins.
    with localcontext() as context:
        context.prec = 60
        share = noise._share_up_to(1, 60) * 2**64 % 1
    many = sampler._blocks(np.repeat(words[1], 2000), 0)
    assert abs((many == 1).mean() - float(share)) < 0.05


def test_limits_are_the_shares_of_the_blocks():
    total = sum(math.exp(-k * k / 2) for k in range(30))
    reached = 0.0
    for k, limit in enumerate(noise._limits()[:6]):
        reached += math.exp(-k * k / 2)
        assert limit / 2**64 == pytest.approx(reached / total, rel=1e-14)
    assert noise._limits()[-1] == 2**64 - 1 and isinstance(noise._share_up_to(3, 28), Decimal)


@pytest.mark.parametrize("sigma", [0, -1, 2**28 + 1])
def test_sigma_out_of_range(sigma):
    with pytest.raises(ValueError, match="expected an integer from 1 to 2\\^28"):
        discrete_gaussian(KEY, sigma, 1)


def test_none_and_one_value():
    assert discrete_gaussian(KEY, 5, 0).shape == (0,) and discrete_gaussian(KEY, 5, 1).shape == (1,)


def test_a_million_samples_take_a_second_at_most():
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        discrete_gaussian(KEY, 2 * 65_536, 1_000_000)
        best = min(best, time.process_time() - started)
    assert best < 1
