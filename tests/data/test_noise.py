"""Noise: the words of SplitMix64, a function of (seed, step, row) and of nothing else."""

import numpy as np
import pytest

from jaxllm.data import noise

# The first words of SplitMix64 from the state 1234567, as its authors' C program prints them.
WORDS = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
GOLDEN = 0x9E3779B97F4A7C15


def test_words_are_those_of_splitmix64() -> None:
    states = np.array([(1234567 + GOLDEN * place) % 2**64 for place in range(5)], np.uint64)
    assert noise.mix(states).tolist() == WORDS


def test_a_row_has_the_same_noise_in_every_batch() -> None:
    rows = np.array([5, 0, 77, 2**40])
    whole = noise.uniforms(3, 9, rows, 50)
    assert whole.shape == (4, 50)
    assert whole.min() >= 0 and whole.max() < 1
    np.testing.assert_array_equal(noise.uniforms(3, 9, rows[::-1], 50)[::-1], whole)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(noise.uniforms(3, 9, np.array([row]), 20)[0], whole[place, :20])


@pytest.mark.parametrize("other", [(4, 9, 5), (3, 10, 5), (3, 9, 6), (9, 3, 5)])
def test_seed_step_and_row_each_change_all_of_it(other: tuple[int, int, int]) -> None:
    seed, step, row = other
    one, two = noise.uniforms(3, 9, np.array([5]), 1000)[0], noise.uniforms(seed, step, np.array([row]), 1000)[0]
    assert not (one == two).any()
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.15  # 1 / sqrt(1000) is one standard deviation


def test_numbers_are_uniform() -> None:
    """200,000 draws over rows and steps: in 20 equal bins with their standard deviation of 97, and so in each column."""
    draws = np.concatenate([noise.uniforms(0, step, np.arange(100), 100) for step in range(20)])
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert abs(counts - 10_000).max() < 5 * 97
    assert abs(draws.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 2000)
