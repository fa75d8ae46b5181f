"""Exact discrete Gaussian noise, many values at a time.

The discrete Gaussian has probabilities proportional to exp(-x^2 / (2 s^2)) on the integers. It gives the same
concentrated differential privacy as the continuous Gaussian (Canonne, Kamath and Steinke, NeurIPS 2020, arXiv 2004.00010)
and has no low bits that betray what was added to it, as floating-point noise has (Mironov, CCS 2012).

The sampler is rejection by blocks of s values, as in Karney (ACM TOMS 2016) and Ducas et al. (CRYPTO 2013): a block k >= 0
with probability proportional to exp(-k^2 / 2), a place u in it, uniform on 0 ... s - 1, and a sign; x = k s + u is accepted
with probability exp(-u (u + 2 k s) / (2 s^2)), and zero is not accepted with a minus.

Both decisions compare a uniform random number with a real one. Its first 64 bits decide by float64, unless the two are
closer than the rounding errors; then further bits and decimal arithmetic decide (about once in 2^38 values). So the
distribution is exact, and no processor's exponential function shows in the result.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import ROUND_FLOOR, Decimal, getcontext, localcontext
from functools import lru_cache

import numpy as np

from fedms.privacy.key_file import Stream, derive

LARGEST_SIGMA = 2**28           # (k s + u)^2 stays below 2^63 for every block that 64 bits can reach
CHUNK = 2**18                   # candidates at a time: 6 MiB of random numbers
UNCERTAIN = 2.0**-40            # distance below which float64 does not decide


def discrete_gaussian(key: bytes, sigma: int, count: int) -> np.ndarray:
    """Draw noise with its own key.

    Args:
        key: 32 bytes. The same key, `sigma` and `count` give the same values on every machine. Draws that differ in
            `sigma` or `count` are independent.
        sigma: The parameter s, from 1 to 2^28. From 2 on the standard deviation equals it to 15 digits.
        count: Number of values.

    Returns:
        (count,) int64.

    Raises:
        ValueError: If `sigma` is out of range.
    """
    if not 1 <= sigma <= LARGEST_SIGMA:
        raise ValueError(f"sigma is {sigma}, expected an integer from 1 to 2^28")
    sampler = _Sampler(derive(key, "discrete Gaussian", sigma, count), sigma)
    parts, missing = [np.zeros(0, np.int64)], count
    while missing > 0:
        parts.append(sampler.draw(min(CHUNK, int(missing / 0.7) + 64))[:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts)


def draw(key: bytes, sections: Sequence[tuple[int, int]]) -> np.ndarray:
    """Draw noise for the parts of a vector.

    Args:
        key: 32 bytes, for this vector alone.
        sections: (length, sigma) of each part; a sigma of 0 is no noise.

    Returns:
        (sum of the lengths,) int64.
    """
    return np.concatenate([np.zeros(0, np.int64), *(
        discrete_gaussian(derive(key, "section", number), sigma, length) if sigma else np.zeros(length, np.int64)
        for number, (length, sigma) in enumerate(sections))])


class _Sampler:
    def __init__(self, key: bytes, sigma: int) -> None:
        self.sigma, self.stream, self.more, self.drawn = sigma, Stream(key), key, 0

    def draw(self, candidates: int) -> np.ndarray:
        """Return the accepted ones of this many candidates, (<= candidates,) int64."""
        sigma, first = self.sigma, self.drawn
        self.drawn += candidates
        block_word, place_word, accept_word = self.stream.words(3 * candidates).reshape(3, candidates)
        negative, place_word = (place_word & np.uint64(1)).astype(bool), place_word >> np.uint64(1)
        fits = place_word < np.uint64(2**63 // sigma * sigma)       # else the first places would be likelier
        place = (place_word % np.uint64(sigma)).astype(np.int64)
        block = self._blocks(block_word, first)
        exponent = place * (place + 2 * sigma * block)              # of exp(-exponent / (2 sigma^2))
        margin = np.exp(exponent / (-2.0 * sigma * sigma)) - accept_word * 2.0**-64
        accepted = margin > 0
        for i in np.flatnonzero(np.abs(margin) < UNCERTAIN):
            accepted[i] = self._below(int(accept_word[i]), first + int(i), "accept",
                                      lambda: (Decimal(-int(exponent[i])) / (2 * sigma * sigma)).exp())
        value = place + sigma * block
        keep = fits & accepted & ~(negative & (value == 0))
        return np.where(negative, -value, value)[keep]

    def _blocks(self, words: np.ndarray, first: int) -> np.ndarray:
        """Return blocks k >= 0, (n,) int64, with probabilities proportional to exp(-k^2 / 2)."""
        limits = np.array(_limits(), np.uint64)
        found = np.searchsorted(limits, words, side="right").astype(np.int64)
        # A word equal to a limit rounded down may lie on either side of it.
        for i in np.flatnonzero(np.isin(words, limits)):
            k = int(np.searchsorted(limits, words[i], side="left"))
            while not self._below(int(words[i]), first + int(i), "block", lambda: _share_up_to(k, getcontext().prec)):
                k += 1
            found[i] = k
        return found

    def _below(self, word: int, candidate: int, purpose: str, value: Callable[[], Decimal]) -> bool:
        """Return whether a uniform number in [0, 1) is below `value()`.

        The first 64 binary digits of the number are those of `word`; further ones are drawn, and `value` is computed with as many
        digits, until the answer is certain.
        """
        digits, more = 64, Stream(derive(self.more, purpose, candidate))
        while True:
            word, digits = word << 128 | int.from_bytes(more.bytes(16), "big"), digits + 128
            with localcontext() as context:
                context.prec = digits               # decimal digits for binary ones: more than three times as many
                bound, error = value(), Decimal(10) ** (20 - digits)
                low, high = Decimal(word) / 2**digits, Decimal(word + 1) / 2**digits
                if high <= bound - error:
                    return True
                if low >= bound + error:
                    return False


@lru_cache(maxsize=64)
def _share_up_to(block: int, digits: int) -> Decimal:
    """Return the probability of the blocks 0 ... `block`, to the `digits` of the current context."""
    reached, total, k = Decimal(0), Decimal(0), 0
    while (raised := total + (Decimal(-k * k) / 2).exp()) != total:
        total, k = raised, k + 1
        if k <= block + 1:
            reached = total
    return reached / total


@lru_cache(maxsize=1)
def _limits() -> tuple[int, ...]:
    """Return 2^64 times the probability of the blocks 0 ... k, rounded down, for each k until it no longer changes."""
    limits: list[int] = []
    with localcontext() as context:
        context.prec = 80
        while not limits or limits[-1] < 2**64 - 1:
            share = _share_up_to(len(limits), context.prec) * 2**64
            limits.append(int(share.to_integral_value(ROUND_FLOOR)))
    return tuple(limits)
