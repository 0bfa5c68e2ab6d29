"""Codes of a matrix beside NumPy in float64, and the frozen kernels made of them."""

from typing import Any

import gptq_paper as paper
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compression import grid
from jaxllm.transforms.affine import Affine, Grid
from jaxllm.transforms.int8 import Int8

GRIDS = pytest.mark.parametrize("symmetric", [True, False])


def kernel(inputs: int = 48, outputs: int = 24) -> np.ndarray:
    """With long tails, a weightless group, and one whose weights are all above 0."""
    found = np.random.default_rng(0).standard_t(3, (inputs, outputs)).astype(np.float32)
    found[:16, 0], found[16:32, 1] = 0, np.abs(found[16:32, 1])
    return found


def check(found: grid.Rounded, expected: paper.Found, given: Grid) -> None:
    """The same codes, and scales to the last digit or two."""
    assert found.codes.dtype == jnp.uint8 and found.scale.dtype == given.scale_dtype
    assert (found.zero is None) == given.symmetric
    np.testing.assert_allclose(
        np.asarray(found.scale, np.float64), expected.scale, rtol=2**-22 if given.scale_dtype == "float32" else 0
    )
    if found.zero is not None:
        np.testing.assert_array_equal(found.zero, expected.zero)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_allclose(found.dense(given), expected.dense, rtol=5e-7, atol=0)


@GRIDS
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "group"), [(2, 0), (3, 16), (4, 24), (8, 0), (8, 4)])
def test_nearest_codes(bits: int, group: int, symmetric: bool, scale_dtype: str) -> None:
    given = Grid(bits, group, symmetric, scale_dtype=scale_dtype)
    check(grid.round_to_nearest(kernel(), given), paper.round_groups(kernel(), given), given)


@GRIDS
@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 0)])
def test_clipped_ranges_are_the_best_of_each_groups_outputs(bits: int, group: int, symmetric: bool) -> None:
    """Summed over tokens, each group by itself; but an output that loses by it keeps its whole ranges."""
    w, x = paper.correlated(64, 24)
    w *= np.random.default_rng(1).standard_t(3, w.shape).astype(np.float32)
    given, size = Grid(bits, group, symmetric), group or 64
    shares, every = np.linspace(1, 0.5, 20, endpoint=False), []
    for share in shares:
        off = w - paper.round_groups(w, given, np.full((64 // size, 1), share)).dense
        parts = np.einsum("ngi,gio->ngo", x.astype(np.float64).reshape(len(x), -1, size), off.reshape(-1, size, 24))
        every.append(np.square(parts).sum(0))
    share = shares[np.argmin(every, 0)]
    whole, each = (np.square(x @ (w - paper.round_groups(w, given, tried).dense)).sum(0) for tried in (np.ones_like(share), share))
    # With one group there is nothing to lose.
    assert (each > whole).any() == (group > 0) and (each > whole).mean() < 0.5
    share = np.where(each > whole, 1, share)
    assert (share < 1).mean() > 0.5
    found = grid.clipped(w, paper.second_moment(x), given)
    expected = paper.round_groups(w, given, share)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=5e-7)
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.mark.parametrize(
    ("shape", "inputs", "group"), [((48, 3, 8), 1, 16), ((6, 8, 24), 2, 16), ((6, 8, 24), 2, 4), ((6, 8, 24), 2, 0)]
)
@pytest.mark.parametrize(("bits", "symmetric", "ordered"), [(3, True, False), (3, False, True), (8, True, False), (8, True, True)])
def test_leaves_stand_for_the_same_kernel(
    shape: tuple[int, ...], inputs: int, group: int, bits: int, symmetric: bool, ordered: bool
) -> None:
    given = Grid(bits, group, symmetric, ordered)
    rounded = grid.round_to_nearest(kernel(), given)
    if ordered and group:
        # A group may be of inputs from anywhere.
        mixed = np.random.default_rng(1).permutation(np.arange(48) // group).astype(np.int32)
        rounded = rounded._replace(groups=jnp.asarray(mixed))
    leaf: Any = grid.leaf(rounded, shape, inputs, given)
    assert isinstance(leaf, Int8 if (bits, group, ordered, symmetric) == (8, 0, False, True) else Affine)
    assert leaf.shape == shape
    np.testing.assert_array_equal(leaf.dense().reshape(48, 24), rounded.dense(given))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not cut the inputs"):
        grid.round_to_nearest(kernel(), Grid(4, 20))
    rounded = grid.round_to_nearest(kernel(), Grid(4, 12))
    with pytest.raises(ValueError, match="does not cut the inputs"):
        grid.leaf(rounded, (6, 8, 24), 2, Grid(4, 12))


def test_errors_of_outputs_are_those_of_the_tokens() -> None:
    w, x = paper.correlated(32, 8)
    other, hessian = np.round(w, 1), paper.second_moment(x)
    expected = paper.output_error(w - other, x)
    np.testing.assert_allclose(grid.squared_error(w, other, hessian), expected, rtol=1e-5)
    np.testing.assert_allclose(grid.relative_error(w, other, hessian), (expected / paper.output_error(w, x)) ** 0.5, rtol=1e-5)
