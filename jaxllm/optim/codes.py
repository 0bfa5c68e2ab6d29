"""Numbers in 16 and 8 bits, for arrays that are changed a little at each step.

8 bits are block-wise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861, sections 2.1 and 2.2): blocks along the last axis, each
with a float32 scale, and codes that are finer near 0.

Rounding is stochastic: up or down, with chances that make the mean right. The paper rounds to the nearest, which loses every change below
half a step. A moment with decay b changes by a share of about 1 - b: with b2 = 0.999 a second moment in bfloat16 never falls, and one in
8 bits seldom (docs/memory.md has the numbers). Other deviations: no code stands for the largest number of a block, whose scale is chosen so
that a code hits it; and a positive number never becomes 0, since updates are divided by the root of the second moment.
"""

import jax
import jax.numpy as jnp

BLOCK = 256  # numbers that share a scale, or the next smaller number that divides the axis


def noise(shape: tuple[int, ...], *seeds: jax.Array | int) -> jax.Array:
    """Random uint32 of this shape, a function of the seeds and of each number's place: a hash, at a tenth of the price of jax.random.

    Nothing but the rounding of numbers hangs on it. Each device makes its own part, as with any array.
    """
    words = jnp.uint32(0)
    for seed in seeds:
        words = _scramble(words + jnp.asarray(seed, jnp.uint32))
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return _scramble(_scramble(place) + words)


def _scramble(words: jax.Array) -> jax.Array:
    """A bijection of uint32 that shuffles them (Appleby 2011, MurmurHash3, fmix32); the constant keeps 0 from staying 0."""
    words = words + jnp.uint32(0x9E3779B9)
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Float32 `x` rounded to one of its two neighbours in bfloat16, with `x` as the mean. noise: uint32 of the same shape."""
    # A carry out of the lower half rounds up, away from 0 for either sign, and into the exponent where it must.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def block_of(length: int) -> int:
    """The largest divisor of an axis of this length that is not above BLOCK."""
    return next(size for size in range(min(BLOCK, length), 0, -1) if length % size == 0)


def to_codes(x: jax.Array, noise: jax.Array, block: int, positive: bool) -> tuple[jax.Array, jax.Array]:
    """(int8 codes of the shape of x, or uint8 if `positive`; float32 scales [..., last axis / block]). noise: uint32, shape of x."""
    top = 255 if positive else 127
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = jnp.abs(blocks).max(-1, keepdims=True) / _value(jnp.int32(top), top)
    shares = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1)
    low = _code_below(shares, top)
    below, above = _value(low, top), _value(low + 1, top)
    chance = (noise >> 8).astype(jnp.float32).reshape(shares.shape) * 2.0**-24
    code = low + (chance < (shares - below) / (above - below))
    code = jnp.minimum(jnp.where(positive & (blocks > 0), jnp.maximum(code, 1), code), top)
    code = jnp.where(blocks < 0, -code, code).astype(jnp.uint8 if positive else jnp.int8)
    return code.reshape(x.shape), scales[..., 0]


def from_codes(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Float32 numbers of `to_codes`."""
    blocks = codes.reshape(*scales.shape, -1).astype(jnp.int32)
    value = _value(jnp.abs(blocks), 255 if codes.dtype == jnp.uint8 else 127) * scales[..., None]
    return jnp.where(blocks < 0, -value, value).reshape(codes.shape)


# The dynamic tree of section 2.2 in binary: the highest bit that is set says in which decade a number lies, the bits behind it cut
# that decade, from 0.1 to 1 times its power of ten, into equal parts. Code 0 is 0; larger codes are larger numbers.


def _value(code: jax.Array, top: int) -> jax.Array:
    """The number in [0, 1) that a code >= 0 stands for: the middle of its part."""
    # The highest bit of an integer is the exponent of the same float: on a CPU 8 times as fast as counting leading zeros.
    exponent = jax.lax.bitcast_convert_type(code.astype(jnp.float32), jnp.uint32) & jnp.uint32(0xFF800000)
    parts = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    decades = top.bit_length() - 1
    # Constants, since a power would be rounded differently from one compiled program to the next.
    power = jnp.full(code.shape, 10.0**-decades, jnp.float32)
    for decade in range(1, decades + 1):
        power = jnp.where(code >= 2**decade, 10.0 ** (decade - decades), power)
    return jnp.where(code > 0, power * (0.1 + 0.9 * (code - parts + 0.5) / parts), 0)


def _code_below(share: jax.Array, top: int) -> jax.Array:
    """The largest code whose number is not above `share`, which lies in [0, 1]."""
    decades = top.bit_length() - 1
    parts, factor = jnp.ones_like(share), jnp.full_like(share, 10.0**decades)
    for decade in range(1, decades + 1):
        reached = share >= 10.0 ** (decade - decades - 1)
        parts, factor = jnp.where(reached, 2.0**decade, parts), jnp.where(reached, 10.0 ** (decades - decade), factor)
    # Below the middle of a decade's first part it is the last code of the decade before.
    return (parts + jnp.floor((share * factor - 0.1) / 0.9 * parts - 0.5)).astype(jnp.int32)
