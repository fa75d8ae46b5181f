"""The attacks see what is there, and no more: the discrete Gaussian keeps its promise, and without noise they succeed."""
import numpy as np
import pytest

from fedms.privacy.accounting import epsilon_of
from fedms.privacy.audit import distinguish, invert, trials
from fedms.privacy.key_file import derive
from fedms.privacy.noise import discrete_gaussian

STEPS = 2**10


def released(noise):
    target = np.array([STEPS * 0.6, 0, STEPS * 0.8])

    def release(present, trial):
        key = derive(b"audit" * 7, present, trial)
        drawn = discrete_gaussian(key, int(noise * STEPS), 3) if noise else np.zeros(3, np.int64)
        return drawn + (target if present else 0)
    return trials(release, target, 1500)


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_attack_stays_below_epsilon_and_finds_a_good_part_of_it(noise):
    seen = distinguish(*released(noise), 1e-5)
    claimed = epsilon_of([noise], 1e-5)
    assert seen.epsilon <= claimed
    assert seen.epsilon > (0.1 if noise <= 1 else 0.01) * min(claimed, seen.largest_epsilon) and seen.accuracy > 0.5


def test_attack_notices_half_of_the_noise():
    """A mechanism that claims noise 2 and adds 0.3 is caught."""
    assert distinguish(*released(0.3), 1e-5).epsilon > epsilon_of([2.0], 1e-5)


def test_without_noise_the_attack_is_perfect():
    seen = distinguish(*released(0), 1e-5)
    assert seen.accuracy == 1 and seen.epsilon == pytest.approx(seen.largest_epsilon) and seen.epsilon > 5


def test_nothing_to_see_is_a_guess():
    rng = np.random.default_rng(0)
    seen = distinguish(rng.normal(size=2000), rng.normal(size=2000), 1e-5)
    assert seen.epsilon < 0.3 and 0.45 < seen.accuracy < 0.55


def test_inversion_of_one_sample_and_of_noise():
    rng = np.random.default_rng(0)
    own, others = rng.normal(size=(1, 64)), rng.normal(size=(50, 64))
    change = np.outer(rng.normal(size=8), own[0])
    seen = invert(change, own, others, directions=1)
    assert seen.found == 1 and seen.cosine > 0.95 and seen.cosine_others < 0.6 and seen.chance == pytest.approx(1 / 51)
    hidden = [invert(change + 50 * rng.normal(size=change.shape), own, others, directions=1).found for _ in range(60)]
    assert np.mean(hidden) < 0.2
