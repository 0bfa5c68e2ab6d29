"""Codes of a few bits packed into int32 words, as the files of GPTQ, AWQ and compressed-tensors hold them: the first in the lowest bits."""

import math
from typing import Any

import numpy as np

WORD_BITS = 32
WORD = np.dtype("<i4")
# The nibbles of a word of AWQ, the lowest first, are these of eight neighbours.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def count(codes: int, bits: int) -> int:
    """How many words so many codes take."""
    return -(-codes * bits // WORD_BITS)


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words of codes (uint8, below 2^bits; bits: 2, 3, 4 or 8), packed along `axis`; the last word is filled up with zeros.

    Codes of 3 bits go on from one word into the next.
    """
    rows = np.moveaxis(codes, axis, -1)
    number, size, wide = _run(bits)
    end = count(rows.shape[-1], bits) * WORD.itemsize
    missing = -(-end // size) * number - rows.shape[-1]
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]).astype(wide, copy=False)
    run = np.zeros((*rows.shape[:-1], rows.shape[-1] // number), wide)
    for index in range(number):
        run |= rows[..., index::number] << wide.type(bits * index)
    packed = np.empty((*run.shape[:-1], run.shape[-1] * size), np.uint8)
    for index in range(size):
        packed[..., index::size] = run >> wide.type(8 * index) & wide.type(255)
    return np.ascontiguousarray(np.moveaxis(np.ascontiguousarray(packed[..., :end]).view(WORD), -1, axis))


def unpack(words: np.ndarray, bits: int, axis: int, codes: int) -> np.ndarray:
    """The inverse of `pack`: uint8 codes, so many of them along `axis`."""
    packed = np.ascontiguousarray(np.moveaxis(words.astype(WORD, copy=False), axis, -1)).view(np.uint8)
    number, size, wide = _run(bits)
    packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % size)])
    run = np.zeros((*packed.shape[:-1], packed.shape[-1] // size), wide)
    for index in range(size):
        run |= packed[..., index::size].astype(wide, copy=False) << wide.type(8 * index)
    rows = np.empty((*run.shape[:-1], run.shape[-1] * number), np.uint8)
    for index in range(number):
        rows[..., index::number] = run >> wide.type(bits * index) & wide.type(2**bits - 1)
    return np.moveaxis(rows[..., :codes], -1, axis)


def _run(bits: int) -> tuple[int, int, np.dtype[Any]]:
    """(codes, bytes, a type that holds them) of the shortest run of codes that fills whole bytes."""
    number = 8 // math.gcd(8, bits)
    size = number * bits // 8
    return number, size, np.dtype(np.uint8 if size == 1 else np.uint32)


def awq_order(codes: np.ndarray) -> np.ndarray:
    """The codes in the order in which AWQ packs the last axis, whose length is a multiple of 8."""
    return codes.reshape(*codes.shape[:-1], -1, 8)[..., AWQ_ORDER].reshape(codes.shape)


def natural_order(codes: np.ndarray) -> np.ndarray:
    """The inverse of `awq_order`."""
    return codes.reshape(*codes.shape[:-1], -1, 8)[..., np.argsort(AWQ_ORDER)].reshape(codes.shape)
