"""Codes of a few bits packed into int32 words, as the files of GPTQ, AWQ and compressed-tensors hold them: the first in the lowest bits."""

import numpy as np

WORD_BITS = 32
WORD = np.dtype("<i4")
# The nibbles of a word of AWQ, the lowest first, are these of eight neighbours.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def count(codes: int, bits: int) -> int:
    """How many words so many codes take."""
    return -(-codes * bits // WORD_BITS)


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words of codes (uint8, below 2^bits; bits: 2, 4 or 8), packed along `axis`; the last word is filled up with zeros."""
    rows = np.moveaxis(codes, axis, -1)
    missing = -rows.shape[-1] % (WORD_BITS // bits)
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
    number = 8 // bits
    packed = np.zeros((*rows.shape[:-1], rows.shape[-1] // number), np.uint8)
    for index in range(number):
        packed |= rows[..., index::number] << np.uint8(bits * index)
    return np.ascontiguousarray(np.moveaxis(packed.view(WORD), -1, axis))


def unpack(words: np.ndarray, bits: int, axis: int, codes: int) -> np.ndarray:
    """The inverse of `pack`: uint8 codes, so many of them along `axis`."""
    packed = np.ascontiguousarray(np.moveaxis(words.astype(WORD, copy=False), axis, -1)).view(np.uint8)
    number, mask = 8 // bits, np.uint8(2**bits - 1)
    rows = np.empty((*packed.shape[:-1], packed.shape[-1] * number), np.uint8)
    for index in range(number):
        rows[..., index::number] = packed >> np.uint8(bits * index) & mask
    return np.moveaxis(rows[..., :codes], -1, axis)


def awq_order(codes: np.ndarray) -> np.ndarray:
    """The codes in the order in which AWQ packs the last axis, whose length is a multiple of 8."""
    return codes.reshape(*codes.shape[:-1], -1, 8)[..., AWQ_ORDER].reshape(codes.shape)


def natural_order(codes: np.ndarray) -> np.ndarray:
    """The inverse of `awq_order`."""
    return codes.reshape(*codes.shape[:-1], -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(codes.shape)
