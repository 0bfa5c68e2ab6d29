"""Codes in words, beside words that others wrote and beside whole numbers of Python."""

import numpy as np
import pytest

from jaxllm.interop.packed import words


def test_golden_words() -> None:
    """Of GPTQModel and AutoAWQ."""
    eight = np.arange(8, dtype=np.uint8)
    assert words.pack(eight, 4, 0) == [1985229328] == [0x76543210]
    assert words.pack(words.awq_order(eight), 4, 0) == [1966171168] == [0x75316420]
    assert words.pack(eight[:4], 8, 0) == [50462976]
    assert words.pack(eight, 3, 0) == [0o76543210]
    assert words.pack(np.full(8, 7, np.uint8), 4, 0) == [2004318071]
    assert words.pack(np.full(8, 8, np.uint8), 4, 0) == [-2004318072]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_against_whole_numbers(bits: int, axis: int) -> None:
    """The k-th code is in the bits from bits x k of all words; the last word may be filled up."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (37, 21)).astype(np.uint8)
    packed = words.pack(codes, bits, axis)
    assert packed.dtype == np.int32 and packed.shape[axis] == words.count(codes.shape[axis], bits)
    rows, lines = np.moveaxis(codes, axis, -1), np.moveaxis(packed, axis, -1)
    for row, line in zip(rows, lines, strict=True):
        number = sum(int(code) << bits * index for index, code in enumerate(row))
        assert [number >> 32 * index & 0xFFFFFFFF for index in range(-(-len(row) * bits // 32))] == line.view(np.uint32).tolist()
    np.testing.assert_array_equal(words.unpack(packed, bits, axis, codes.shape[axis]), codes)


def test_awq_order_is_undone() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, 24)).astype(np.uint8)
    np.testing.assert_array_equal(words.natural_order(words.awq_order(codes)), codes)
