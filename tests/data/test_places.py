"""Rows laid out for several devices: places by hand, and causal work counted pair by pair."""

import numpy as np
import pytest

from jaxllm.data import places


def test_zigzag_gives_each_device_an_early_and_a_late_chunk():
    np.testing.assert_array_equal(places.zigzag(12, 3), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(places.zigzag(4, 1), places.plain(4))
    assert places.zigzag(12, 3).dtype == places.plain(3).dtype == np.int32


@pytest.mark.parametrize(("tokens", "parts"), [(16, 1), (24, 2), (64, 8)])
def test_places_ascend_on_each_device_and_indices_are_their_inverse(tokens, parts):
    order = places.zigzag(tokens, parts)
    assert np.all(np.diff(order.reshape(parts, -1)) > 0)
    row = np.random.default_rng(0).integers(0, 1000, (3, tokens))
    np.testing.assert_array_equal(row[:, order][:, np.argsort(order)], row)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_causal_pairs_are_as_many_on_each_device_and_else_1_to_2n_minus_1(parts):
    chunk = 6
    tokens = 2 * parts * chunk

    def pairs(order):
        own = order.reshape(parts, -1)
        return (own[:, None, :, None] >= own[None, :, None, :]).sum((2, 3))  # [device, part of the keys]

    in_zigzag, in_order = pairs(places.zigzag(tokens, parts)), pairs(places.plain(tokens))
    assert len(set(in_zigzag.sum(1))) == 1
    assert np.all(in_zigzag[~np.eye(parts, dtype=bool)] == 2 * chunk**2)  # half of them, with every other device
    # A device's own keys are half a square and its diagonal, each earlier part is a whole one.
    half, rest = np.divmod(in_order.sum(1), 2 * chunk * chunk)
    np.testing.assert_array_equal(half, 2 * np.arange(parts) + 1)
    assert np.all(rest == chunk)


def test_rows_that_do_not_divide_are_refused_with_the_next_length():
    with pytest.raises(ValueError, match=r"rows of 20 tokens .*\n  Accepted: multiples of .* = 8 tokens.\n .* as 24\."):
        places.zigzag(20, 4)
