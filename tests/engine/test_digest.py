"""Digests: their definition, what they notice, and that no mesh changes them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.engine.digest import checksum, digests, stacked

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "uint8", "int4", "bool"]
SHAPES = [(), (0,), (7,), (3, 4), (2, 3, 5)]


def fmix32(word: int) -> int:
    """The published finalizer of MurmurHash3, in Python integers."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def expected(array: np.ndarray) -> int:
    """The definition in the docstring of digest.py, element by element."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    total = 0
    for index in np.ndindex(array.shape):
        position = 0x9E3779B9
        for coordinate in index:
            position = fmix32((position + coordinate) % 2**32)
        bits = int(array[index].astype(np.int8).view(np.uint8) if array.dtype == ml_dtypes.int4 else array[index].view(unsigned))
        total += fmix32((bits + position) % 2**32)
    return total % 2**32


def random(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(len(shape)).integers(-8, 8, shape)
    return np.asarray(np.abs(values) % 2 if dtype == "bool" else values).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_the_definition_says(dtype: str, shape: tuple[int, ...]) -> None:
    array = random(dtype, shape)
    assert digests({"a": jnp.asarray(array)}) == {"a": f"{expected(array):08x}"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stack_needs_not_be_made(dtype: str, shape: tuple[int, ...]) -> None:
    layers = [random(dtype, (3, *shape))[index] for index in range(3)]
    assert stacked([jnp.asarray(layer) for layer in layers]) == f"{expected(np.stack(layers)):08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8"])
def test_every_flipped_bit_is_noticed(dtype: str) -> None:
    array = random(dtype, (3, 5))
    before = int(checksum(jnp.asarray(array)))
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    for element in range(array.size):
        for bit in range(8 * array.dtype.itemsize):
            flipped = array.copy()
            flipped.view(unsigned).reshape(-1)[element] ^= unsigned(1 << bit)
            assert int(checksum(jnp.asarray(flipped))) != before


@pytest.mark.parametrize(
    "other",
    [
        # A multiplier for each position would miss the first: sign bits times a difference of odd numbers vanish modulo 2^32.
        [[-1.0, 1.0], [2.0, 3.0]],
        [[1.0, -1.0], [3.0, 2.0]],
        [[2.0, 3.0], [1.0, -1.0]],
        [[1.0, 2.0], [-1.0, 3.0]],
        [[1.0, -1.0, 2.0, 3.0]],
    ],
    ids=["signs", "columns", "rows", "transposed", "reshaped"],
)
def test_moved_elements_are_noticed(other: list[list[float]]) -> None:
    assert int(checksum(jnp.asarray([[1.0, -1.0], [2.0, 3.0]]))) != int(checksum(jnp.asarray(other)))


def test_no_mesh_changes_it() -> None:
    array = jax.random.normal(jax.random.key(0), (8, 16, 4))
    alone = digests({"a": jax.device_put(array, jax.devices()[0])})
    for shape, spec in [
        ((8, 1), ("x",)),
        ((2, 4), ("x", "y")),
        ((2, 4), (None, ("x", "y"))),
        ((4, 2), ()),
        ((2, 2), ("y", None, "x")),
    ]:
        mesh = jax.make_mesh(
            shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(shape)]
        )
        assert digests({"a": jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))}) == alone


@pytest.mark.parametrize("array", [jnp.zeros(2, jnp.complex64), jax.random.key(0)], ids=["complex", "key"])
def test_what_has_no_checksum_is_refused(array: jax.Array) -> None:
    with pytest.raises(ValueError, match="(?s)has no checksum.*Accepted: bool, integers and floats"):
        checksum(array)
