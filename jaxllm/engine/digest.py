"""Checksums of arrays, computed where the arrays are, equal under any sharding.

The storage format below a checkpoint notices a file that was cut short, but loads a flipped bit without a word.
The checksum is the sum, modulo 2^32, of scramble(bits(x_i) + position(i)) over all elements. Sums of integers do not depend on
their order, so neither does the result depend on the mesh; scramble is a bijection, so one changed element always changes it.
scramble is the 32-bit finalizer of MurmurHash3 (Appleby 2011, https://github.com/aappleby/smhasher, fmix32).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

# Fractional part of the golden ratio; 0 is the fixed point of scramble, so positions start elsewhere.
OFFSET = 0x9E3779B9


def _scramble(words: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit reaches every output bit."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _bits(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32, same shape; an element of 8 bytes becomes two along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise ValueError(
            f"an array of dtype {array.dtype} has no checksum.\n  Accepted: bool, integers and floats."
            "\n  Keep real numbers or jax.random.key_data(key) in the state."
        )
    width = jnp.iinfo(array.dtype).bits if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo(array.dtype).bits
    if width >= 32:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    if width < 8:
        # Narrower than a byte: every value fits int8 or float32 exactly.
        wide = jnp.int8 if jnp.issubdtype(array.dtype, jnp.integer) else jnp.float32
        return _bits(array.astype(wide))
    return jax.lax.bitcast_convert_type(array, {8: jnp.uint8, 16: jnp.uint16}[width]).astype(jnp.uint32)


@jax.jit
def checksum(array: jax.Array, start: jax.typing.ArrayLike = OFFSET) -> jax.Array:
    """uint32 scalar. The index enters axis by axis, so that arrays of more than 2^32 elements need no 64-bit index.

    start: what positions start from; other than OFFSET for a part of a larger array (`stacked`).
    """
    words = _bits(array)
    position = jnp.full(words.shape, start, jnp.uint32)
    for axis in range(words.ndim):
        position = _scramble(position + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis))
    return jnp.sum(_scramble(words + position), dtype=jnp.uint32)


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Name -> checksum as 8 hexadecimal digits.

    One array after the other: dozens of small programs with a collective each, all in flight at once, can lock up several CPU
    devices on few cores, as each waits for others that get no thread.
    """
    return {name: _text(int(checksum(array))) for name, array in arrays.items()}


def stacked(layers: Sequence[jax.Array]) -> str:
    """The digest of `jnp.stack(layers)`, which is not made: it would take their memory again."""
    starts = [_scramble(jnp.uint32(OFFSET) + jnp.uint32(index)) for index in range(len(layers))]
    return _text(sum(int(checksum(layer, start)) for layer, start in zip(layers, starts, strict=True)) % 2**32)


def _text(checksum: int) -> str:
    return f"{checksum:08x}"
